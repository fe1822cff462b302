"""GET /api/usage/explain and the command, over the whole stack: the story of each kind of record."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests import forked
from tests.e2e.test_api import problem_of, question, report
from tests.fixtures import eventually
from tests.forked import Ended
from tests.people import ask, client_of, rows
from tests.stack import Stack, environment

PATH = "/api/usage/explain"
Story = dict[str, Any]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One of its own: chat is killed, and what is recorded is sealed at once."""
    with Stack(tmp_path_factory.mktemp("explained") / "data", CHATRAIL_SEAL_EVERY_S="0.2") as running:
        yield running


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(stack) as client:
        yield client


@pytest.fixture
def user() -> str:
    return f"explained {uuid4()}"


async def explained(http: httpx2.AsyncClient, generation_id: str, **query: str) -> Story:
    """Once it is settled and sealed."""

    async def sealed() -> Story | None:
        answer = await http.get(PATH, params={"generationId": generation_id, **query})
        told: Story = answer.json()
        is_whole = answer.status_code == 200 and told["settled"] and told["event"] and told["event"]["sealedBy"]
        return told if is_whole else None

    return await eventually(sealed)


async def newest(http: httpx2.AsyncClient, user: str) -> str:
    """The id of the user's newest record, once there is one."""

    async def found() -> str | None:
        records = (await http.get("/api/usage/logs", params={"userId": user})).json()["records"]
        return str(records[0]["id"]) if records else None

    return await eventually(found)


async def leave(http: httpx2.AsyncClient, user: str, tokens: int) -> None:
    """So many of the month's 108,000."""
    (await http.post("/api/usage", json=report(user, 108_000 - tokens))).raise_for_status()


@asynccontextmanager
async def under_way(http: httpx2.AsyncClient, user: str) -> AsyncIterator[str]:
    """The id of a generation that goes on for as long as anybody listens."""
    body = question(user, "[usage input=20 output=900] [deltas 400] [slow 1s] Hello", maxTokens=900)
    async with http.stream("POST", "/api/chat", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))["generationId"]
                break


def moment(told: str) -> datetime:
    return datetime.fromisoformat(told)


async def test_a_generation_that_was_cut_short_is_told_from_asking_to_its_seal(
    http: httpx2.AsyncClient, user: str
) -> None:
    await leave(http, user, 600)
    answer = await ask(http, user, "[usage input=20 output=8000] Hello", maxTokens=8_000)
    assert answer.data["limitReached"]
    told = await explained(http, answer.data["generationId"], userId=user)

    asked, granted, held, given = (told[name] for name in ("asked", "granted", "held", "given"))
    assert (told["state"], told["userId"], told["id"]) == ("settled", user, answer.data["generationId"])
    assert asked["outputTokens"] == 8_000
    assert asked["inputTokensMax"] >= 20
    assert granted["outputTokens"] == 600 - asked["inputTokensMax"]
    month = {"period": "month"} | await bounds(http, user)
    assert (granted["tier"], granted["limit"]) == ("free", month)
    assert held["tokens"] == 600
    assert not held["isOpen"]
    assert moment(held["expiresAt"]) - moment(granted["at"]) == timedelta(minutes=15)
    assert given["outputTokens"] == answer.data["outputTokens"] == granted["outputTokens"]
    assert (given["tokensUsed"], given["outcome"]) == (answer.data["tokensUsed"], "completed")
    assert moment(granted["at"]) <= moment(given["completedAt"])
    assert told["settled"] == {
        "countsAt": granted["at"],
        "tokensCounted": answer.data["tokensUsed"],
        "topUpTokens": 0,
        "isLate": False,
        "tier": "free",
        "countedIn": [month],
    }
    assert told["event"]["id"] == told["id"]
    assert told["event"]["type"] == "generation.completed"
    assert told["event"]["sealedBy"]["treeSize"] >= told["event"]["streamSequence"]


async def bounds(http: httpx2.AsyncClient, user: str) -> dict[str, str]:
    usage = (await http.get("/api/usage", params={"userId": user})).json()
    return {name: usage[name] for name in ("periodStart", "resetsAt")}


