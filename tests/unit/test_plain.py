"""What is read as a plain generation: the same as `decode` reads, and nothing that it refuses."""

import json
from collections.abc import Sequence
from copy import deepcopy
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import to_json
from sqlalchemy import JSON

from services.ledger import replay as ledger
from services.ledger.store import usage_rows
from services.quota import replay as quota
from services.quota.totals import settlement
from shared.database import iso
from shared.events import Event, GenerationCompleted, decode, encode
from shared.loading import PlainRows
from shared.plain import plain_generation
from tests.builders import NOON, USER_IDS, authorized, generation_completed, subscription_changed, usage_adjusted
from tests.builders import usage_reported as reported

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOMENTS = st.integers(0, 253_000_000_000_000_000).map(lambda us: EPOCH + timedelta(microseconds=us))
NAMES = st.sampled_from(["user_1", "a", "x" * 128, "ünï/codé 🛤", 'a "quoted" name', "back\\slash"]) | USER_IDS
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
FACT = st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, lambda inner: st.lists(inner, max_size=3))
FACTS = st.dictionaries(TEXTS, FACT, max_size=3)


def kept_by_a_database(values: dict[str, Any], into: PlainRows) -> tuple[Any, ...]:
    return tuple(as_text(values[name], is_json=isinstance(into.table.c[name].type, JSON)) for name in into.columns)


def as_text(value: Any, *, is_json: bool) -> Any:
    if value is not None and is_json:
        return to_json(value).decode()
    if isinstance(value, datetime):
        return iso(value)
    return value.isoformat() if isinstance(value, date) else value


def check(body: bytes) -> None:
    """Whatever it is: where it is plain, both services keep of it what they keep of the event."""
    generation = plain_generation(body)
    if generation is None:
        return
    event = decode(body)
    assert isinstance(event, GenerationCompleted)
    of_ledger, of_quota = ledger.RebuiltLedger.plain, quota.RebuiltQuota.plain
    assert of_ledger.row(generation) == kept_by_a_database(usage_rows([event])[0], of_ledger)
    assert of_quota.row(generation) == kept_by_a_database(settlement(event), of_quota)


@st.composite
def usual_bodies(draw: st.DrawFn) -> bytes:
    at, user_id = draw(MOMENTS), draw(NAMES)
    maker = draw(st.sampled_from([generation_completed, reported]))
    event = maker(
        user_id,
        model=draw(st.none() | NAMES),
        started_at=at,
        completed_at=draw(MOMENTS),
        provider_request_id=draw(st.none() | NAMES),
        on_disconnect=draw(st.sampled_from([None, "stop", "drain"])),
        metadata=draw(st.just({}) | FACTS),
        authorized=draw(
            st.none()
            | st.builds(
                authorized,
                tier=NAMES,
                period=st.sampled_from(["day", "month", "none"]),
                period_start=st.none() | MOMENTS,
                resets_at=st.none() | MOMENTS,
                expires_at=MOMENTS,
            )
        ),
    )
    return encode(event)


@given(usual_bodies())
def test_of_a_generation_the_same_is_kept(body: bytes) -> None:
    check(body)


ODD: Sequence[Any] = (
    *(None, True, "", "x", "x" * 128, "x" * 129, "new\nline", "del\x7f", "\x85", "no\u00a0break", "\ud800", "user_2"),
    *(0, -1, 1.0, 1e2, 8_094, 100_000_000, 100_000_001, 2**63, 10**30, float("nan"), float("inf"), [], {}, [[]]),
    *("2026-11-22T12:00:00Z", "2026-11-22 12:00:00z", "2026-11-22T12:00:00.1234567Z", "2026-11-22T12:00:00.999999Z"),
    *("2026-11-22T12:00:00+01:00", "2026-11-22T12:00:00", "1969-12-31T23:59:59Z", "9999-01-01T00:00:00Z"),
    *("9998-12-31T23:59:59.9999999Z", "1970-01-01T00:30:00+01:00", "2026-11-22T23:59:60Z", "2026-11-22"),
    *(1_795_348_800, "completed", "reported", "drain", "month", "1.0", "generation.completed"),
    *("urn:chatrail:generation.completed:1", "urn:chatrail:generation.completed:4"),
    *({"a": 1.0, "b": [None, "ä"]}, {"deep": {"er": {}}}, {"a": "\x00"}),
    *({"a": "x" * 5_000}, {"a": float("nan")}, {"a": 1e300}, {"a": 0.1 + 0.2}, {"a": -0.0}, {"a": 10**30}),
)  # fmt: skip
DOCUMENT = json.loads(encode(generation_completed(authorized=authorized(), provider_request_id="r", model="m")))
PLACES = [
    *((name,) for name in (*DOCUMENT, "newer")),
    *(("data", name) for name in (*DOCUMENT["data"], "newer")),
    *(("data", "authorized", name) for name in (*DOCUMENT["data"]["authorized"], "newer")),
]
ABSENT = object()


