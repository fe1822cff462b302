"""Chat's side of Claude's API: models, bounds before asking, and how what the provider says is understood."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.claude.requests import CountTokensRequest
from services.chat import claude as claude_module
from services.chat.claude import KNOWN, RETIRED, Claude, Prompt
from services.chat.claude_problems import ProviderError
from services.chat.claude_stream import EVENT_BYTES_MAX, Finished, Ping, Started, Stream, Text, Unseen
from services.chat.metering import estimate_tokens
from services.chat.problems import Problem
from shared.events import TokenCounts
from tests.fixtures import eventually
from tests.proxy import full_listener

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
QUESTIONS = st.lists(TEXT.map(lambda text: {"role": "user", "content": text}), min_size=1, max_size=5)
MODEL = "claude-haiku-4-5"
ASKED: list[dict[str, str]] = [{"role": "user", "content": "Hello"}]
PROMPT = Prompt(MODEL, ASKED, None, 100)
TODAY = datetime.now(UTC).date()


@asynccontextmanager
async def provider(*answers: bytes, holds_on: bool = False) -> AsyncIterator[Claude]:
    """Chat's client of a provider that gives these answers, one a request, and then closes, or waits for chat to."""
    left, ended = [*answers], asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.lower().splitlines() if line.startswith(b"content-length:")), b":0")
        await reader.readexactly(int(length.partition(b":")[2]))
        writer.write(left.pop(0))
        await writer.drain()
        if holds_on:
            await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{port}")
    try:
        yield claude
    finally:
        await claude.close()
        if holds_on:
            await ended.wait()
        server.close()
        await server.wait_closed()


def answer(status: int, content_type: str, body: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"content-type: {content_type}", "connection: close", *headers, "", body]
    return "\r\n".join(lines).encode()


def said(*events: dict[str, Any]) -> bytes:
    """A stream of events, and the end of the connection."""
    frames = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return answer(200, "text/event-stream", "".join(frames), "request-id: req_1")


def refusal(status: int, message: str = "no", *headers: str) -> bytes:
    body = json.dumps({"type": "error", "error": {"type": "any_error", "message": message}})
    return answer(status, "application/json", body, *headers)


def start(**usage: Any) -> dict[str, Any]:
    return {"type": "message_start", "message": {"model": f"{MODEL}-20251001", "usage": usage}}


