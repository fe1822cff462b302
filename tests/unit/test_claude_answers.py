import json
from typing import Any, get_args

import pytest
from anthropic.resources.messages.messages import DEPRECATED_MODELS
from anthropic.types.model import Model
from hypothesis import given as given_any
from hypothesis import strategies as st

from deploy.claude import directives, events, models
from deploy.claude.answers import Answer, answer, count_tokens
from deploy.claude.directives import Directives
from deploy.claude.errors import ApiError
from deploy.claude.given import Given
from deploy.claude.requests import CountTokensRequest, MessagesRequest

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def answered(question: str, *, max_tokens: int = 4096) -> Answer:
    return answer(question, directives.read(question), max_tokens=max_tokens)


def refused(request: dict[str, Any]) -> str:
    with pytest.raises(ApiError) as refusal:
        MessagesRequest.parse(json.dumps(request).encode())
    assert refusal.value.status == 400
    return refusal.value.message


def asking(**changes: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]} | changes


@given_any(ANY_TEXT)
def test_a_text_never_has_more_tokens_than_bytes(text: str) -> None:
    assert count_tokens(text) <= len(text.encode())


@given_any(ANY_TEXT.filter(str.strip), ANY_TEXT)
def test_the_input_of_a_request_stays_below_its_bytes_and_eight_tokens_a_message(text: str, system: str) -> None:
    body = asking(system=system, messages=[{"role": "user", "content": text}])
    tokens = CountTokensRequest.parse(json.dumps(body, ensure_ascii=False).encode()).tokens
    assert 0 < tokens <= len((text + system).encode()) + 8


@given_any(ANY_TEXT, st.integers(1, 500))
def test_an_answer_repeats_itself_and_never_exceeds_max_tokens(question: str, max_tokens: int) -> None:
    first, second = (answer(question, Directives(), max_tokens=max_tokens) for _ in range(2))
    assert first == second
    assert first.output_tokens == count_tokens(first.text) <= max_tokens


def test_an_answer_streams_as_twenty_to_eighty_deltas_and_quotes_the_question() -> None:
    for number in range(200):
        said = answered(f"How do I keep ledger {number}?")
        assert 20 <= len(said.deltas) <= 80
        assert f"“How do I keep ledger {number}?”" in said.text
        assert said.stop_reason == "end_turn"


def test_an_answer_cut_at_max_tokens_says_so() -> None:
    said = answered("Hello", max_tokens=10)
    assert (said.output_tokens, said.stop_reason) == (10, "max_tokens")


def test_directives_are_obeyed_and_not_quoted() -> None:
    said = answered("[deltas 200] Why? [usage input=5282 output=2812] [stop refusal]")
    assert (len(said.deltas), said.output_tokens, said.stop_reason) == (200, 2812, "refusal")
    assert "“Why?”" in said.text
    assert said.text.startswith(answered("Why?").text)


def test_told_output_ends_at_max_tokens_too() -> None:
    said = answered("[usage output=2812]", max_tokens=1024)
    assert (said.output_tokens, said.stop_reason) == (1024, "max_tokens")


def test_every_directive_is_read() -> None:
    told = directives.read(
        "[slow 50ms] [first-byte 2s] [fail 429] [cut middle] [deltas 3] [usage input=1 output=2] "
        "[cache creation=3 read=4] [stop refusal] [repeat-delta-usage] [together] [split] "
        "[tag invoice-7] [hang before] [no message_stop]"
    )
    assert told == Directives(
        delay_s=0.05,
        first_byte_s=2,
        refusal_status=429,
        hangs_before=True,
        ending="cut",
        left_out="message_stop",
        deltas=3,
        input_tokens=1,
        output_tokens=2,
        cache_creation_tokens=3,
        cache_read_tokens=4,
        stop_reason="refusal",
        repeats_usage=True,
        together=True,
        splits_bytes=True,
        tag="invoice-7",
    )


@pytest.mark.parametrize(
    "directive",
    [
        "[slow down]",
        "[fail 418]",
        "[cut end]",
        "[usage tokens=3]",
        "[cache read=-3]",
        "[stop it]",
        "[split 3]",
        "[deltas]",
        "[tag a b]",
    ],
)
def test_a_directive_that_cannot_be_read_is_refused_and_quoted(directive: str) -> None:
    with pytest.raises(ApiError, match=r"400") as refusal:
        directives.read(f"Please {directive}")
    assert directive in refusal.value.message


def test_brackets_that_name_no_directive_are_plain_text() -> None:
    assert directives.read("see [1], [slowly] and [x](y)") == Directives()


def test_split_events_break_characters_and_lose_nothing() -> None:
    event = events.text_delta("“naïve”")
    shreds = list(events.shreds(event))
    assert b"".join(shreds) == event
    assert any("\ufffd" in shred.decode(errors="replace") for shred in shreds)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "model: Field required"),
        (asking(messages=[]), "messages: at least one message is required"),
        (asking(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
        (asking(max_tokens="9"), "max_tokens: Input should be a valid integer"),
        (
            asking(messages=[{"role": "robot", "content": "Hi"}]),
            "messages.0.role: Input should be 'user' or 'assistant'",
        ),
        (
            asking(messages=[{"role": "assistant", "content": "Hi"}]),
            'messages: first message must use the "user" role',
        ),
        (asking(messages=[{"role": "user", "content": " "}]), "messages: text content blocks must be non-empty"),
        (
            asking(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "messages.0.content.0.text: Field required",
        ),
    ],
)
def test_a_faulty_request_is_refused_in_words(request_: dict[str, Any], message: str) -> None:
    assert refused(request_) == message


def test_text_may_come_as_a_string_or_as_blocks() -> None:
    blocks = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    whole = CountTokensRequest.parse(json.dumps(asking()).encode())
    parts = CountTokensRequest.parse(
        json.dumps(asking(system=blocks, messages=[{"role": "user", "content": blocks}])).encode()
    )
    assert whole.question == "Hi"
    assert parts.question == "Hello there"
    assert parts.tokens == 2 * count_tokens("Hello there") + 4


def test_every_model_the_sdk_names_answers_unless_it_is_retired() -> None:
    # Deprecated, but answering until 2026-11-30.
    callable_still = {"claude-sonnet-4-5", "claude-sonnet-4-5-20250929"}
    named: set[str] = set(get_args(get_args(Model)[0]))
    for model in named - DEPRECATED_MODELS.keys() | callable_still:
        assert models.resolve(model).startswith(model)
    for model in DEPRECATED_MODELS.keys() - callable_still | {"claude-3-haiku-20240307"}:
        with pytest.raises(ApiError, match=r"404"):
            models.resolve(model)


def test_what_was_given_is_summed_by_outcome() -> None:
    counts = {"inputTokens": 5, "outputTokens": 7, "cacheCreationInputTokens": 1, "cacheReadInputTokens": 2}
    given = Given()
    given.record("completed", counts, messageId="msg_1")
    given.record("disconnected", counts, messageId="msg_2")
    totals = given.totals()
    assert (totals["generations"], totals["tokens"]) == (2, 30)
    assert totals["byOutcome"]["disconnected"] == {"generations": 1, "tokens": 15, **counts}
    assert totals["byOutcome"]["failed"]["tokens"] == 0
    assert [record["messageId"] for record in json.loads(given.records())] == ["msg_1", "msg_2"]
