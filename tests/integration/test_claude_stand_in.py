import asyncio
import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent

from tests import forked
from tests.stack import environment

START_DEADLINE_S = 20
MODEL = "claude-haiku-4-5"
SNAPSHOT = "claude-haiku-4-5-20251001"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def fetch(port: int, path: str) -> Any:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", path)
        return json.load(connection.getresponse())


@contextlib.contextmanager
def stand_in(*options: str) -> Iterator[int]:
    """The port of a stand-in that answers."""
    port = free_port()
    with open(os.devnull, "wb") as nothing:
        process = forked.start("deploy.claude", "--port", str(port), *options, env=environment(), output=nothing)
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                fetch(port, "/healthz")
                break
            except OSError:
                assert process.poll() is None, "the stand-in ended instead of starting"
                assert time.monotonic() < deadline, "the stand-in did not answer in time"
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with stand_in() as port:
        yield port


@pytest.fixture
async def claude(port: int) -> AsyncIterator[anthropic.AsyncAnthropic]:
    base_url = f"http://127.0.0.1:{port}"
    async with anthropic.AsyncAnthropic(api_key="any", base_url=base_url, max_retries=0) as client:
        yield client


async def ask(claude: anthropic.AsyncAnthropic, question: str, *, max_tokens: int = 4096) -> Message:
    said: Message = await claude.messages.create(
        model=MODEL, max_tokens=max_tokens, messages=[{"role": "user", "content": question}]
    )
    return said


async def ask_streamed(claude: anthropic.AsyncAnthropic, question: str, *, max_tokens: int = 4096) -> Message:
    async with claude.messages.stream(
        model=MODEL, max_tokens=max_tokens, messages=[{"role": "user", "content": question}]
    ) as stream:
        return await stream.get_final_message()


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def events_of(claude: anthropic.AsyncAnthropic, question: str) -> AsyncIterator[RawMessageStreamEvent]:
    stream = await claude.messages.create(
        model=MODEL, max_tokens=4096, messages=[{"role": "user", "content": question}], stream=True
    )
    async with stream:
        async for event in stream:
            yield event


async def recorded(port: int, message_id: str) -> dict[str, Any]:
    """What the stand-in says it gave to a message, as soon as it says so."""
    async with asyncio.timeout(5):
        while True:
            given = await asyncio.to_thread(fetch, port, "/given?records=1")
            for record in given["records"]:
                if record["messageId"] == message_id:
                    return dict(record)


async def test_the_sdk_sees_the_same_counts_streamed_and_whole(claude: anthropic.AsyncAnthropic) -> None:
    question = "How do I keep a ledger?"
    whole, streamed = await ask(claude, question), await ask_streamed(claude, question)
    counted = await claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": question}])
    assert text_of(whole) == text_of(streamed)
    assert whole.usage.output_tokens == streamed.usage.output_tokens > 80
    assert whole.usage.input_tokens == streamed.usage.input_tokens == counted.input_tokens
    assert whole.model == streamed.model == SNAPSHOT
    assert whole.stop_reason == streamed.stop_reason == "end_turn"
    assert whole.id.startswith("msg_01")
    assert whole.id != streamed.id
    assert (whole._request_id or "").startswith("req_01")


async def test_a_stream_has_the_events_of_the_real_one(claude: anthropic.AsyncAnthropic) -> None:
    events = [event async for event in events_of(claude, "Hello [deltas 3] [usage output=30]")]
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, delta = events[0], events[-2]
    assert start.type == "message_start"
    assert delta.type == "message_delta"
    assert (start.message.usage.output_tokens, delta.usage.output_tokens) == (1, 30)


async def test_told_usage_is_reported_and_counted_in_advance(claude: anthropic.AsyncAnthropic) -> None:
    question = "[usage input=5282 output=2812] [cache creation=100 read=200]"
    said = await ask_streamed(claude, question)
    assert (said.usage.input_tokens, said.usage.output_tokens) == (5282, 2812)
    assert (said.usage.cache_creation_input_tokens, said.usage.cache_read_input_tokens) == (100, 200)
    counted = await claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": question}])
    assert counted.input_tokens == 5282 + 100 + 200


