"""Reading the stream as the record that it is."""

import pytest
from nats.aio.client import Client

from shared import streams
from shared.broker import connect
from shared.recorded import BATCH_SIZE, Recorded, bounds, recorded
from tests.builders import generation_completed, publish
from tests.proxy import Proxy


async def read(nats: Client, *, first: int, last: int) -> list[Recorded]:
    return [message async for batch in recorded(nats, first=first, last=last) for message in batch]


@pytest.mark.parametrize("events", [0, 1, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1])
async def test_all_that_is_stored_is_read_in_order_and_no_durable_moves(nats: Client, events: int) -> None:
    published = [generation_completed(f"user_{n}") for n in range(events)]
    await publish(nats, *published)
    first, last = await bounds(nats)
    found = await read(nats, first=first, last=last)
    assert [message.sequence for message in found] == list(range(1, events + 1))
    assert [message.body for message in found] == [event.model_dump_json().encode() for event in published]
    assert {message.subject for message in found} <= {streams.GENERATION_COMPLETED}
    for durable in (streams.LEDGER, streams.QUOTA):
        assert (await nats.jetstream().consumer_info(streams.STREAM, durable)).num_pending == events


async def test_a_part_is_read_from_its_first_to_its_last_message(nats: Client) -> None:
    await publish(nats, *(generation_completed() for _ in range(20)))
    assert [message.sequence for message in await read(nats, first=5, last=7)] == [5, 6, 7]
    assert await read(nats, first=5, last=4) == []


async def test_a_reader_whose_broker_goes_away_goes_on_where_it_was(nats: Client) -> None:
    await publish(nats, *(generation_completed() for _ in range(3 * BATCH_SIZE)))
    assert nats.connected_url is not None
    async with Proxy("127.0.0.1", nats.connected_url.port or 0) as link:
        there = await connect(f"nats://127.0.0.1:{link.port}", name="reader")
        found: list[int] = []
        async for batch in recorded(there, first=1, last=3 * BATCH_SIZE):
            if not found:
                link.set("cut")
                link.set("pass")
            found += [message.sequence for message in batch]
        assert found == list(range(1, 3 * BATCH_SIZE + 1))
        await there.close()


async def test_no_reader_is_left_behind(nats: Client) -> None:
    await publish(nats, *(generation_completed() for _ in range(3)))
    await read(nats, first=1, last=3)
    names = {consumer.name for consumer in await nats.jetstream().consumers_info(streams.STREAM)}
    assert names == {streams.LEDGER, streams.QUOTA}
