"""Near the limit: nobody overspends, nobody honest is refused, and every convention says the same."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from nats.aio.msg import Msg

from shared import streams
from shared.broker import connect
from tests.fixtures import eventually
from tests.people import asked, given, open_holds, recorded, rows, totalled
from tests.stack import Stack

PLANS = """
default = "free"
[plans.free]
limit_tokens = 108_000
period = "month"
upgrade_to = "team"
[plans.team]
limits = [{ limit_tokens = 20_000, period = "day" }, { limit_tokens = 108_000, period = "none" }]
[plans.single]
limit_tokens = 108_000
period = "month"
concurrent_generations_max = 1
[plans.unlimited]
period = "month"
"""
CROWD = 240


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "plans.toml").write_text(PLANS)
    with Stack(folder / "data", CHATRAIL_PLANS=str(folder / "plans.toml")) as stack:
        yield stack


@pytest.fixture
async def http(limited: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=CROWD)
    async with httpx2.AsyncClient(
        base_url=limited.url, trust_env=False, verify=False, timeout=120, limits=limits
    ) as client:
        yield client


@pytest.fixture
def user() -> str:
    return f"user {uuid4()}"


async def with_left(http: httpx2.AsyncClient, user: str, left: int) -> None:
    body = {"userId": user, "actionType": "chat_generation", "tokensUsed": 108_000 - left}
    (await http.post("/api/usage", json=body)).raise_for_status()


async def subscribe(http: httpx2.AsyncClient, user: str, tier: str) -> None:
    (await http.put(f"/api/subscriptions/{user}", json={"tier": tier})).raise_for_status()


async def ask(http: httpx2.AsyncClient, user: str, text: str, **fields: Any) -> httpx2.Response:
    body = {"userId": user, "messages": [{"role": "user", "content": text}], **fields}
    return await http.post("/api/chat", json=body, headers={"Accept": "application/json"})


async def usage(http: httpx2.AsyncClient, user: str) -> dict[str, Any]:
    body: dict[str, Any] = (await http.get("/api/usage", params={"userId": user})).json()
    return body


@pytest.mark.parametrize(
    ("text", "max_tokens"),
    [
        ("[usage input=30 output=170] [deltas 2] Hello", None),
        ("[usage input=40 output=4000] [deltas 2] Hello", 2_000),
    ],
    ids=["short answers", "answers as long as they may be"],
)
async def test_a_crowd_on_one_user_uses_what_is_left_and_no_more(
    limited: Stack, http: httpx2.AsyncClient, user: str, text: str, max_tokens: int | None
) -> None:
    await with_left(http, user, 8_000)
    before = (await given(limited))["tokens"]
    fields = {"maxTokens": max_tokens} if max_tokens else {}

    answers = await asyncio.gather(*(ask(http, user, text, **fields) for _ in range(CROWD)))

    used = (await given(limited))["tokens"] - before
    assert 6_000 <= used <= 8_000
    assert set(Counter(answer.status_code for answer in answers)) == {200, 429}

    async def settled() -> dict[str, Any] | None:
        body = await usage(http, user)
        return body if not body["tokensHeld"] and not open_holds(limited) else None

    assert (await eventually(settled))["tokensUsed"] == 100_000 + used
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) == int(refused.headers["ratelimit"].rpartition("t=")[2])


async def test_little_left_is_answered_and_cut_short(http: httpx2.AsyncClient, user: str) -> None:
    await with_left(http, user, 600)
    answer = await ask(http, user, "[usage input=20 output=8000] Hello", maxTokens=8_000)
    assert answer.status_code == 200
    assert answer.json()["limitReached"] is True
    assert 64 <= answer.json()["outputTokens"] <= 580


async def test_a_long_prompt_is_admitted_by_its_tokens_not_by_its_bytes(http: httpx2.AsyncClient, user: str) -> None:
    await with_left(http, user, 10_000)
    text = "[usage input=6000 output=100] " + "four" * 6_000
    answer = await ask(http, user, text)
    assert answer.status_code == 200
    assert answer.json()["inputTokens"] == 6_000


async def test_who_would_fit_if_another_answer_were_over_waits_for_it(
    limited: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    await subscribe(http, user, "single")
    answers = await asyncio.gather(*(ask(http, user, "[usage input=10 output=20] Hello") for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert (await usage(http, user))["tokensUsed"] == 5 * 30


async def test_for_who_leaves_the_line_claude_is_not_asked(
    limited: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    await subscribe(http, user, "single")
    before = await asked(limited)
    body = {
        "userId": user,
        "messages": [{"role": "user", "content": "[usage input=10 output=20] [deltas 8] [slow 200ms] Hello"}],
    }
    async with http.stream("POST", "/api/chat", json=body) as first:
        words = first.aiter_lines()
        await anext(words)
        waiting = asyncio.create_task(ask(http, user, "Hello"))

        async def is_in_line() -> bool | None:
            return (
                rows(limited.data / "outbox.db", "SELECT count(*) FROM outbox WHERE NOT settled")[0][0] == 2 or None
            )

        await eventually(is_in_line)
        waiting.cancel()
        await asyncio.wait([waiting])
        async for _ in words:
            pass
    assert (await ask(http, user, "[usage input=10 output=20] Hello")).status_code == 200
    assert await asked(limited) == before + 2


async def test_every_answer_for_a_user_says_the_limits(http: httpx2.AsyncClient, user: str) -> None:
    await with_left(http, user, 99_906)
    credit = {"userId": user, "tokensUsed": -1, "reason": "goodwill", "actor": "support"}
    charge = credit | {"tokensUsed": 1}
    assert (
        (await http.post("/api/usage/adjustments", json=credit)).headers["ratelimit"].startswith('"monthly";r=99907;')
    )
    answers = [
        await http.post("/api/usage/adjustments", json=charge),
        await http.get("/api/usage", params={"userId": user}),
        await http.get("/api/usage/history", params={"userId": user}),
        await http.get("/api/usage/logs", params={"userId": user}),
        await http.get("/api/usage/logs", params={"userId": user}, headers={"Accept": "text/csv"}),
    ]
    left = [99_906] * len(answers)
    answers.append(answered := await ask(http, user, "Hello"))
    async with http.stream("GET", "/api/usage/events", params={"userId": user}) as watching:
        answers.append(watching)
    # Of an answer as a document, those after it.
    left += [answered.json()["usage"]["tokensRemaining"]] * 2
    for answer, remaining in zip(answers, left, strict=True):
        assert re.fullmatch(r'"monthly";q=108000;w=\d+', answer.headers["ratelimit-policy"])
        assert re.fullmatch(rf'"monthly";r={remaining};t=\d+', answer.headers["ratelimit"])
    assert left[-1] < 99_906


async def test_a_refusal_says_the_same_in_every_convention(http: httpx2.AsyncClient, user: str) -> None:
    await with_left(http, user, 0)
    refused = await ask(http, user, "Hello")
    reset = int(re.fullmatch(r'"monthly";r=0;t=(\d+)', refused.headers["ratelimit"])[1])  # type: ignore[index]
    assert refused.status_code == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) == reset
    assert refused.json()["tokensRemaining"] == 0


WORDS = "several words of a question that is long " * 20_000


async def test_a_question_that_the_whole_plan_has_no_room_for_is_told_what_helps_and_no_time(
    limited: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    before = (await given(limited))["messageRequests"]
    refused = await ask(http, user, WORDS)
    document = refused.json()
    assert (refused.status_code, document["title"]) == (429, "Token limit exceeded")
    assert document["detail"].startswith("Upgrade to Team, or shorten the conversation")
    assert "retry-after" not in refused.headers
    assert refused.headers["ratelimit"].startswith('"monthly";r=108000;')
    assert document["tokensRemaining"] == 108_000
    await subscribe(http, user, "team")
    assert (await ask(http, user, WORDS)).json()["detail"].startswith("Shorten the conversation")
    assert (await given(limited))["messageRequests"] == before


async def test_a_question_that_fits_into_the_plan_and_not_into_the_rest_is_told_when_it_will(
    http: httpx2.AsyncClient, user: str
) -> None:
    await with_left(http, user, 1_000)
    # By its bytes it is larger than the plan; counted it is not.
    refused = await ask(http, user, WORDS[:200_000])
    assert (refused.status_code, refused.json()["detail"]) == (429, "Upgrade to Team")
    assert int(refused.headers["retry-after"]) > 0


async def test_every_other_refusal_tells_the_limits_too(http: httpx2.AsyncClient, user: str) -> None:
    charge = {"userId": user, "tokensUsed": 1, "reason": "one", "actor": "support"}
    key = {"Idempotency-Key": user}
    await http.post("/api/usage/adjustments", json=charge, headers=key)
    report = {"userId": user, "actionType": "chat_generation", "tokensUsed": 1}
    await http.post("/api/usage", json=report, headers=key)
    refused = [
        await http.post("/api/usage/adjustments", json=charge | {"tokensUsed": 2}, headers=key),
        await http.post("/api/usage", json=report | {"tokensUsed": 2}, headers=key),
        await http.put(f"/api/subscriptions/{user}", json={"tier": "unheard of"}),
        await ask(http, user, "Hello", model="unheard-of"),
        await ask(http, user, "[fail 529]"),
        await ask(http, user, "[fail middle]"),
    ]
    assert [answer.status_code for answer in refused] == [409, 409, 422, 400, 503, 503]
    for answer in refused:
        assert answer.headers["ratelimit"].startswith('"monthly";r='), answer.text


async def test_several_limits_are_all_told_and_an_unlimited_plan_has_none(
    http: httpx2.AsyncClient, user: str
) -> None:
    await subscribe(http, user, "team")
    told = (await http.get("/api/usage", params={"userId": user})).headers
    assert re.fullmatch(r'"daily";q=20000;w=86400, "total";q=108000', told["ratelimit-policy"])
    assert re.fullmatch(r'"daily";r=20000;t=\d+, "total";r=108000', told["ratelimit"])
    assert (await usage(http, user))["period"] == "day"
    await subscribe(http, user, "unlimited")
    told = (await http.get("/api/usage", params={"userId": user})).headers
    assert not {"ratelimit", "ratelimit-policy"} & set(told)


async def test_each_threshold_is_announced_once(limited: Stack, http: httpx2.AsyncClient, user: str) -> None:
    nats = await connect(limited.endpoints["nats"], name="test")
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        event = httpx2.Response(200, content=message.data).json()
        if event["subject"] == user:
            heard.put_nowait(event)

    await nats.subscribe(streams.THRESHOLD_REACHED, cb=hear)
    await nats.flush()
    await with_left(http, user, 21_600)
    first = await asyncio.wait_for(heard.get(), 20)
    await asyncio.gather(*(ask(http, user, "[usage input=10 output=20] Hello") for _ in range(10)))
    body = {"userId": user, "actionType": "chat_generation", "tokensUsed": 21_600}
    (await http.post("/api/usage", json=body)).raise_for_status()
    second = await asyncio.wait_for(heard.get(), 20)
    await nats.close()

    assert (first["type"], first["data"]["percent"]) == ("quota.threshold.reached", 80)
    assert (first["data"]["tokens_used"], first["data"]["tokens_limit"]) == (86_400, 108_000)
    assert second["data"]["percent"] == 100
    assert heard.empty()


async def test_a_top_up_is_there_at_once_after_the_plans_tokens(http: httpx2.AsyncClient, user: str) -> None:
    await with_left(http, user, 0)
    body = {"userId": user, "topUpTokens": 5_000, "reason": "invoice 7", "actor": "billing"}
    (await http.post("/api/usage/adjustments", json=body)).raise_for_status()
    shown = await usage(http, user)
    assert (shown["tokensLimit"], shown["tokensRemaining"]) == (113_000, 5_000)
    assert (await ask(http, user, "Hello")).status_code == 200


async def test_in_the_end_the_ledger_and_the_totals_agree(limited: Stack) -> None:
    async def agree() -> bool | None:
        return recorded(limited) == totalled(limited) or None

    assert await eventually(agree)
