"""A provider that hangs, breaks off or leaves things out: people are told in time, what was given is counted once."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests.fixtures import eventually
from tests.people import Answer, ask, client_of, given, rows
from tests.proxy import full_listener
from tests.stack import Stack, free_port

IDLE_S, TOTAL_S = 1.0, 3.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One that has less patience with its provider."""
    patience = {"CHATRAIL_CLAUDE_IDLE_S": str(IDLE_S), "CHATRAIL_CLAUDE_TOTAL_S": str(TOTAL_S)}
    with Stack(tmp_path_factory.mktemp("impatient") / "data", **patience) as running:
        yield running


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(stack) as client:
        yield client


@pytest.fixture
def user() -> str:
    return f"user {uuid4()}"


async def record_of(stack: Stack, user: str) -> dict[str, Any]:
    """The one record of the user's one generation, once quota has settled it, too."""
    names = "outcome", "usage_source", "on_disconnect", "input_tokens", "output_tokens", "tokens_used"

    async def settled() -> dict[str, Any] | None:
        found = rows(stack.data / "ledger.db", f"SELECT user_id, {', '.join(names)} FROM usage")  # noqa: S608
        mine = [dict(zip(names, row[1:], strict=True)) for row in found if row[0] == user]
        assert len(mine) < 2
        is_held = (user,) in rows(stack.data / "quota.db", "SELECT user_id FROM holds")
        return mine[0] if mine and not is_held else None

    record = await eventually(settled)
    usage = await stack.usage(user)
    assert (usage["tokensUsed"], usage["tokensHeld"]) == (record["tokens_used"], 0)
    return record


async def gave(stack: Stack, tag: str) -> list[dict[str, Any]]:
    return [record for record in (await given(stack))["records"] if record.get("tag") == tag]


def problem_of(answer: Answer) -> tuple[int, str]:
    assert answer.last == "error"
    return answer.data["status"], answer.data["title"]