async def test_the_leaf_and_the_seal_are_those_that_prove_the_record(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    told = await explained(http, (await ask(http, user, "Hello")).data["generationId"])
    event, seal = told["event"], told["event"]["sealedBy"]
    leaf = f"SELECT hex(leaf_hash), event_id FROM leaves WHERE stream_sequence = {event['streamSequence']}"  # noqa: S608
    assert rows(stack.data / "ledger.db", leaf) == [(event["leafHash"].upper(), told["id"])]
    sealed = f"SELECT hex(root_hash) FROM seals WHERE tree_size = {seal['treeSize']}"  # noqa: S608
    assert rows(stack.data / "ledger.db", sealed) == [(seal["rootHash"].upper(),)]
    first = f"SELECT min(tree_size) FROM seals WHERE tree_size >= {event['streamSequence']}"  # noqa: S608
    assert rows(stack.data / "ledger.db", first) == [(seal["treeSize"],)]


async def test_a_generation_under_way_is_told_as_far_as_it_came(http: httpx2.AsyncClient, user: str) -> None:
    async with under_way(http, user) as generation_id:
        told = (await http.get(PATH, params={"generationId": generation_id})).json()
    assert (told["state"], told["userId"], told["held"]["isOpen"]) == ("under_way", user, True)
    assert told["asked"]["outputTokens"] == told["granted"]["outputTokens"] == 900
    assert told["held"]["tokens"] == told["asked"]["inputTokensMax"] + 900
    assert (told["given"], told["settled"], told["event"]) == (None, None, None)

    ended = await explained(http, generation_id)
    assert (ended["asked"], ended["granted"]) == (told["asked"], told["granted"])
    assert ended["held"] == told["held"] | {"isOpen": False}
    assert (ended["given"]["outcome"], ended["given"]["onDisconnect"]) == ("disconnected", "stop")


async def test_what_a_killed_chat_left_is_told_with_what_it_had_been_granted(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    async with under_way(http, user) as generation_id:
        await asyncio.to_thread(stack.kill, "chat")
    await stack.answers(f"{stack.url}/readyz")
    told = await explained(http, generation_id, userId=user)
    assert (told["given"]["outcome"], told["given"]["usageSource"]) == ("interrupted", "estimated")
    assert (told["asked"]["outputTokens"], told["granted"]["outputTokens"]) == (900, 900)
    assert 0 < told["settled"]["tokensCounted"] <= told["held"]["tokens"]


async def test_who_settles_after_the_hold_has_expired_is_late(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    async with under_way(http, user) as generation_id:
        with closing(sqlite3.connect(stack.data / "quota.db", timeout=10)) as quota, quota:
            quota.execute(
                "UPDATE holds SET expires_at = started_at, reported_at = started_at WHERE generation_id = ?",
                (generation_id,),
            )
        told = (await http.get(PATH, params={"generationId": generation_id})).json()
        assert (told["state"], told["held"]["isOpen"]) == ("expired", False)
    told = await explained(http, generation_id)
    assert (told["state"], told["settled"]["isLate"]) == ("settled", True)


async def test_a_report_was_never_asked_for_granted_or_held(http: httpx2.AsyncClient, user: str) -> None:
    (await http.post("/api/usage", json=report(user, metadata={"note": "by hand"}))).raise_for_status()
    told = await explained(http, await newest(http, user), userId=user)
    assert (told["asked"], told["granted"], told["held"]) == (None, None, None)
    assert (told["given"]["usageSource"], told["given"]["metadata"]) == ("reported", {"note": "by hand"})
    assert (told["given"]["tokensUsed"], told["settled"]["tokensCounted"]) == (8_094, 8_094)


async def test_an_adjustment_is_told_by_the_id_of_its_event(http: httpx2.AsyncClient, user: str) -> None:
    body = {"userId": user, "reason": "invoice 7", "actor": "billing"}
    ids = []
    for amount in (
        {"tokensUsed": -94, "effectiveAt": "2026-02-28T23:59:59Z"},
        {"topUpTokens": 5_000, "outlivesPeriod": True},
    ):
        ids.append((await http.post("/api/usage/adjustments", json=body | amount)).raise_for_status().json()["id"])
    credit, top_up = [await explained(http, event_id, userId=user) for event_id in ids]
    assert (credit["asked"], credit["held"], credit["event"]["type"]) == (None, None, "usage.adjusted")
    assert (credit["given"]["actionType"], credit["given"]["tokensUsed"]) == ("adjustment", -94)
    assert credit["given"]["metadata"] == {"reason": "invoice 7", "actor": "billing"}
    assert (credit["settled"]["countsAt"], credit["settled"]["tokensCounted"]) == ("2026-02-28T23:59:59Z", -94)
    assert credit["settled"]["countedIn"] == [
        {"period": "month", "periodStart": "2026-02-01T00:00:00Z", "resetsAt": "2026-03-01T00:00:00Z"}
    ]
    assert (top_up["settled"]["tokensCounted"], top_up["settled"]["topUpTokens"]) == (0, 5_000)


async def test_each_counts_under_the_plan_of_its_moment(http: httpx2.AsyncClient, user: str) -> None:
    before = (await ask(http, user, "Hello")).data["generationId"]
    (await http.put(f"/api/subscriptions/{user}", json={"tier": "pro"})).raise_for_status()
    after = (await ask(http, user, "Hello")).data["generationId"]
    for generation_id, tier in ((before, "free"), (after, "pro")):
        told = await explained(http, generation_id)
        assert (told["granted"]["tier"], told["settled"]["tier"]) == (tier, tier)


async def test_anothers_is_as_unknown_as_none(http: httpx2.AsyncClient, user: str) -> None:
    async with under_way(http, user) as generation_id:
        stranger = await http.get(PATH, params={"generationId": generation_id, "userId": "somebody else"})
    await explained(http, generation_id, userId=user)
    later = await http.get(PATH, params={"generationId": generation_id, "userId": "somebody else"})
    none = await http.get(PATH, params={"generationId": str(uuid4()), "userId": "somebody else"})
    assert problem_of(stranger, 404) == problem_of(later, 404) == problem_of(none, 404)
    assert user not in stranger.text + later.text


async def test_of_a_refusal_there_is_no_story_and_the_404_says_where_it_was_told(
    http: httpx2.AsyncClient, user: str
) -> None:
    await leave(http, user, 0)
    refused = await http.post("/api/chat", json=question(user))
    assert problem_of(refused, 429)["title"] == "Token limit exceeded"
    document = problem_of(await http.get(PATH, params={"generationId": str(uuid4())}), 404)
    assert document["title"] == "Generation not found"
    assert "the 429 itself said why" in document["detail"]


async def test_the_404_speaks_of_a_user_only_where_one_is_named(http: httpx2.AsyncClient, user: str) -> None:
    query = {"generationId": str(uuid4())}
    assert "this user" not in problem_of(await http.get(PATH, params=query), 404)["detail"]
    assert "for this user." in problem_of(await http.get(PATH, params={**query, "userId": user}), 404)["detail"]


@pytest.mark.parametrize("name", ["a.b.*.>", "a/b c", "../../x", "über 🛤", "x" * 128, "' OR 1=1 --", "%00"])
async def test_any_legal_id_is_asked_for_and_not_found(http: httpx2.AsyncClient, name: str) -> None:
    problem_of(await http.get(PATH, params={"generationId": name, "userId": name}), 404)


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"generationId": ""},
        {"generationId": "x" * 129},
        {"generationId": "a\nb"},
        {"generationId": "a\0b"},
        {"userId": "user_1"},
        {"generationId": "g", "userId": ""},
        {"generationId": "g", "userId": "x" * 129},
    ],
)
async def test_what_is_no_id_is_refused_in_words(http: httpx2.AsyncClient, query: dict[str, str]) -> None:
    document = problem_of(await http.get(PATH, params=query), 422)
    assert document["errors"][0]["field"] in ("generationId", "userId")


