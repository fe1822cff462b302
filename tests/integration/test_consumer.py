"""The consumer on a real broker: every event handled, whatever comes before it, and nothing tried in a hot loop."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from time import monotonic

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from sqlalchemy.exc import DataError, OperationalError

from shared import consumer, streams
from shared.events import Event, encode
from shared.pulling import BATCH_SIZE
from shared.quarantine import ANOTHER_BODY, QUARANTINED, Poison
from tests.builders import generation_completed, publish, publish_raw
from tests.fixtures import eventually

AWAY = OperationalError("COMMIT", {}, Exception("away"))
REJECTED = DataError("INSERT", {}, Exception("too large"))


class Handled:
    """Keeps what it is handed. `refuse` may raise before that; `contradicts` says what another event contradicts."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.poison: list[Poison] = []
        self.tried_at: list[float] = []
        self.refuse: Callable[[Sequence[Event]], None] = lambda events: None
        self.contradicts: Callable[[Event], bool] = lambda event: False

    async def __call__(self, events: list[Event], poison: list[Poison]) -> list[Event]:
        self.tried_at.append(monotonic())
        self.refuse(events)
        contradicting = [event for event in events if self.contradicts(event)]
        self.events += [event for event in events if event not in contradicting]
        self.poison += poison
        return contradicting

    @property
    def ids(self) -> list[str]:
        return sorted(event.id for event in self.events)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "RETRY_FIRST_S", 0.1)


@asynccontextmanager
async def consuming(nats: Client, handled: Handled) -> AsyncIterator[None]:
    task = asyncio.create_task(consumer.consume(nats, streams.LEDGER, handled))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def quarantined() -> float:
    (metric,) = QUARANTINED.collect()
    return metric.samples[0].value


async def acknowledged(nats: Client) -> None:
    last = (await nats.jetstream().stream_info(streams.STREAM)).state.last_seq

    async def look() -> bool:
        info = await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)
        return info.ack_floor is not None and info.ack_floor.stream_seq >= last

    await eventually(look)


async def test_a_backlog_of_several_batches_is_handled_once_and_whole(nats: Client) -> None:
    events = [generation_completed() for _ in range(3 * BATCH_SIZE + 7)]
    for first in range(0, len(events), 100):
        await asyncio.gather(*(publish(nats, event) for event in events[first : first + 100]))
    handled = Handled()
    async with consuming(nats, handled):
        await acknowledged(nats)
    assert handled.ids == sorted(event.id for event in events)
    assert len(handled.tried_at) < len(events) / 50


async def test_what_was_on_its_way_to_a_consumer_that_stops_goes_to_another_at_once(nats: Client) -> None:
    async def hang(*_: object) -> list[Event]:
        await asyncio.Event().wait()
        return []

    events = [generation_completed() for _ in range(BATCH_SIZE + 5)]
    for event in events:
        await publish(nats, event)
    stopping, handled = asyncio.create_task(consumer.consume(nats, streams.LEDGER, hang)), Handled()

    async def all_are_delivered() -> bool:
        info = await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)
        return bool(info.num_ack_pending == len(events))

    await eventually(all_are_delivered)
    stopping.cancel()
    await asyncio.wait([stopping])
    async with consuming(nats, handled):

        async def those_that_waited() -> bool:
            return len(handled.events) >= 5

        await eventually(those_that_waited, deadline_s=3)  # sooner than what was in hand, after ack_wait


async def test_while_the_database_is_away_it_is_asked_more_and_more_seldom(nats: Client) -> None:
    events = [generation_completed() for _ in range(20)]
    handled = Handled()

    def away(_: Sequence[Event]) -> None:
        raise AWAY

    async def tried_often() -> bool:
        return len(handled.tried_at) >= 6

    handled.refuse = away
    async with consuming(nats, handled):
        await publish(nats, *events)
        await eventually(tried_often)
        handled.refuse = lambda events: None
        await acknowledged(nats)

    assert handled.ids == sorted(event.id for event in events)
    gaps_s = [later - earlier for earlier, later in pairwise(handled.tried_at[:6])]
    for n, gap_s in enumerate(gaps_s):
        assert gap_s >= 0.1 * 2**n / 2  # the jitter takes half of it at most
    deliveries = await nats.jetstream().consumer_info(streams.STREAM, streams.LEDGER)
    assert deliveries.delivered is not None
    assert deliveries.delivered.consumer_seq <= len(events) * (len(handled.tried_at) + 1)