def text(content: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": content}}


def last(stop_reason: str | None = "end_turn", **usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": usage}


STOP, PING = {"type": "message_stop"}, {"type": "ping"}


async def read(stream: Stream, steps: list[object]) -> None:
    async with aclosing(stream.steps()) as arriving:
        async for arrived in arriving:
            assert arrived, "with the first of them the reader is told that Claude has begun"
            steps += arrived


async def steps_of(answered: bytes, *, holds_on: bool = False) -> list[object]:
    steps: list[object] = []
    async with provider(answered, holds_on=holds_on) as claude:
        await read(claude.stream(PROMPT), steps)
    return steps


@dataclass
class Failed:
    """A stream that did not come to its end: what it said until then, and how that is told."""

    stream: Stream
    problem: Problem
    steps: list[object]

    @property
    def told(self) -> tuple[int, str]:
        return self.problem.status, self.problem.document["title"]


async def failure_of(answered: bytes) -> Failed:
    steps: list[object] = []
    async with provider(answered) as claude:
        stream = claude.stream(PROMPT)
        with pytest.raises(ProviderError) as failure:
            await read(stream, steps)
    return Failed(stream, failure.value.problem, steps)


# Models


async def test_a_retired_model_gives_its_successor_without_asking_anybody() -> None:
    async with provider() as claude:
        for model, (day, successor) in RETIRED.items():
            assert await claude.resolve(model) == (successor if day <= TODAY else model)


async def test_what_older_front_ends_send_becomes_the_haiku_of_today() -> None:
    async with provider() as claude:
        for model in ("claude-3-haiku-20240307", "claude-3-5-haiku-20241022"):
            assert await claude.resolve(model) == "claude-haiku-4-5"


def test_no_successor_is_unknown_or_on_its_way_out() -> None:
    successors = {successor for _, successor in RETIRED.values()}
    assert successors <= KNOWN - RETIRED.keys()


async def test_a_known_model_is_itself_without_asking_anybody() -> None:
    async with provider() as claude:
        for model in KNOWN - RETIRED.keys():
            assert await claude.resolve(model) == model


async def test_a_model_that_came_out_later_is_found_at_the_provider_which_is_asked_once_in_a_while() -> None:
    model = {"id": "claude-next", "type": "model", "display_name": "Next", "created_at": "2030-01-01T00:00:00Z"}
    listed = {"data": [model], "has_more": False}
    async with provider(answer(200, "application/json", json.dumps(listed))) as claude:
        assert await claude.resolve("claude-next") == "claude-next"
        assert await claude.resolve("claude-next") == "claude-next"
        with pytest.raises(Problem):
            await claude.resolve("claude-never")


async def test_a_model_that_nobody_knows_is_refused_with_the_known_ones() -> None:
    async with provider(refusal(500)) as claude:
        with pytest.raises(Problem) as refused:
            await claude.resolve("gpt-4")
    document = refused.value.document
    assert (document["status"], document["title"]) == (400, "Unknown model")
    assert document["models"] == sorted(KNOWN)
    assert all(model in document["detail"] for model in KNOWN)


# Bounds


@given(QUESTIONS, st.none() | TEXT)
def test_the_bound_by_bytes_is_never_below_what_the_provider_counts(
    messages: list[dict[str, str]], system: str | None
) -> None:
    asked = {"model": MODEL, "messages": messages, **({"system": system} if system else {})}
    counted = CountTokensRequest.parse(json.dumps(asked).encode()).tokens
    assert counted <= Prompt(MODEL, messages, system, 1).input_tokens_max


@given(QUESTIONS, st.none() | TEXT)
def test_an_estimate_of_the_input_lies_within_its_bound(messages: list[dict[str, str]], system: str | None) -> None:
    prompt = Prompt(MODEL, messages, system, 1)
    assert 0 < prompt.input_tokens_estimate <= prompt.input_tokens_max


def test_four_bytes_are_estimated_as_a_token_and_what_is_begun_counts() -> None:
    assert [estimate_tokens(size) for size in (0, 1, 4, 5, 400)] == [0, 1, 1, 2, 100]


@pytest.mark.parametrize(("counted", "held"), [(0, 16), (10, 26), (40, 56), (50, 67), (80, 85)])
async def test_the_providers_count_gets_room_for_its_error_and_stays_below_the_bound(counted: int, held: int) -> None:
    assert PROMPT.input_tokens_max == 85
    async with provider(answer(200, "application/json", json.dumps({"input_tokens": counted}))) as claude:
        assert await claude.count_input_tokens(PROMPT) == held


@pytest.mark.parametrize(
    "answered",
    [
        *map(refusal, (400, 404, 405, 413)),
        *(
            answer(200, "application/json", body)
            for body in ("{}", "[]", '{"input_tokens": -7}', '{"input_tokens": "x"}')
        ),
        answer(200, "text/html", "<h1>A proxy's page</h1>"),
    ],
)
async def test_a_provider_that_does_not_count_gives_none(answered: bytes) -> None:
    async with provider(answered) as claude:
        assert await claude.count_input_tokens(PROMPT) is None


@pytest.mark.parametrize(
    ("answered", "status", "retry_after"),
    [
        (refusal(529, "no", "retry-after: 7"), 503, "7"),
        (refusal(429), 503, "5"),
        (refusal(500), 502, None),
        (refusal(401), 502, None),
        (b"", 502, None),
    ],
)
async def test_a_provider_that_cannot_count_now_is_told_as_one_that_cannot_answer(
    answered: bytes, status: int, retry_after: str | None
) -> None:
    async with provider(answered) as claude:
        with pytest.raises(Problem) as problem:
            await claude.count_input_tokens(PROMPT)
    assert (problem.value.status, problem.value.headers.get("Retry-After")) == (status, retry_after)


async def test_a_provider_that_is_silent_when_it_should_count_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claude_module, "COUNT_TIMEOUT_S", 0.1)
    with full_listener() as port:
        claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{port}")
        with pytest.raises(Problem) as problem:
            await claude.count_input_tokens(PROMPT)
        await claude.close()
    assert problem.value.status == 504


async def test_the_operators_model_is_known_whatever_the_provider_lists() -> None:
    claude = Claude(api_key="any", base_url="http://127.0.0.1:9", model="a-gateways-own")
    assert await claude.resolve("a-gateways-own") == "a-gateways-own"
    with pytest.raises(Problem) as refused:
        await claude.resolve("another")
    assert refused.value.document["models"] == sorted(KNOWN | {"a-gateways-own"})
    await claude.close()


# Claude's stream


async def test_steps_are_the_model_its_words_and_its_last_count() -> None:
    steps = await steps_of(
        said(
            start(input_tokens=7, output_tokens=1, cache_creation_input_tokens=100, cache_read_input_tokens=200),
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            PING,
            text("Hello"),
            {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "x"}},
            {"type": "an_event_of_next_year", "delta": 7},
            text(" 🛤"),
            last(output_tokens=9),
            STOP,
        )
    )
    cached = {"cache_creation_input_tokens": 100, "cache_read_input_tokens": 200}
    assert steps == [
        Started(f"{MODEL}-20251001", TokenCounts(input_tokens=7, output_tokens=1, **cached)),
        Ping(),
        Text("Hello"),
        Text(" 🛤"),
        Finished(TokenCounts(input_tokens=7, output_tokens=9, **cached), "end_turn"),
    ]


