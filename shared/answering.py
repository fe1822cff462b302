"""The answering side of the bus: calls, each answered by any replica of the service, faults included."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from shared.broker import BROKER_GONE, ERROR, ERROR_CODE, cancelled, close, connect_options
from shared.catchup import catch_up, keep_position
from shared.consumer import Handler, apply, consume
from shared.database import CommitUnknown, Database
from shared.errors import BadCall, Unavailable
from shared.guards import agree_on_bus, bus_missing, essential, watch_bus
from shared.telemetry import PART_TIMEOUT_S, Missing

log = structlog.get_logger()

# Calls of one kind that wait in one replica. Whoever asks beyond it hears so at once, instead of waiting in vain.
WAITING_MAX = 4096
LAST_ANSWERS_S = 2.0


@dataclass(frozen=True, slots=True)
class Call:
    """Requests on `subject`. Those that arrive while others are answered are then answered together.

    `answer` gets up to `group_max` of them, in order of arrival, and returns an answer to each, or the exception that
    tells its caller why there is none. At most `groups_max` groups are under way at once.
    """

    subject: str
    request_type: type[BaseModel]
    answer: Callable[[Sequence[Any]], Awaitable[Sequence[BaseModel | Exception]]]
    group_max: int = 256
    groups_max: int = 1


class Answering:
    """Subscribed in the queue group of the service. Every fault is an answer."""

    def __init__(self, nc: Client, calls: Sequence[Call]) -> None:
        self._nc = nc
        self._lines = [_Line(nc, call) for call in calls]

    async def start(self) -> None:
        """Returns when the broker has heard of the subscriptions: who calls from then on is answered."""
        self._subscriptions = [
            await self._nc.subscribe(line.call.subject, queue=line.call.subject.partition(".")[0], cb=line.heard)
            for line in self._lines
        ]
        # Twice: nats-py writes a PING at once, ahead of the subscriptions that still wait to be sent.
        await self._nc.flush()
        await self._nc.flush()

    async def stop(self) -> None:
        """Hear no more, and give the answers that are owed, to callers who still wait for them."""
        try:
            async with asyncio.timeout(LAST_ANSWERS_S):
                for subscription in self._subscriptions:
                    await subscription.drain()  # type: ignore[no-untyped-call]
                if under_way := [task for line in self._lines for task in line.under_way]:
                    await asyncio.wait(under_way)
        except BROKER_GONE as error:
            log.warning("calls_not_drained", error=repr(error))


class _Line:
    """The calls of one kind, from message to answer: no task and no future for each."""

    def __init__(self, nc: Client, call: Call) -> None:
        self._nc, self.call = nc, call
        self._waiting: list[Msg] = []
        self._groups = 0
        self.under_way: set[asyncio.Task[None]] = set()

    async def heard(self, message: Msg) -> None:
        if len(self._waiting) >= WAITING_MAX:
            await self._fault(message, "503", "The service is busy.")
            return
        self._waiting.append(message)
        if self._groups < self.call.groups_max:
            self._groups += 1
            answering = asyncio.create_task(self._answer_waiting())
            self.under_way.add(answering)
            answering.add_done_callback(self.under_way.discard)

    async def _answer_waiting(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting[: self.call.group_max], self._waiting[self.call.group_max :]
                await self._answer(
                    [(message, request) for message in group if (request := await self._read(message))]
                )
        finally:
            # Here, and not when the task is done: a call that is heard in between would wait for the next one.
            self._groups -= 1

    async def _read(self, message: Msg) -> BaseModel | None:
        try:
            return self.call.request_type.model_validate_json(message.data)
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
            await self._fault(message, "400", f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
            return None

    async def _answer(self, group: list[tuple[Msg, BaseModel]]) -> None:
        if not group:
            return
        answers: Sequence[BaseModel | Exception]
        try:
            answers = await self.call.answer([request for _, request in group])
        except Exception as error:
            if not isinstance(error, BadCall | Unavailable):
                log.exception("calls_failed", subject=self.call.subject, calls=len(group))
            answers = [error] * len(group)
        for (message, _), answer in zip(group, answers, strict=True):
            await self._send(message, answer)

    async def _send(self, message: Msg, answer: BaseModel | Exception) -> None:
        if isinstance(answer, BaseModel):
            try:
                await self._nc.publish(message.reply, answer.model_dump_json().encode())
            except NatsError as error:
                log.warning("call_not_answered", subject=self.call.subject, error=repr(error))
        elif isinstance(answer, BadCall):
            await self._fault(message, "400", str(answer))
        elif isinstance(answer, Unavailable):
            await self._fault(message, "503", answer.detail)
        else:
            # Nobody knows whether what was asked was done.
            code = "504" if isinstance(answer, CommitUnknown) else "503"
            await self._fault(message, code, "The service could not answer; it is looking into it.")

    async def _fault(self, message: Msg, code: str, detail: str) -> None:
        headers = {ERROR_CODE: code, ERROR: detail.encode("ascii", "replace").decode()}
        with suppress(NatsError):  # nobody hears us: the caller's own timeout tells
            await self._nc.publish(message.reply, b"", headers=headers)


@asynccontextmanager
async def running(
    nc: Client,
    url: str,
    durable: str,
    database: Database,
    *,
    calls: Sequence[Call],
    handle: Handler,
    archive: Path | None = None,
) -> AsyncIterator[None]:
    """Calls answered, events handled, on a bus that was checked first, and a database that has all it should have.

    Raises Misconfigured when the bus is not ours, or what the database lacks is neither there nor in `archive`.
    """
    await nc.connect(pending_size=0, **connect_options(url, durable))
    try:
        origin = await agree_on_bus(nc, durable)
        await catch_up(nc, durable, database, partial(apply, handle), archive=archive)
        answering = Answering(nc, calls)
        await answering.start()
        tasks = [
            essential(asyncio.create_task(consume(nc, durable, handle), name="the consumer")),
            essential(asyncio.create_task(watch_bus(nc, durable, origin), name="the guard of the bus")),
            essential(asyncio.create_task(keep_position(nc, durable, database), name="the guard of the database")),
        ]
        try:
            yield
        finally:
            await cancelled(*tasks)
            await answering.stop()
    finally:
        await close(nc)


async def missing(nc: Client, durable: str, database: Database, ping: Callable[[Connection], None]) -> Missing:
    """What a consuming service needs and cannot have; `ping` raises when its tables cannot be read."""
    absent = {"nats": bus_missing(nc, durable), "database": _database_missing(database, ping)}
    reasons = await asyncio.gather(*absent.values())
    return {part: reason for part, reason in zip(absent, reasons, strict=True) if reason}


async def _database_missing(database: Database, ping: Callable[[Connection], None]) -> str | None:
    try:
        async with asyncio.timeout(PART_TIMEOUT_S):
            await database.write(ping)  # which a database that is locked, full or read-only does not let us
    except TimeoutError:
        return f"it does not answer within {PART_TIMEOUT_S} s"
    except (SQLAlchemyError, OSError) as error:
        return type(error).__name__
    return None