async def test_a_provider_silent_before_its_first_byte_is_given_up_and_the_question_is_counted(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    with pytest.raises(httpx2.HTTPStatusError) as refused:
        await ask(http, user, "Anybody there? [hang before]")
    document = json.loads(refused.value.response.content)
    assert (document["status"], document["title"]) == (504, "Claude did not answer in time")
    assert IDLE_S <= refused.value.response.elapsed.total_seconds() < TOTAL_S
    record = await record_of(stack, user)
    # Perhaps it was heard, and is billed: nobody knows, so the input is estimated.
    assert (record["outcome"], record["usage_source"], record["output_tokens"]) == ("provider_error", "estimated", 0)
    assert 0 < record["input_tokens"] < 100


@pytest.mark.parametrize(
    ("directive", "problem", "outcome"),
    [
        ("[hang middle]", (504, "Claude did not answer in time"), "provider_error"),
        ("[ping middle]", (504, "Claude took too long"), "interrupted"),
        ("[garbage middle]", (502, "Claude's answer makes no sense"), "provider_error"),
        ("[no message_delta]", None, "completed"),
    ],
)
async def test_what_a_provider_gave_before_it_went_wrong_is_counted(
    *,
    stack: Stack,
    http: httpx2.AsyncClient,
    user: str,
    directive: str,
    problem: tuple[int, str] | None,
    outcome: str,
) -> None:
    tag = uuid4().hex
    asked = f"Hello [deltas 40] [usage input=9] [cache creation=3 read=4] [tag {tag}] {directive}"
    answer = await ask(http, user, asked)
    record = await record_of(stack, user)
    (truth,) = await gave(stack, tag)
    assert answer.text
    assert (record["outcome"], record["usage_source"], record["input_tokens"]) == (outcome, "estimated", 9)
    assert record["tokens_used"] == 9 + 3 + 4 + record["output_tokens"]
    assert 0.5 < record["output_tokens"] / truth["outputTokens"] < 2
    assert problem is None or problem_of(answer) == problem


@pytest.mark.parametrize(
    ("directive", "outcome", "last"),
    [
        ("[repeat-delta-usage]", "completed", "done"),
        ("[no message_stop]", "provider_error", "error"),
        ("[split]", "completed", "done"),
    ],
)
async def test_the_providers_last_count_is_exact_however_often_it_came_and_whatever_did_not_follow(
    *, stack: Stack, http: httpx2.AsyncClient, user: str, directive: str, outcome: str, last: str
) -> None:
    tag = uuid4().hex
    asked = f"Hello [deltas 4] [usage input=9 output=100] [cache creation=3 read=4] [tag {tag}] {directive}"
    assert (await ask(http, user, asked)).last == last
    record = await record_of(stack, user)
    (truth,) = await gave(stack, tag)
    assert (record["outcome"], record["usage_source"], record["tokens_used"]) == (outcome, "provider", 116)
    assert truth["tokens"] == 116


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("directive", ["[slow 100ms] [deltas 100]", "[hang before]"])
async def test_whoever_leaves_stops_claude_also_before_the_first_word_and_without_a_stream(
    *, stack: Stack, http: httpx2.AsyncClient, user: str, accept: str, directive: str
) -> None:
    body = {"userId": user, "messages": [{"role": "user", "content": f"Hello {directive}"}]}
    with suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await http.post("/api/chat", json=body, headers={"Accept": accept})
    record = await record_of(stack, user)
    assert (record["outcome"], record["usage_source"], record["on_disconnect"]) == (
        "disconnected",
        "estimated",
        "stop",
    )
    assert record["input_tokens"] > 0
    assert record["output_tokens"] < 100


# A provider of the test's own


@pytest.fixture(scope="module")
def other_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, other_port: int) -> Iterator[Stack]:
    """A stack whose provider is the test's own."""
    named = {"ANTHROPIC_API_KEY": "any", "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{other_port}"}
    data = tmp_path_factory.mktemp("elsewhere") / "data"
    with Stack(data, CHATRAIL_CLAUDE_TOTAL_S="1.5", **named) as running:
        yield running


@asynccontextmanager
async def saying(port: int, *events: dict[str, Any]) -> AsyncIterator[None]:
    """A provider that answers every question with these."""
    frames = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{frames}".encode())
        writer.write_eof()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    yield
    server.close()
    await server.wait_closed()


TEXT = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Four words and more."}}
END = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
STOP = {"type": "message_stop"}


async def test_a_provider_that_counts_in_its_first_word_alone_is_believed(
    elsewhere: Stack, other_port: int, user: str
) -> None:
    usage = {"input_tokens": 9, "output_tokens": 50}
    begins = {"type": "message_start", "message": {"model": "m" * 129, "usage": usage}}
    async with saying(other_port, begins, TEXT, END, STOP), client_of(elsewhere) as http:
        answer = await ask(http, user, "Hello")
    assert (answer.last, answer.data["tokensUsed"]) == ("done", 59)
    record = await record_of(elsewhere, user)
    assert (record["outcome"], record["usage_source"], record["tokens_used"]) == ("completed", "provider", 59)


async def test_a_count_behind_the_stop_reason_is_the_last_whether_it_repeats_the_reason_or_not(
    elsewhere: Stack, other_port: int, user: str
) -> None:
    begins = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}
    counts = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 2}}
    ends = END | {"usage": {"output_tokens": 1}}
    async with saying(other_port, begins, TEXT, ends, counts), client_of(elsewhere) as http:
        assert (await ask(http, user, "Hello")).last == "error"
    record = await record_of(elsewhere, user)
    assert (record["usage_source"], record["tokens_used"]) == ("provider", 11)