@pytest.mark.parametrize("model", ["", "m" * 129, "a\x00b", None, 7, ["m"]])
async def test_a_model_that_cannot_be_named_is_the_one_that_was_asked(model: object) -> None:
    odd = {"type": "message_start", "message": {"model": model, "usage": {"input_tokens": 7}}}
    steps = await steps_of(said(odd, text("Hello"), last(output_tokens=9), STOP))
    assert steps[0] == Started(MODEL, TokenCounts(input_tokens=7))


@pytest.mark.parametrize(
    "events", [[PING, text("Hel"), text("lo"), last(output_tokens=9)], [last(output_tokens=9)], []]
)
async def test_an_answer_without_a_beginning_begins_with_the_model_that_was_asked(
    events: list[dict[str, Any]],
) -> None:
    steps = await steps_of(said(*events, STOP))
    assert next(step for step in steps if step != Ping()) == Started(MODEL, None)
    assert sum(isinstance(step, Started) for step in steps) == 1


async def test_an_answer_begins_once() -> None:
    steps = await steps_of(said(start(input_tokens=7), text("Hel"), start(input_tokens=1), text("lo"), STOP))
    assert steps[1:] == [Text("Hel"), Text("lo")]


async def test_what_fails_after_words_without_a_beginning_gave_something() -> None:
    error = {"type": "error", "error": {"type": "api_error"}}
    assert not (await failure_of(said(text("Hel"), error))).stream.gave_nothing
    assert (await failure_of(said(PING, error))).stream.gave_nothing


NESTED = '{"delta":' * 5_000 + "{" + "}" * 5_001


@pytest.mark.parametrize("kind", ["message_start", "content_block_start", "content_block_delta", "message_delta"])
async def test_an_event_that_is_nested_too_deep_makes_no_sense(kind: str) -> None:
    events = said(start(input_tokens=7)) if kind != "message_start" else said(PING)
    failed = await failure_of(events + f"event: {kind}\ndata: {NESTED}\n\n".encode())
    assert failed.told == (502, "Claude's answer makes no sense")


async def test_what_is_nested_too_deep_is_no_count_and_no_list() -> None:
    async with provider(*[answer(200, "application/json", NESTED)] * 2) as claude:
        assert await claude.count_input_tokens(PROMPT) is None
        with pytest.raises(Problem):
            await claude.resolve("claude-next")