async def test_the_story_says_the_limits_as_every_answer_does(http: httpx2.AsyncClient, user: str) -> None:
    generation_id = (await ask(http, user, "Hello")).data["generationId"]
    await explained(http, generation_id)
    told = await http.get(PATH, params={"generationId": generation_id})
    unknown = await http.get(PATH, params={"generationId": "none", "userId": user})
    assert told.headers["ratelimit-policy"] == unknown.headers["ratelimit-policy"]
    assert told.headers["cache-control"] == "no-store"


# The command


async def command(stack: Stack, *arguments: str) -> Ended:
    variables = environment(CHATRAIL_DATA=str(stack.data))
    return await forked.run("services.ledger", "explain", *arguments, env=variables, apart=True)


async def test_the_command_tells_the_same_story_in_words_and_as_json(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    await leave(http, user, 600)
    generation_id = (await ask(http, user, "[usage input=20 output=8000] Hello", maxTokens=8_000)).data[
        "generationId"
    ]
    story = await explained(http, generation_id)

    as_json = await command(stack, "--id", generation_id, "--user", user, "--json")
    assert (as_json.status, as_json.err) == (0, "")
    assert json.loads(as_json.out) == story
    words = (await command(stack, "--id", generation_id)).out
    assert words.startswith(f"{generation_id}, {user}: settled\n")
    assert "8,000 of output" in words
    assert f"granted  {story['granted']['outputTokens']:,} tokens of output" in words
    assert "held     600 tokens" in words
    assert "by the plan free, in the month from" in words
    assert f"message {story['event']['streamSequence']:,} of the stream" in words


async def test_the_command_tells_of_what_is_under_way_and_keeps_anothers_to_itself(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    async with under_way(http, user) as generation_id:
        story = (await http.get(PATH, params={"generationId": generation_id})).json()
        told, strangers = await asyncio.gather(
            command(stack, "--id", generation_id, "--json"),
            command(stack, "--id", generation_id, "--user", "somebody else"),
        )
    assert json.loads(told.out) == story
    assert (strangers.status, strangers.out) == (1, "")
    assert strangers.err.startswith(f"Nothing is held or on record under {generation_id} for somebody else.")
