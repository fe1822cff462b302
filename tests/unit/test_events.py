import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError

from shared.errors import PoisonMessage
from shared.events import EVENT_TOKENS_MAX, METADATA_BYTES_MAX, Event, UsageAdjusted, decode, encode, small
from tests.builders import (
    USER_IDS,
    authorized,
    generation_completed,
    subscription_changed,
    usage_adjusted,
    usage_reported,
)

TOKENS = st.integers(0, EVENT_TOKENS_MAX // 4)
OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(9998, 12, 31), timezones=OFFSETS)  # noqa: DTZ001
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        generation_completed,
        USER_IDS,
        input_tokens=TOKENS,
        output_tokens=TOKENS,
        cache_creation_input_tokens=TOKENS,
        cache_read_input_tokens=TOKENS,
        started_at=MOMENTS,
        completed_at=MOMENTS,
        on_disconnect=st.sampled_from([None, "stop", "drain"]),
        authorized=st.none() | st.builds(authorized, hold_tokens=TOKENS, resets_at=st.none() | MOMENTS),
        metadata=st.dictionaries(TEXT, JSON, max_size=3),
    ),
    st.builds(usage_reported, USER_IDS, tokens_used=TOKENS),
    st.builds(subscription_changed, USER_IDS, changed_at=MOMENTS, time_zone=st.sampled_from([None, "Asia/Tokyo"])),
    st.builds(usage_adjusted, USER_IDS, st.integers(-EVENT_TOKENS_MAX, EVENT_TOKENS_MAX), effective_at=MOMENTS),
)
EACH_KIND: list[Callable[[], Event]] = [generation_completed, subscription_changed, usage_adjusted]
VERSIONS = {"generation.completed": 3, "subscription.changed": 1, "usage.adjusted": 1}
PRIVATE = "a prompt"


def on_the_wire(event: Event) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(encode(event))
    return document


def refused(document: object) -> str:
    """The reason, in words."""
    with pytest.raises(PoisonMessage) as poison:
        decode(json.dumps(document).encode())
    return str(poison.value)


@given(EVENTS)
def test_an_event_arrives_as_it_was_sent(event: Event) -> None:
    assert decode(encode(event)) == event


@pytest.mark.parametrize("make", EACH_KIND)
def test_an_event_on_the_wire_is_a_cloud_event_about_its_user(make: Callable[[], Event]) -> None:
    document = on_the_wire(make())
    assert document["specversion"] == "1.0"
    assert document["datacontenttype"] == "application/json"
    assert document["dataschema"] == f"urn:chatrail:{document['type']}:{VERSIONS[document['type']]}"
    assert document["subject"] == document["data"]["user_id"]
    assert document["source"].startswith("/")
    assert document["id"][14] == "7"  # a UUID's version
    assert document["time"].endswith("Z")


@pytest.mark.parametrize("make", EACH_KIND)
@pytest.mark.parametrize("attribute", ["specversion", "id", "source", "type", "subject", "dataschema", "data"])
def test_an_event_that_does_not_say_what_it_is_is_poison(make: Callable[[], Event], attribute: str) -> None:
    document = on_the_wire(make())
    del document[attribute]
    assert attribute in refused(document)


def test_an_event_from_a_newer_release_with_more_to_say_is_understood() -> None:
    document = on_the_wire(generation_completed())
    document["traceparent"] = document["data"]["region"] = "new"
    assert isinstance(decode(json.dumps(document).encode()).subject, str)


def test_an_adjustment_from_before_there_were_top_ups_is_understood() -> None:
    document = on_the_wire(usage_adjusted())
    del document["data"]["top_up_tokens"], document["data"]["outlives_period"]
    assert document["dataschema"] == "urn:chatrail:usage.adjusted:1"
    decoded = decode(json.dumps(document).encode())
    assert isinstance(decoded, UsageAdjusted)
    assert (decoded.data.top_up_tokens, decoded.data.outlives_period) == (0, False)


@pytest.mark.parametrize(("version", "unknown"), [(1, ("on_disconnect", "authorized")), (2, ("authorized",))])
def test_a_generation_of_an_earlier_version_is_understood_as_one_that_says_less(
    version: int, unknown: tuple[str, ...]
) -> None:
    document = on_the_wire(event := generation_completed())
    for name in unknown:
        del document["data"][name]
    document["dataschema"] = f"urn:chatrail:generation.completed:{version}"
    assert decode(json.dumps(document).encode()) == event


