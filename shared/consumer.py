"""The durable consumer: events from the stream, in batches, acknowledged after their effect is committed."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from shared.broker import BROKER_GONE, end_process
from shared.errors import PoisonMessage
from shared.events import Event, decode
from shared.pulling import Pulling
from shared.quarantine import ANOTHER_BODY, Poison, alarm
from shared.streams import LEDGER_SEALED

log = structlog.get_logger()

# Commits the effect of the events, and the poison. Returns the events that contradict an earlier one of the same id.
Handler = Callable[[list[Event], list[Poison]], Awaitable[Sequence[Event]]]

RETRY_FIRST_S, RETRY_MAX_S = 0.5, 10.0
# What these say of one batch is true of every batch: the database is away, locked, full, or busy with another writer.
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeoutError, OSError)
# And these say of one event that no database will ever take it.
REJECTED = (DataError, IntegrityError)


async def consume(nc: Client, durable: str, handle: Handler) -> None:
    """Hand the durable's events to `handle` for ever. What raises is delivered again, later and later.

    A closed connection ends the process: its supervisor starts a fresh one. A durable that is gone is not noticed
    here, but by its guard (`watch_bus`).
    """
    pulling = Pulling(nc, durable)
    await pulling.start()
    failures = 0
    try:
        while True:
            messages = await pulling.next_batch()
            failures = 0 if await _settle(messages, handle, failures) else failures + 1
    except ConnectionClosedError:
        end_process("the connection to the broker is closed")
    finally:
        await _answer(message.nak() for message in await pulling.stop())


class _Received(NamedTuple):
    message: Msg
    reading: Event | Poison


async def _settle(messages: list[Msg], handle: Handler, failures: int) -> bool:
    """Whether the database took them. If not, nothing else is tried for a while, longer after `failures`."""
    try:
        again = await apply(handle, messages)
    except Exception:
        delay_s = _delay_s(failures)
        log.exception("batch_failed", events=len(messages), again_in_s=round(delay_s, 2))
        await _answer(message.nak(delay=delay_s) for message in messages)
        await asyncio.sleep(delay_s)
        return False
    for message in again:
        await _answer([message.nak(delay=_delay_s((message.metadata.num_delivered or 1) - 1))])
    if again:
        messages = [message for message in messages if message not in again]
    await _answer(message.ack() for message in messages)
    return True


async def apply(handle: Handler, messages: list[Msg]) -> list[Msg]:
    """The messages that could not be applied; others are committed, in quarantine, or seals, which change nothing."""
    batch = [_Received(message, _read(message)) for message in messages if message.subject != LEDGER_SEALED]
    return await _apply(batch, handle) if batch else []


async def _apply(batch: list[_Received], handle: Handler) -> list[Msg]:
    """The messages that must come again. One bad event never holds up the others: it is searched for by halves."""
    poison = [reading for _, reading in batch if isinstance(reading, Poison)]
    events = [reading for _, reading in batch if not isinstance(reading, Poison)]
    try:
        contradicting = await handle(events, poison)
    except DATABASE_AWAY:
        raise
    except Exception as error:
        if len(batch) > 1:
            middle = len(batch) // 2
            return await _apply(batch[:middle], handle) + await _apply(batch[middle:], handle)
        ((message, reading),) = batch
        if isinstance(error, REJECTED) and not isinstance(reading, Poison):
            return await _apply([_Received(message, _poison(message, type(error.orig).__name__))], handle)
        log.exception("event_failed", subject=message.subject, deliveries=message.metadata.num_delivered)
        return [message]
    alarm(poison)
    if not contradicting:
        return []
    seconds = {id(event) for event in contradicting}
    return await _apply(
        [_Received(message, _poison(message, ANOTHER_BODY)) for message, reading in batch if id(reading) in seconds],
        handle,
    )


def _read(message: Msg) -> Event | Poison:
    try:
        return decode(message.data)
    except PoisonMessage as problem:
        return _poison(message, str(problem))


def _poison(message: Msg, reason: str) -> Poison:
    return Poison(message.subject, message.data, reason)


def _delay_s(failures: int) -> float:
    return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


async def _answer(answers: Iterable[Awaitable[None]]) -> None:
    for answer in answers:
        with suppress(*BROKER_GONE):  # unheard, it is delivered again, and counted once
            await answer