@pytest.mark.parametrize(("encoding", "packed"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_an_answer_that_was_packed_on_the_way_is_unpacked(
    encoding: str, packed: Callable[[bytes], bytes]
) -> None:
    head, _, body = said(start(input_tokens=7), text("Hello"), last(output_tokens=9), STOP).partition(b"\r\n\r\n")
    head += b"\r\ncontent-encoding: " + encoding.encode() + b"\r\n\r\n"
    assert (await steps_of(head + packed(body)))[1:] == [
        Text("Hello"),
        Finished(TokenCounts(input_tokens=7, output_tokens=9), "end_turn"),
    ]
    assert (await failure_of(head + body)).told == (502, "Claude's answer makes no sense")


async def test_words_with_which_a_block_begins_are_passed_on() -> None:
    blocks = [
        {"type": "text", "text": "First "},
        {"type": "thinking", "text": "not for the reader"},
        {"type": "text", "text": ""},
        {"type": "an_odd_one"},
    ]
    begun = [{"type": "content_block_start", "index": n, "content_block": block} for n, block in enumerate(blocks)]
    steps = await steps_of(said(start(input_tokens=7), *begun, text("second"), last(output_tokens=9), STOP))
    assert [step for step in steps if isinstance(step, Text)] == [Text("First "), Text("second")]


@pytest.mark.parametrize(
    "behind",
    [
        said(text("more"), last(output_tokens=500)),
        said({"type": "error", "error": {"type": "overloaded_error"}}),
        b"event: message_delta\ndata: {nonsense\n\n",
        b"x" * (EVENT_BYTES_MAX + 1),
    ],
)
async def test_what_comes_behind_claudes_last_word_is_nothing_also_in_one_piece_with_it(behind: bytes) -> None:
    frames = said(start(input_tokens=7), text("Hello"), last(output_tokens=9), STOP)
    steps = await steps_of(frames + behind.rpartition(b"\r\n\r\n")[2])
    assert steps[1:] == [Text("Hello"), Finished(TokenCounts(input_tokens=7, output_tokens=9), "end_turn")]


async def test_what_claude_thinks_and_asks_of_tools_is_output_that_is_not_shown() -> None:
    deltas = [
        {"type": "thinking_delta", "thinking": "Let me see"},
        {"type": "input_json_delta", "partial_json": '{"query":'},
        {"type": "thinking_delta", "thinking": ["odd"]},
        {"type": "signature_delta", "signature": "x"},
    ]
    wrote = [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
    steps = await steps_of(said(start(input_tokens=7), *wrote, last(output_tokens=9), STOP))
    assert steps[1:-1] == [Unseen("Let me see"), Unseen('{"query":')]


@pytest.mark.parametrize("holds_on", [True, False])
async def test_behind_claudes_last_word_nothing_is_waited_for_and_nothing_can_fail(holds_on: bool) -> None:
    frames = said(start(input_tokens=7), text("Hello"), last(output_tokens=9), STOP)
    never_whole = frames.replace(b"connection: close", b"content-length: 100000", 1)
    steps = await steps_of(never_whole, holds_on=holds_on)
    assert steps[-1] == Finished(TokenCounts(input_tokens=7, output_tokens=9), "end_turn")


async def test_what_came_with_nonsense_in_one_piece_was_given() -> None:
    nonsense = b"event: content_block_delta\ndata: {nonsense\n\n"
    failed = await failure_of(said(start(input_tokens=7), text("Hel"), last(None, output_tokens=5)) + nonsense)
    assert failed.steps[1:] == [Text("Hel"), Finished(TokenCounts(input_tokens=7, output_tokens=5), None)]


@pytest.mark.parametrize("usage", [{}, {"usage": {}}, {"usage": {"input_tokens": 7, "output_tokens": None}}])
async def test_where_the_last_word_names_no_count_the_one_before_stands(usage: dict[str, Any]) -> None:
    unnamed = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, **usage}
    steps = await steps_of(said(start(input_tokens=7, output_tokens=1), last(None, output_tokens=5), unnamed, STOP))
    assert steps[1:] == [Finished(TokenCounts(input_tokens=7, output_tokens=5), None), Finished(None, "end_turn")]


@pytest.mark.parametrize(
    ("told", "kept"), [("req_9", "req_9"), ("a\tb", None), ("\x85", None), ("r" * 200, "r" * 128)]
)
async def test_a_request_id_is_kept_where_an_event_can_have_it(told: str, kept: str | None) -> None:
    answered = said(start(input_tokens=7), last(output_tokens=9), STOP).replace(b"req_1", told.encode("latin-1"))
    async with provider(answered) as claude:
        stream = claude.stream(PROMPT)
        await read(stream, [])
    assert stream.request_id == kept


async def test_a_later_count_replaces_an_earlier_one_and_what_it_leaves_out_stays() -> None:
    steps = await steps_of(
        said(
            start(input_tokens=7, output_tokens=1),
            last(None, output_tokens=5),
            last(None, output_tokens=9, input_tokens=8, cache_read_input_tokens=None),
            last("refusal", output_tokens=9),
            STOP,
        )
    )
    assert steps[-1] == Finished(TokenCounts(input_tokens=8, output_tokens=9), "refusal")


@pytest.mark.parametrize(
    ("status", "problem", "title"),
    [
        (400, 400, "Claude refuses the request"),
        (401, 502, "Claude refuses our key"),
        (402, 502, "Claude refuses our account"),
        (403, 502, "Claude refuses our key"),
        (404, 400, "Model not available"),
        (408, 503, "Claude cannot answer now"),
        (409, 503, "Claude cannot answer now"),
        (425, 503, "Claude cannot answer now"),
        (413, 413, "Conversation too long"),
        (422, 400, "Claude refuses the request"),
        (429, 503, "Claude is limiting our rate"),
        (500, 502, "Claude failed"),
        (503, 503, "Claude is overloaded"),
        (504, 502, "Claude failed"),
        (529, 503, "Claude is overloaded"),
    ],
)
async def test_a_refusal_of_the_providers_is_told_in_words(status: int, problem: int, title: str) -> None:
    failed = await failure_of(refusal(status, "why", "request-id: req_2"))
    document = failed.problem.document
    assert (document["status"], document["title"]) == (problem, title)
    assert document["detail"].endswith((".", "why"))
    assert failed.stream.request_id == "req_2"
    assert failed.stream.gave_nothing
    assert ("Retry-After" in failed.problem.headers) == (problem == 503)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("retry-after: 17", "17"),
        ("retry-after: 007", "7"),
        ("retry-after: 0", "1"),
        ("retry-after: 86400", "3600"),
        ("retry-after: soon", "5"),
        ("retry-after: -1", "5"),
        ("retry-after: 1.5", "5"),
        ("retry-after: ²", "5"),
        (f"retry-after: {'9' * 40}", "5"),
        (f"retry-after: {'9' * 5000}", "5"),
        ("x: y", "5"),
    ],
)
async def test_a_busy_provider_is_asked_again_when_it_says(header: str, seconds: str) -> None:
    problem = (await failure_of(refusal(429, "busy", header))).problem
    assert problem.headers["Retry-After"] == seconds
    assert problem.document["detail"] == f"Try again in {seconds} second{'s' if seconds != '1' else ''}."


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('{"error": {"message": "max_tokens: too large"}}', "max_tokens: too large"),
        (json.dumps({"error": {"message": "x" * 200_000}}), "x" * 499 + "…"),
        ('{"error": {"message": {"a": 1}}}', "The provider found the request invalid."),
        ('{"error": {"message": ""}}', "The provider found the request invalid."),
        ('{"error": "no"}', "The provider found the request invalid."),
        ("<h1>A proxy's page</h1>", "The provider found the request invalid."),
        ("[" * 100_000, "The provider found the request invalid."),
        ("", "The provider found the request invalid."),
    ],
)
async def test_the_providers_own_words_are_passed_on_where_they_are_words(body: str, detail: str) -> None:
    failed = await failure_of(answer(400, "application/json", body))
    assert failed.told == (400, "Claude refuses the request")
    assert failed.problem.document["detail"] == detail


