"""The FastStream side of the bus: calls, each answered by any replica, faults included."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import structlog
from faststream.nats import NatsBroker
from faststream.nats.message import NatsMessage
from faststream.nats.response import NatsResponse
from nats.errors import Error as NatsError
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from shared.broker import ERROR, ERROR_CODE, Encodable, connect_options, end_process
from shared.consumer import Handler, consume
from shared.database import Database
from shared.errors import BadCall, Unavailable
from shared.streams import check
from shared.telemetry import Missing

log = structlog.get_logger()
Request = TypeVar("Request", bound=BaseModel)

# Calls of one replica under way at once; by default FastStream answers them one after the other.
CALLS_MAX = 256


def create_broker(url: str, name: str) -> NatsBroker:
    return NatsBroker(url, **connect_options(name), apply_types=False, logger=None, graceful_timeout=10)


async def _whole(message: Any) -> Any:
    """Hand the handler the message itself: it decodes and acknowledges at its own edge."""
    return message


def on_call(
    broker: NatsBroker,
    subject: str,
    request_type: type[Request],
    answer: Callable[[Request], Awaitable[Encodable]],
) -> None:
    """Answer `subject` with `answer`, in the queue group of the service. Every fault is an answer, too."""

    async def respond(message: NatsMessage) -> NatsResponse:
        try:
            request = request_type.model_validate_json(message.body)
            return NatsResponse((await answer(request)).model_dump_json().encode())
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
            return _fault("400", f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        except BadCall as problem:
            return _fault("400", str(problem))
        except Unavailable as problem:
            return _fault("503", problem.detail)
        except Exception:
            log.exception("call_failed", subject=subject)
            return _fault("503", "The service could not answer; it is looking into it.")

    broker.subscriber(subject, queue=subject.partition(".")[0], decoder=_whole, max_workers=CALLS_MAX)(respond)


def _fault(code: str, detail: str) -> NatsResponse:
    return NatsResponse(b"", headers={ERROR_CODE: code, ERROR: detail.encode("ascii", "replace").decode()})


@asynccontextmanager
async def running(broker: NatsBroker, durable: str, handle: Handler) -> AsyncIterator[None]:
    """Calls answered, events handled, on a bus that was checked first. Raises Misconfigured when it is not ours."""
    await broker.connect()
    nc = broker.connection
    await check(nc.jetstream(), durable)
    await broker.start()
    await nc.flush()  # only now has the broker heard of the subscriptions: who calls from here on is answered
    consuming = asyncio.create_task(consume(nc, durable, handle))
    consuming.add_done_callback(_consumer_ended)
    try:
        yield
    finally:
        consuming.cancel()
        with suppress(asyncio.CancelledError):
            await consuming
        with suppress(NatsError):
            await broker.stop()


def _consumer_ended(consuming: asyncio.Task[None]) -> None:
    if not consuming.cancelled() and (error := consuming.exception()):
        end_process(f"the consumer failed: {error!r}")


async def missing(broker: NatsBroker, database: Database, ping: Callable[[Connection], None]) -> Missing:
    """What a consuming service needs and cannot reach; `ping` raises when its tables cannot be read."""
    absent: Missing = {}
    if not await broker.ping(timeout=1):
        absent["nats"] = "the broker does not answer"
    try:
        await database.read(ping)
    except (SQLAlchemyError, OSError) as error:
        absent["database"] = type(error).__name__
    return absent
