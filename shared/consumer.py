"""The durable consumer: events from the stream, in batches, acknowledged after their effect is committed."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from sqlalchemy.exc import DataError, IntegrityError

from shared.broker import BROKER_GONE, end_process
from shared.errors import PoisonMessage
from shared.events import Event, decode
from shared.quarantine import Poison
from shared.streams import STREAM

log = structlog.get_logger()

Handler = Callable[[list[Event], list[Poison]], Awaitable[None]]

# The first event is taken at once, those that come within BATCH_AGE_S of it share its transaction.
BATCH_SIZE = 500
BATCH_AGE_S = 0.04
# A pull that was under way when the broker died is lost; the next one is made after this long at most.
PULL_S = 1.0


async def consume(nc: Client, durable: str, handle: Handler) -> None:
    """Hand the durable's events to `handle` for ever. What raises is delivered again, later and later.

    A closed connection ends the process: its supervisor starts a fresh one. A durable that is gone is not noticed
    here, but by its guard (`watch_bus`).
    """
    pulling = await nc.jetstream().pull_subscribe_bind(durable=durable, stream=STREAM)
    try:
        while True:
            if messages := await _next_batch(pulling):
                await _settle(messages, handle)
    except ConnectionClosedError:
        end_process("the connection to the broker is closed")
    finally:
        with suppress(*BROKER_GONE):
            # nats-py's drain would wait half a minute for messages of a pull that nobody reads any more.
            await pulling.unsubscribe()


async def _next_batch(pulling: JetStreamContext.PullSubscription) -> list[Msg]:
    messages: list[Msg] = []
    try:
        messages += await pulling.fetch(1, timeout=PULL_S)
        messages += await pulling.fetch(BATCH_SIZE - 1, timeout=BATCH_AGE_S)
    except TimeoutError:
        pass  # nobody used anything; or nothing more came in time to share the transaction
    except ConnectionClosedError:
        raise
    except (NatsError, OSError) as error:
        log.warning("events_not_pulled", error=repr(error))
        await asyncio.sleep(PULL_S)
    return messages


async def _settle(messages: list[Msg], handle: Handler) -> None:
    try:
        await _apply(messages, handle)
    except Exception:
        deliveries = max(message.metadata.num_delivered or 1 for message in messages)
        delay_s = min(30.0, 0.25 * 2**deliveries) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        log.exception("batch_failed", events=len(messages), again_in_s=round(delay_s, 2))
        answers = [message.nak(delay=delay_s) for message in messages]
    else:
        answers = [message.ack() for message in messages]
    with suppress(NatsError):  # unheard, it is delivered again, and counted once
        for answer in answers:
            await answer


async def _apply(messages: list[Msg], handle: Handler) -> None:
    """One bad event never holds up the others: a batch that the database rejects is taken message by message."""
    readings = [_read(message) for message in messages]
    poison = [reading for reading in readings if isinstance(reading, Poison)]
    events = [reading for reading in readings if not isinstance(reading, Poison)]
    try:
        await handle(events, poison)
    except (DataError, IntegrityError) as error:
        if len(messages) > 1:
            for message in messages:
                await _apply([message], handle)
        else:
            await handle([], [Poison(m.subject, m.data, type(error.orig).__name__) for m in messages])


def _read(message: Msg) -> Event | Poison:
    try:
        return decode(message.data)
    except PoisonMessage as problem:
        return Poison(message.subject, message.data, str(problem))