@pytest.mark.parametrize("headers", ["content-length: 100", "content-encoding: gzip", "content-length: 9"])
async def test_a_refusal_is_one_whatever_becomes_of_its_words(headers: str) -> None:
    failed = await failure_of(answer(529, "application/json", "not whole", headers))
    assert failed.told == (503, "Claude is overloaded")
    assert failed.stream.gave_nothing


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_refusal_and_nothing_is_sent_to_where_it_leads(status: int) -> None:
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    elsewhere = f"location: http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/messages"
    for location in (elsewhere, "location: /v1/messages", "location: http://[no address", "x: y"):
        failed = await failure_of(refusal(status, "moved", location))
        assert failed.told == (502, "Claude is at another address")
        assert "ANTHROPIC_BASE_URL" in failed.problem.document["detail"]
        assert failed.stream.gave_nothing
        async with provider(refusal(status, "moved", location), refusal(status, "moved", location)) as claude:
            with pytest.raises(Problem):
                await claude.count_input_tokens(PROMPT)
            with pytest.raises(Problem):
                await claude.resolve("claude-next")
    server.close()
    await server.wait_closed()
    assert heard == []


@pytest.mark.parametrize(
    ("kind", "status", "title"),
    [
        ("overloaded_error", 503, "Claude is overloaded"),
        ("rate_limit_error", 503, "Claude is overloaded"),
        ("api_error", 502, "Claude failed in the middle"),
    ],
)
async def test_an_error_in_the_middle_is_told_in_words_after_all_that_came_before_it(
    kind: str, status: int, title: str
) -> None:
    broken = said(start(input_tokens=7), text("Hel"), {"type": "error", "error": {"type": kind, "message": "oh"}})
    failed = await failure_of(broken)
    assert failed.steps[1:] == [Text("Hel")]
    assert failed.told == (status, title)
    assert failed.stream.request_id == "req_1"


