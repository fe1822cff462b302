"""The answering side of the bus: calls, each answered by any replica of the service, faults included."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from shared.broker import BROKER_GONE, ERROR, ERROR_CODE, close, connect_options, end_process
from shared.consumer import Handler, consume
from shared.database import Database
from shared.errors import BadCall, Unavailable
from shared.streams import check
from shared.telemetry import Missing

log = structlog.get_logger()

# Calls of one replica under way at once. Whoever asks beyond it hears so at once, instead of waiting in vain.
CALLS_MAX = 4096
LAST_ANSWERS_S = 2.0


@dataclass(frozen=True, slots=True)
class Call:
    """Requests on `subject`, each answered by `answer`."""

    subject: str
    request_type: type[BaseModel]
    answer: Callable[[Any], Awaitable[BaseModel]]


class Answering:
    """Subscribed in the queue group of the service. No call waits for another, and every fault is an answer."""

    def __init__(self, nc: Client, calls: Sequence[Call]) -> None:
        self._nc, self._calls = nc, calls
        self._under_way: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Returns when the broker has heard of the subscriptions: who calls from then on is answered."""
        self._subscriptions = [
            await self._nc.subscribe(call.subject, queue=call.subject.partition(".")[0], cb=self._heard(call))
            for call in self._calls
        ]
        await self._nc.flush()

    async def stop(self) -> None:
        """Hear no more, and give the answers that are owed, to callers who still wait for them."""
        try:
            async with asyncio.timeout(LAST_ANSWERS_S):
                for subscription in self._subscriptions:
                    await subscription.drain()  # type: ignore[no-untyped-call]
                if self._under_way:
                    await asyncio.wait(self._under_way)
        except BROKER_GONE as error:
            log.warning("calls_not_drained", error=repr(error))

    def _heard(self, call: Call) -> Callable[[Msg], Awaitable[None]]:
        async def heard(message: Msg) -> None:
            if len(self._under_way) >= CALLS_MAX:
                await self._fault(message, "503", "The service is busy.")
                return
            # A task of its own: the client hands over the next message when this function returns.
            answering = asyncio.create_task(self._respond(call, message))
            self._under_way.add(answering)
            answering.add_done_callback(self._under_way.discard)

        return heard

    async def _respond(self, call: Call, message: Msg) -> None:
        try:
            answer = await call.answer(call.request_type.model_validate_json(message.data))
            await self._nc.publish(message.reply, answer.model_dump_json().encode())
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
            await self._fault(message, "400", f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        except BadCall as problem:
            await self._fault(message, "400", str(problem))
        except Unavailable as problem:
            await self._fault(message, "503", problem.detail)
        except NatsError as error:
            log.warning("call_not_answered", subject=call.subject, error=repr(error))
        except Exception:
            log.exception("call_failed", subject=call.subject)
            await self._fault(message, "503", "The service could not answer; it is looking into it.")

    async def _fault(self, message: Msg, code: str, detail: str) -> None:
        headers = {ERROR_CODE: code, ERROR: detail.encode("ascii", "replace").decode()}
        with suppress(NatsError):  # nobody hears us: the caller's own timeout tells
            await self._nc.publish(message.reply, b"", headers=headers)


@asynccontextmanager
async def running(
    nc: Client, url: str, durable: str, *, calls: Sequence[Call], handle: Handler
) -> AsyncIterator[None]:
    """Calls answered, events handled, on a bus that was checked first. Raises Misconfigured when it is not ours."""
    await nc.connect(url, pending_size=0, **connect_options(durable))
    await check(nc.jetstream(), durable)
    answering = Answering(nc, calls)
    await answering.start()
    consuming = asyncio.create_task(consume(nc, durable, handle))
    consuming.add_done_callback(_consumer_ended)
    try:
        yield
    finally:
        consuming.cancel()
        await asyncio.wait([consuming])
        await answering.stop()
        await close(nc)


def _consumer_ended(consuming: asyncio.Task[None]) -> None:
    if not consuming.cancelled() and (error := consuming.exception()):
        end_process(f"the consumer failed: {error!r}")


async def missing(nc: Client, database: Database, ping: Callable[[Connection], None]) -> Missing:
    """What a consuming service needs and cannot reach; `ping` raises when its tables cannot be read."""
    absent: Missing = {}
    if not await _answers(nc):
        absent["nats"] = "the broker does not answer"
    try:
        await database.read(ping)
    except (SQLAlchemyError, OSError) as error:
        absent["database"] = type(error).__name__
    return absent


async def _answers(nc: Client) -> bool:
    try:
        if nc.is_connected:  # while it reconnects, a flush returns at once, as if all were well
            await nc.flush(timeout=1)
        return nc.is_connected
    except (NatsError, OSError):
        return False