def changed(changes: Sequence[tuple[tuple[str, ...], Any]], *, is_ascii: bool = False) -> bytes:
    document = deepcopy(DOCUMENT)
    for (*path, name), value in changes:
        inner = document
        for step in path:
            inner = inner[step] if isinstance(inner, dict) and isinstance(inner.get(step), dict) else {}
        if value is ABSENT:
            inner.pop(name, None)
        else:
            inner[name] = deepcopy(value)
    return json.dumps(document, ensure_ascii=is_ascii).encode(errors="surrogatepass")


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_whatever_stands_in_any_place_of_a_generation_the_same_is_kept_or_it_is_not_plain(place: tuple[str]) -> None:
    for value in (ABSENT, *ODD):
        for is_ascii in (True, False):
            check(changed([(place, value)], is_ascii=is_ascii))


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from([ABSENT, *ODD])), max_size=4))
def test_however_much_of_a_generation_is_odd_the_same_is_kept_or_it_is_not_plain(
    changes: list[tuple[tuple[str, ...], Any]],
) -> None:
    check(changed(changes))


BODY = encode(generation_completed(authorized=authorized(), metadata={"a": [1]}))


@given(usual_bodies(), st.integers(0, 2_000), st.binary(max_size=4), st.integers(0, 30))
@example(BODY, BODY.index(b'"a"'), b"\xff", 0)
@example(BODY, BODY.index(b'"metadata"'), b'"tokens_used":1,', 0)
@example(BODY, BODY.index(b"[1]"), b"[" * 300 + b"]" * 300 + b",", 0)
def test_a_generation_that_was_damaged_is_not_taken_for_another(
    body: bytes, place: int, put: bytes, taken: int
) -> None:
    check(body[:place] + put + body[place + taken :])


@pytest.mark.parametrize("depth", range(95, 210))
def test_metadata_is_nested_as_deep_as_an_event_may_be(depth: int) -> None:
    check(BODY.replace(b"[1]", b"[" * depth + b"]" * depth))


@pytest.mark.parametrize("digits", [18, 19, 20, 4_300, 4_301, 10_000])
def test_a_number_of_any_length_is_the_same_number_or_none(digits: int) -> None:
    check(BODY.replace(b'"hold_tokens":8096', b'"hold_tokens":' + b"9" * digits))


@pytest.mark.parametrize(
    "event",
    [
        generation_completed(),
        generation_completed("ünï/codé 🛤", provider_request_id="req_1", started_at=NOON + timedelta(microseconds=7)),
        generation_completed(authorized=authorized(), on_disconnect="stop", metadata={"conversationId": "c-1"}),
        reported(metadata={"tags": ["a", None, 1.5]}),
    ],
)
def test_what_our_services_write_is_plain(event: Event) -> None:
    assert plain_generation(encode(event)) is not None


def test_older_versions_are_plain_too() -> None:
    first = changed([(("dataschema",), "urn:chatrail:generation.completed:1"), (("data", "authorized"), ABSENT)])
    assert plain_generation(first) is not None


@pytest.mark.parametrize("event", [subscription_changed(), usage_adjusted()])
def test_other_events_are_not_plain(event: Event) -> None:
    assert plain_generation(encode(event)) is None