@pytest.mark.parametrize("schema", ["urn:chatrail:generation.completed:4", "urn:chatrail:usage.adjusted:1", ""])
def test_a_version_that_this_release_does_not_know_is_poison(schema: str) -> None:
    assert "dataschema" in refused({**on_the_wire(generation_completed()), "dataschema": schema})


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"[]", b"null", b'"text"', b"{}", b"[" * 100_000])
def test_what_is_no_event_is_poison(body: bytes) -> None:
    with pytest.raises(PoisonMessage):
        decode(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_poison_and_nothing_else(body: bytes) -> None:
    with pytest.raises(PoisonMessage):
        decode(body)


@pytest.mark.parametrize("make", EACH_KIND)
def test_a_reason_names_the_field_and_never_its_value(make: Callable[[], Event]) -> None:
    event = on_the_wire(make())
    broken = {field: {**event, field: [PRIVATE]} for field in event}
    broken |= {field: {**event, "data": {**event["data"], field: [PRIVATE]}} for field in event["data"]}
    broken["type"] = {**event, "type": PRIVATE}
    for field, document in broken.items():
        reason = refused(document)
        assert field in reason
        assert PRIVATE not in reason


@pytest.mark.parametrize(
    "field",
    [
        "tokens_used",
        "input_tokens",
        "output_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
    ],
)
@pytest.mark.parametrize("count", [-1, 1.0, 0.5, True, "1", EVENT_TOKENS_MAX + 1, 10**30])
def test_a_count_that_is_not_a_whole_number_within_reason_is_poison(field: str, count: object) -> None:
    document = on_the_wire(generation_completed())
    document["data"][field] = count
    assert field in refused(document)


@pytest.mark.parametrize("count", [1.0, True, "1", -EVENT_TOKENS_MAX - 1, EVENT_TOKENS_MAX + 1, None])
def test_an_adjustment_is_a_whole_number_within_reason(count: object) -> None:
    document = on_the_wire(usage_adjusted())
    document["data"]["tokens_used"] = count
    assert "tokens_used" in refused(document)


@pytest.mark.parametrize(
    "counts",
    [
        {"tokens_used": 8_093},
        {"tokens_used": 0},
        {"cache_read_input_tokens": 1},
        {"output_tokens": None},
        {"cache_creation_input_tokens": None, "cache_read_input_tokens": None},
    ],
)
def test_a_split_that_does_not_add_up_is_poison(counts: dict[str, int | None]) -> None:
    document = on_the_wire(generation_completed())
    document["data"].update(counts)
    assert "tokens_used must be the sum of the four counts" in refused(document)


def test_our_own_code_cannot_make_a_split_that_does_not_add_up() -> None:
    with pytest.raises(ValidationError, match="tokens_used must be the sum"):
        generation_completed(tokens_used=1)


@pytest.mark.parametrize("control", ["\0", "\n", "\x1b", "\x7f", "\x85"])
def test_control_characters_in_names_are_refused(control: str) -> None:
    name = f"a{control}b"
    for make in (generation_completed, subscription_changed, usage_adjusted):
        with pytest.raises(ValidationError, match="user_id"):
            make(name)
    with pytest.raises(ValidationError, match="model"):
        generation_completed(model=name)
    with pytest.raises(ValidationError, match="reason"):
        usage_adjusted(reason=name)


@pytest.mark.parametrize("user_id", ["", "x" * 129])
def test_a_user_id_has_1_to_128_characters(user_id: str) -> None:
    with pytest.raises(ValidationError, match="user_id"):
        generation_completed(user_id)


def test_the_subject_is_the_user_whose_usage_it_is() -> None:
    assert "subject must be the user" in refused({**on_the_wire(generation_completed()), "subject": "somebody else"})


@pytest.mark.parametrize(
    "moment",
    [
        "2026-11-22T12:00:00",
        "9999-12-31T23:59:59-01:00",
        "0001-01-01T00:00:00+05:00",
        "1969-12-31T23:59:59Z",
        "yesterday",
        None,
    ],
)
def test_a_moment_without_a_zone_or_outside_the_calendar_is_poison(moment: object) -> None:
    document = on_the_wire(generation_completed())
    document["data"]["started_at"] = moment
    assert "started_at" in refused(document)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hold_tokens", -1),
        ("output_tokens_granted", 1.5),
        ("tier", ""),
        ("period", "year"),
        ("expires_at", "2026-11-22T12:00:00"),
        ("input_tokens_max", None),
    ],
)
def test_an_authorization_that_makes_no_sense_is_poison(field: str, value: object) -> None:
    document = on_the_wire(generation_completed(authorized=authorized()))
    document["data"]["authorized"][field] = value
    assert f"authorized.{field}" in refused(document)


@pytest.mark.parametrize(
    "nested", [lambda depth: "[" * depth + "]" * depth, lambda depth: '{"a":' * depth + "1" + "}" * depth]
)
def test_metadata_is_taken_just_as_deep_as_an_event_with_it_can_be_read(nested: Callable[[int], str]) -> None:
    taken = [depth for depth in range(1, 400) if is_taken(json.loads(f'{{"a":{nested(depth)}}}'))]
    assert taken == list(range(1, len(taken) + 1))
    assert 150 < len(taken) < 399
    for depth in (1, len(taken)):
        metadata = json.loads(f'{{"a":{nested(depth)}}}')
        event = generation_completed(metadata=metadata)
        assert decode(encode(event)) == event


def is_taken(metadata: dict[str, JsonValue]) -> bool:
    try:
        return bool(small(metadata))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "metadata",
    [
        {"note": "x" * METADATA_BYTES_MAX},
        {"note": "\0"},
        {"\0": 1},
        {"note": float("nan")},
        {"note": [float("inf")]},
        ["a list"],
    ],
)
def test_metadata_that_cannot_be_kept_everywhere_is_poison(metadata: object) -> None:
    document = on_the_wire(generation_completed())
    document["data"]["metadata"] = metadata
    assert "metadata" in refused(document)