async def test_max_tokens_ends_an_answer(claude: anthropic.AsyncAnthropic) -> None:
    said = await ask_streamed(claude, "Hello", max_tokens=5)
    assert (said.usage.output_tokens, said.stop_reason) == (5, "max_tokens")


@pytest.mark.parametrize("directive", ["[split]", "[together]", "[repeat-delta-usage]"])
async def test_the_way_bytes_arrive_changes_nothing(claude: anthropic.AsyncAnthropic, directive: str) -> None:
    question = f"Is “naïve” spelt so? [deltas 30] {directive}"
    streamed, whole = await ask_streamed(claude, question), await ask(claude, question)
    assert text_of(streamed) == text_of(whole)
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 120


async def test_repeated_usage_is_cumulative(claude: anthropic.AsyncAnthropic) -> None:
    events = [event async for event in events_of(claude, "[repeat-delta-usage] [usage output=100]")]
    assert [event.usage.output_tokens for event in events if event.type == "message_delta"] == [50, 50, 100, 100]


async def test_a_refusal_is_reported_as_stop_reason(claude: anthropic.AsyncAnthropic) -> None:
    assert (await ask_streamed(claude, "[stop refusal]")).stop_reason == "refusal"


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (413, anthropic.APIStatusError, "request_too_large"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (503, anthropic.APIStatusError, "api_error"),
        (529, anthropic.APIStatusError, "overloaded_error"),
    ],
)
async def test_a_told_failure_is_the_error_the_sdk_knows_and_gives_nothing(
    claude: anthropic.AsyncAnthropic, port: int, status: int, error: type[anthropic.APIStatusError], kind: str
) -> None:
    before = fetch(port, "/given")
    with pytest.raises(error) as failure:
        await ask_streamed(claude, f"[fail {status}]")
    assert (failure.value.status_code, failure.value.type) == (status, kind)
    assert failure.value.request_id == failure.value.response.json()["request_id"]
    assert ("retry-after" in failure.value.response.headers) == (status == 429)
    after = fetch(port, "/given")
    assert after["messageRequests"] == before["messageRequests"] + 1
    assert after["generations"] == before["generations"]


async def broken_off(claude: anthropic.AsyncAnthropic, question: str) -> tuple[str, int, Exception]:
    """The message id, the number of deltas, and what broke the stream after them."""
    message_id, deltas = "", 0
    try:
        async for event in events_of(claude, question):
            if event.type == "message_start":
                message_id = event.message.id
            deltas += event.type == "content_block_delta"
    except (anthropic.APIStatusError, httpx2.RemoteProtocolError) as error:
        return message_id, deltas, error
    raise AssertionError("the stream ended as if whole")


async def test_a_failure_in_the_middle_comes_after_half_of_the_answer(
    claude: anthropic.AsyncAnthropic, port: int
) -> None:
    question = "[fail middle] [deltas 10] [usage input=7 output=100]"
    message_id, deltas, error = await broken_off(claude, question)
    assert isinstance(error, anthropic.APIStatusError)
    assert (deltas, error.type) == (5, "overloaded_error")
    record = await recorded(port, message_id)
    assert (record["outcome"], record["inputTokens"], record["outputTokens"]) == ("failed", 7, 50)


async def test_a_cut_stream_is_a_broken_connection(claude: anthropic.AsyncAnthropic, port: int) -> None:
    message_id, deltas, error = await broken_off(claude, "[cut middle] [deltas 10]")
    assert isinstance(error, httpx2.RemoteProtocolError)
    assert deltas == 5
    record = await recorded(port, message_id)
    assert (record["outcome"], record["outputTokens"]) == ("failed", 20)


async def test_a_caller_that_leaves_stops_the_generation(claude: anthropic.AsyncAnthropic, port: int) -> None:
    async with claude.messages.stream(
        model=MODEL,
        max_tokens=4096,
        messages=[{"role": "user", "content": "[slow 50ms] [deltas 1000]"}],
    ) as stream:
        await anext(stream.text_stream)
        message_id = stream.current_message_snapshot.id
    record = await recorded(port, message_id)
    assert record["outcome"] == "disconnected"
    assert 4 <= record["outputTokens"] < 400


