"""The FastStream side of the bus, for the services that consume: calls answered, event batches handled."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.nats.message import NatsBatchMessage, NatsMessage
from faststream.nats.response import NatsResponse
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import DataError, IntegrityError

from shared.broker import connect_options, end_process
from shared.calls import ERROR, ERROR_CODE, Encodable
from shared.errors import BadCall, PoisonMessage, Unavailable
from shared.events import Event, decode
from shared.quarantine import Poison
from shared.streams import STREAM, check

log = structlog.get_logger()
Request = TypeVar("Request", bound=BaseModel)

# A batch is handed on when it is full or this old, whichever is first: the price of a live total's freshness.
BATCH_SIZE = 500
BATCH_AGE_S = 0.05
# Calls of one replica under way at once; by default FastStream answers them one after the other.
CALLS_MAX = 256


@dataclass(frozen=True, slots=True)
class Delivery:
    subject: str
    body: bytes

    def read(self) -> Event | Poison:
        try:
            return decode(self.body)
        except PoisonMessage as problem:
            return Poison(self.subject, self.body, str(problem))


Handler = Callable[[list[Event], list[Poison]], Awaitable[None]]


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


def on_events(broker: NatsBroker, durable: str, handle: Handler) -> None:
    """Hand the durable's events to `handle` in batches. Acknowledged after it returns, never before.

    What raises is delivered again, later and later. A batch that the database rejects for its content is taken
    message by message, so that one bad event never holds up the others.
    """

    async def consume(message: NatsBatchMessage) -> None:
        deliveries = [Delivery(raw.subject, raw.data) for raw in message.raw_message]
        try:
            await _apply(handle, deliveries)
        except Exception:
            delivered = max(raw.metadata.num_delivered or 1 for raw in message.raw_message)
            delay_s = min(30.0, 0.25 * 2**delivered) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            log.exception("batch_failed", durable=durable, events=len(deliveries), again_in_s=round(delay_s, 2))
            await message.nack(delay=delay_s)
        else:
            await message.ack()

    broker.subscriber(
        ">",
        durable=durable,
        stream=JStream(STREAM, declare=False),
        pull_sub=PullSub(batch_size=BATCH_SIZE, timeout=BATCH_AGE_S, batch=True),
        inbox_prefix=f"_INBOX_{durable}.".encode(),
        decoder=_whole,
        ack_policy=AckPolicy.MANUAL,
        no_reply=True,
    )(consume)


async def _apply(handle: Handler, deliveries: list[Delivery]) -> None:
    readings = [delivery.read() for delivery in deliveries]
    poison = [reading for reading in readings if isinstance(reading, Poison)]
    events = [reading for reading in readings if not isinstance(reading, Poison)]
    try:
        await handle(events, poison)
    except (DataError, IntegrityError) as error:
        if len(deliveries) > 1:
            for delivery in deliveries:
                await _apply(handle, [delivery])
        else:
            await handle([], [Poison(d.subject, d.body, type(error.orig).__name__) for d in deliveries])


@asynccontextmanager
async def running(broker: NatsBroker, durable: str) -> Any:
    """The broker started on a bus that was checked, and watched: a lost consumer ends the process."""
    await broker.connect()
    js = broker.connection.jetstream()
    await check(js, durable)
    await broker.start()
    watching = asyncio.create_task(_watch(broker, durable))
    try:
        yield
    finally:
        watching.cancel()
        with suppress(NatsError):
            await broker.stop()


async def _watch(broker: NatsBroker, durable: str) -> None:
    # From outside the pull loop, which spins without a word when its consumer is gone or its client closed.
    nc = broker.connection
    while not nc.is_closed:
        await asyncio.sleep(5)
        try:
            await nc.jetstream().consumer_info(STREAM, durable, timeout=2)
        except NotFoundError:
            return end_process(f"the broker has no consumer {durable} any more")
        except (NatsError, OSError, TimeoutError) as error:
            log.warning("consumer_not_seen", durable=durable, error=repr(error))
    return end_process("the connection to the broker is closed")