@pytest.mark.parametrize(
    "answered",
    [
        said(start(input_tokens=7), text("Hel")),
        said(start(input_tokens=7), text("Hello"), last(output_tokens=9)),
        answer(200, "text/event-stream", "event: message_start\ndata: {not json}\n\n"),
        answer(200, "text/event-stream", 'event: message_start\ndata: {"message": 7}\n\n'),
        said(start(input_tokens=7), text("Hel?")).replace(b"?", b"\xff"),
        said(start(input_tokens=-7)),
        said(start(input_tokens=99_999_999), last(output_tokens=99_999_999), STOP),
        said({"type": "error", "error": {"type": "api_error", "message": "oh"}}),
        answer(200, "application/json", '{"type": "message", "usage": {"input_tokens": 7, "output_tokens": 9}}'),
        answer(200, "text/event-stream", ""),
        answer(200, "text/event-stream", "half", "content-length: 100"),
        b"HTTP/1.1 200",
        b"",
    ],
)
async def test_an_answer_that_is_not_whole_is_a_failure_in_words_whatever_is_missing(answered: bytes) -> None:
    problem = (await failure_of(answered)).problem
    assert problem.document["status"] == 502
    assert "try again" in problem.document["detail"]


@pytest.mark.parametrize(
    ("kind", "body", "headers"),
    [
        ("text/html", "<h1>Log in</h1>\n\n<script>\ndata: {}\n\n</script>", []),
        ("text/html", "<h1>Log in</h1>", ["content-length: 100"]),
        ("text/html", "x" * (1024 * 1024 + 1), []),
        ("text/html", "no gzip", ["content-encoding: gzip"]),
        ("application/json", '{"ok": true}', []),
        ("application/json", '{"usage": null}', []),
        ("text/plain", "event: message_start\ndata: nothing of Claude's\n\n", []),
        ("", "", []),
    ],
)
async def test_what_is_no_stream_is_not_claudes_and_costs_nothing(kind: str, body: str, headers: list[str]) -> None:
    failed = await failure_of(answer(200, kind, body, *headers))
    assert failed.told == (502, "Claude's answer makes no sense")
    assert "Nothing was spent; an operator must check ANTHROPIC_BASE_URL" in failed.problem.document["detail"]
    assert failed.stream.gave_nothing
    assert failed.stream.so_far == "Nothing was spent"


@pytest.mark.parametrize(
    "answered",
    [
        answer(200, "Text/Event-Stream; charset=utf-8", ""),
        said(PING).replace(b"text/event-stream", b"text/plain"),
        said(start(input_tokens=7)).replace(b"text/event-stream", b""),
        answer(200, "application/json", '{"usage": {"input_tokens": 7}}'),
    ],
)
async def test_a_stream_an_event_and_a_count_are_claudes_whatever_they_are_called(answered: bytes) -> None:
    assert not (await failure_of(answered)).stream.gave_nothing