async def test_first_byte_and_delay_are_waited_for(claude: anthropic.AsyncAnthropic) -> None:
    begun = time.monotonic()
    await ask_streamed(claude, "[first-byte 200ms] [slow 20ms] [deltas 5]")
    assert time.monotonic() - begun >= 0.3


async def test_many_callers_do_not_disturb_each_other_and_sum_up_to_what_was_given(
    claude: anthropic.AsyncAnthropic, port: int
) -> None:
    before = fetch(port, "/given")
    said = await asyncio.gather(
        *(ask_streamed(claude, f"[slow 1ms] [usage input={n} output={2 * n}]") for n in range(50))
    )
    assert [message.usage.output_tokens for message in said] == [2 * n for n in range(50)]
    after = fetch(port, "/given")
    assert after["generations"] - before["generations"] == 50
    assert after["tokens"] - before["tokens"] == 3 * sum(range(50))
    completed = after["byOutcome"]["completed"]["tokens"] - before["byOutcome"]["completed"]["tokens"]
    assert completed == 3 * sum(range(50))


async def test_unknown_and_retired_models_are_not_found(claude: anthropic.AsyncAnthropic) -> None:
    for model in ("claude-3-haiku-20240307", "claude-3-5-haiku-20241022", "no-such-model"):
        with pytest.raises(anthropic.NotFoundError, match=f"model: {model}"):
            await claude.messages.count_tokens(model=model, messages=[{"role": "user", "content": "Hi"}])


async def test_models_are_listed_page_by_page(claude: anthropic.AsyncAnthropic) -> None:
    listed = [model.id async for model in claude.models.list(limit=5)]
    assert len(listed) == len(set(listed)) > 10
    assert SNAPSHOT in listed
    described = await claude.models.retrieve(MODEL)
    assert (described.id, described.display_name) == (SNAPSHOT, "Claude Haiku 4.5")


HEADERS = {"x-api-key": "any", "anthropic-version": "2023-06-01"}


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "kind"),
    [
        ("/v1/messages", {"anthropic-version": "2023-06-01"}, b"{}", 401, "authentication_error"),
        ("/v1/messages", HEADERS | {"x-api-key": ""}, b"{}", 401, "authentication_error"),
        ("/v1/messages", {"x-api-key": "any"}, b"{}", 400, "invalid_request_error"),
        ("/v1/messages", HEADERS, b"{", 400, "invalid_request_error"),
        ("/v1/messages?beta=true", HEADERS, b'{"model": "x"}', 400, "invalid_request_error"),
        ("/v1/messages", HEADERS, b" " * (32 * 1024 * 1024 + 1), 413, "request_too_large"),
        ("/v1/complete", HEADERS, b"{}", 404, "not_found_error"),
    ],
)
async def test_what_cannot_be_answered_is_refused_like_the_real_thing(
    *, port: int, path: str, headers: dict[str, str], body: bytes, status: int, kind: str
) -> None:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        answer = await client.post(path, headers=headers, content=body)
    told = answer.json()
    assert answer.status_code == status
    assert told["type"] == "error"
    assert told["error"]["type"] == kind
    assert told["request_id"] == answer.headers["request-id"]


async def test_what_was_given_is_remembered_by_the_next_process(tmp_path: Path) -> None:
    with stand_in("--data", str(tmp_path), "--delay-ms", "1") as port:
        async with anthropic.AsyncAnthropic(
            api_key="any", base_url=f"http://127.0.0.1:{port}", max_retries=0
        ) as claude:
            said = await ask_streamed(claude, "Remember me [deltas 2] [tag me]")
    with stand_in("--data", str(tmp_path)) as port:
        given = fetch(port, "/given?records=1")
    assert [(record["messageId"], record["tag"]) for record in given["records"]] == [(said.id, "me")]
    assert given["tokens"] == said.usage.input_tokens + said.usage.output_tokens