async def test_of_an_answer_that_breaks_off_what_claude_thought_is_estimated_as_well(
    elsewhere: Stack, other_port: int, user: str
) -> None:
    begins = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}
    thinks = {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "x" * 40}}
    async with saying(other_port, begins, thinks, TEXT), client_of(elsewhere) as http:
        assert (await ask(http, user, "Hello")).last == "error"
    record = await record_of(elsewhere, user)
    assert (record["usage_source"], record["input_tokens"], record["output_tokens"]) == ("estimated", 9, 60 // 4)


async def test_a_reader_hears_of_the_start_first_also_where_the_provider_does_not_tell_of_it(
    elsewhere: Stack, other_port: int, user: str
) -> None:
    async with saying(other_port, TEXT, END, STOP), client_of(elsewhere) as http:
        body = {"userId": user, "messages": [{"role": "user", "content": "Hello"}], "model": "claude-haiku-4-5"}
        told = (await http.post("/api/chat", json=body)).text
    names = [line.removeprefix("event: ") for line in told.splitlines() if line.startswith("event: ")]
    assert names == ["start", "delta", "usage", "done"]
    assert '"model":"claude-haiku-4-5"' in told.partition("\n\n")[0]
    record = await record_of(elsewhere, user)
    assert (record["outcome"], record["usage_source"], record["output_tokens"]) == ("completed", "estimated", 5)


async def test_a_failure_that_comes_together_with_a_ping_is_told_once_it_is_settled(
    elsewhere: Stack, other_port: int, user: str
) -> None:
    fails = {"type": "error", "error": {"type": "overloaded_error"}}
    async with saying(other_port, {"type": "ping"}, fails), client_of(elsewhere) as http:
        body = {"userId": user, "messages": [{"role": "user", "content": "Hello"}]}
        answer = await http.post("/api/chat", json=body)
        usage = (await http.get("/api/usage", params={"userId": user})).json()
    assert (answer.status_code, answer.json()["title"]) == (503, "Claude is overloaded")
    assert answer.headers["RateLimit"].startswith('"monthly";r=108000;')
    assert (usage["tokensUsed"], usage["tokensHeld"]) == (0, 0)


@pytest.mark.parametrize(("patience_s", "outcome"), [(0.5, "disconnected"), (10, "interrupted")])
async def test_a_question_that_was_never_sent_costs_nothing(
    elsewhere: Stack, other_port: int, user: str, *, patience_s: float, outcome: str
) -> None:
    async with client_of(elsewhere) as http:
        with full_listener(other_port):
            body = {"userId": user, "messages": [{"role": "user", "content": "Is there anybody?"}]}
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    answer = await http.post("/api/chat", json=body)
                    assert answer.status_code == 504
                    assert "Nothing was spent" in answer.json()["detail"]
            record = await record_of(elsewhere, user)
    assert (record["outcome"], record["usage_source"], record["tokens_used"]) == (outcome, "provider", 0)


async def test_of_readers_who_leave_at_any_moment_those_pay_whose_question_was_sent(
    elsewhere: Stack, other_port: int
) -> None:
    heard: set[str] = set()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"user ")
            heard.add((await reader.readuntil(b"!")).decode())
            await reader.read()
        writer.close()

    users = [f"{uuid4()}!" for _ in range(60)]
    server = await asyncio.start_server(hear, "127.0.0.1", other_port)
    async with client_of(elsewhere) as http:

        async def leave(user: str, after_s: float) -> None:
            body = {"userId": user, "messages": [{"role": "user", "content": f"user {user}"}]}
            with suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    await http.post("/api/chat", json=body)

        await asyncio.gather(*(leave(user, n / 50) for n, user in enumerate(users)))

    async def those_pay_who_were_heard() -> bool:
        is_over = not rows(elsewhere.data / "outbox.db", "SELECT event_id FROM outbox")
        paid = {user for (user,) in rows(elsewhere.data / "ledger.db", "SELECT user_id FROM usage WHERE tokens_used")}
        return is_over and bool(heard) and paid & {*users} == heard

    await eventually(those_pay_who_were_heard)
    server.close()
    await server.wait_closed()