async def test_what_came_before_bytes_that_are_no_text_is_passed_on() -> None:
    broken = await failure_of(said(start(input_tokens=7), text("Hel"), text("lo?")).replace(b"?", b"\xff"))
    assert broken.steps[1:] == [Text("Hel")]
    assert broken.told == (502, "Claude's answer makes no sense")


@pytest.mark.parametrize("framing", [b"zz\r\n", b"<html>502 Bad gateway</html>", b"fffffffffffffffffffff\r\n"])
async def test_an_answer_whose_framing_makes_no_sense_is_given_up_when_nothing_comes_any_more(framing: bytes) -> None:
    begun = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head, _, body = said(start(input_tokens=7)).partition(b"\r\n\r\n")
        writer.write(head + b"\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body))
        await begun.wait()
        writer.write(framing)
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{port}", idle_s=0.3)

    async def read_on() -> None:
        async for _ in claude.stream(PROMPT).steps():
            begun.set()

    with pytest.raises(ProviderError) as failure:
        await asyncio.wait_for(read_on(), 20)
    assert failure.value.problem.status in (502, 504)
    await claude.close()
    server.close()
    await server.wait_closed()


async def test_the_log_says_why_claude_cannot_be_reached_and_of_what_is_not_the_network_only_the_kind() -> None:
    unreachable = Claude(api_key="any", base_url="http://127.0.0.1:9")
    with pytest.raises(ProviderError, match="Claude cannot be reached") as failure:
        await read(unreachable.stream(PROMPT), [])
    await unreachable.close()
    assert "127.0.0.1" in failure.value.reason
    async with provider(answer(200, "text/event-stream", 'event: message_start\ndata: {"message": 7}\n\n')) as claude:
        with pytest.raises(ProviderError) as nonsense:
            await read(claude.stream(PROMPT), [])
    assert nonsense.value.reason == "ValidationError"


async def test_a_provider_that_cannot_be_reached_is_told_in_words_and_costs_nothing() -> None:
    claude = Claude(api_key="any", base_url="http://127.0.0.1:9")
    stream = claude.stream(PROMPT)
    with pytest.raises(ProviderError) as failure:
        await read(stream, [])
    await claude.close()
    assert failure.value.problem.document["title"] == "Claude cannot be reached"
    assert failure.value.problem.document["detail"] == "No connection came about. Nothing was spent; try again."
    assert stream.gave_nothing


async def test_whoever_leaves_before_there_is_a_connection_has_sent_nothing() -> None:
    with full_listener() as port:
        claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{port}")
        stream = claude.stream(PROMPT)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await read(stream, [])
        await claude.close()
    assert stream.gave_nothing
    assert stream.so_far == "Nothing was spent"


async def test_a_connection_that_does_not_come_about_in_time_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_module, "CONNECT_TIMEOUT_S", 0.2)
    with full_listener() as port:
        claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{port}")
        with pytest.raises(ProviderError) as failure:
            await read(claude.stream(PROMPT), [])
        await claude.close()
    assert (failure.value.problem.status, failure.value.problem.document["title"]) == (
        504,
        "Claude cannot be reached",
    )


async def test_whoever_leaves_at_whichever_step_has_sent_nothing_or_was_heard() -> None:
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    sent = []
    for step in range(200):
        stream = claude.stream(PROMPT)
        reading = asyncio.create_task(read(stream, []))
        for _ in range(step):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        sent.append(not stream.gave_nothing)
    await claude.close()
    assert (sent[0], sent[-1]) == (False, True)

    async def are_heard() -> bool:
        return heard.count(b"P") == sum(sent)

    await eventually(are_heard, deadline_s=5)
    server.close()
    await server.wait_closed()


async def test_a_question_of_which_only_a_part_was_sent_may_have_been_heard() -> None:
    is_over = asyncio.Event()
    heard = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        heard.set()
        await is_over.wait()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    claude = Claude(api_key="any", base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    stream = claude.stream(Prompt(MODEL, [{"role": "user", "content": "x" * 32 * 1024 * 1024}], None, 100))
    reading = asyncio.create_task(read(stream, []))
    await heard.wait()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert not stream.gave_nothing
    is_over.set()
    await claude.close()
    server.close()
    await server.wait_closed()