async def test_an_event_that_fails_comes_again_and_again_and_holds_up_nothing(nats: Client) -> None:
    events = [generation_completed() for _ in range(50)]
    failing, attempts = events[17], Counter[str]()
    handled = Handled()

    def fail(given: Sequence[Event]) -> None:
        if any(event.id == failing.id for event in given):
            attempts[failing.id] += len(given) == 1
            if attempts[failing.id] < 4:
                raise KeyError("a mistake of ours")

    async def all_others() -> bool:
        return len(handled.events) == len(events) - 1

    handled.refuse = fail
    async with consuming(nats, handled):
        await publish(nats, *events)
        await eventually(all_others)
        assert attempts[failing.id] < 4
        await acknowledged(nats)

    assert handled.ids == sorted(event.id for event in events)
    assert handled.poison == []


async def test_what_a_database_rejects_is_poison_and_the_rest_of_its_batch_is_not(nats: Client) -> None:
    events = [generation_completed() for _ in range(20)]
    handled = Handled()

    def reject(given: Sequence[Event]) -> None:
        if events[3].id in {event.id for event in given}:
            raise REJECTED

    handled.refuse = reject
    before = quarantined()
    async with consuming(nats, handled):
        await publish(nats, *events)
        await acknowledged(nats)

    assert handled.ids == sorted(event.id for event in events if event is not events[3])
    assert [(poison.body, poison.reason) for poison in handled.poison] == [(encode(events[3]), "Exception")]
    assert quarantined() == before + 1


async def test_what_contradicts_is_poison_with_its_own_bytes(nats: Client) -> None:
    first, second = generation_completed(), generation_completed()
    body = b" " + encode(second)
    handled = Handled()
    handled.contradicts = lambda event: event.id == second.id
    async with consuming(nats, handled):
        await publish(nats, first)
        await publish_raw(nats, body)
        await acknowledged(nats)
    assert handled.ids == [first.id]
    assert [(poison.body, poison.reason) for poison in handled.poison] == [(body, ANOTHER_BODY)]


VALID = encode(generation_completed(metadata={"a": 1}))
ODD = [
    b"",
    b"\xff\xfe",
    b"\0" * 1000,
    b"[" * 60_000,
    b'{"a":' * 5_000,
    b"NaN",
    b'"' + b"x" * 60_000 + b'"',
    VALID[:-1],
    VALID + VALID,
    VALID.replace(b'{"a":1}', b'{"a":' + b"[" * 300 + b"]" * 300 + b"}"),
    VALID.replace(b'{"a":1}', b'{"a":NaN}'),
    VALID.replace(b'{"a":1}', b'{"a":1e999}'),
    VALID.replace(b'{"a":1}', b'{"a":"\\ud800"}'),
    VALID.replace(b'{"a":1}', b'{"a":"\\u0000"}'),
    VALID.replace(b'{"a":1}', b'{"\\u0000":1}'),
    VALID.replace(b'{"a":1}', b'{"a":' + b"9" * 5_000 + b"}"),
    VALID.replace(b'"tokens_used":8094', b'"tokens_used":8094.0'),
    VALID.replace(b'"tokens_used":8094', b'"tokens_used":8095'),
    VALID.replace(b'"tokens_used":8094', b'"tokens_used":-8094'),
    VALID.replace(b'"tokens_used":8094', b'"tokens_used":1,"tokens_used":-1'),
]


@given(bodies=st.lists(st.binary(max_size=300) | st.sampled_from(ODD), min_size=1, max_size=30))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_bytes_are_put_aside_with_a_reason_and_what_comes_after_them_is_handled(
    nats: Client, bodies: list[bytes]
) -> None:
    last, handled = generation_completed(), Handled()
    for body in bodies:
        await publish_raw(nats, body)
    await publish(nats, last)
    async with consuming(nats, handled):
        await acknowledged(nats)
    assert handled.ids == [last.id]
    assert Counter(poison.body for poison in handled.poison) == Counter(bodies)
    assert all(poison.reason for poison in handled.poison)


async def test_a_subject_and_headers_that_are_no_text_stop_nobody_from_reading(
    nats: Client, own_nats_server: str
) -> None:
    last, handled = generation_completed(), Handled()
    headers = b"NATS/1.0 503 odd\r\nNats-Msg-Id: \xff\r\n\xfe: x\r\n\r\n"
    sizes = b"%d %d" % (len(headers), len(headers) + 2)
    reader, writer = await asyncio.open_connection(*own_nats_server.removeprefix("nats://").split(":"))
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    writer.write(b"PUB generation.completed.keyed.\xff\xfe 2\r\nhi\r\n")
    writer.write(b"PUB generation.completed.keyed.a\0b 2\r\nho\r\n")
    writer.write(b"HPUB generation.completed " + sizes + b"\r\n" + headers + b"ha\r\n" + b"PING\r\n")
    while not (await reader.readline()).startswith(b"PONG"):
        pass
    writer.close()
    await publish(nats, last)
    async with consuming(nats, handled):
        await acknowledged(nats)
    assert handled.ids == [last.id]
    assert sorted(poison.body for poison in handled.poison) == [b"ha", b"hi", b"ho"]
