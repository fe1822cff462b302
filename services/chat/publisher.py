"""From the outbox to the stream: every settled event, at least once; consumers count it once."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import OutboundBufferLimitError
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError

from services.chat.deadline import Deadline
from services.chat.outbox import Outbox
from shared import streams
from shared.errors import Unanswered, Unavailable
from shared.events import CONTENT_TYPE, Event, GenerationCompleted, encode

log = structlog.get_logger()

GROUP_MAX = 256
ACK_TIMEOUT_S = 5.0
_UNREACHABLE = "The usage stream cannot be reached right now."
RETRY_MAX_S = 2.0
FORGET_AFTER_S = 0.2
# Events wait this long for company, safe in the outbox: what a broker, quota and ledger do for one they do for a few
# at the same price, and not in the way of the next answer. Measured: a quarter off what a lone caller waits.
GATHER_S = 0.025


async def publish(
    js: JetStreamContext, subject: str, event: Event, *, headers: dict[str, str] | None = None, timeout_s: float
) -> int:
    """The event's sequence on the stream, once the stream has it on disk.

    Raises Unavailable when the stream did not take it, Unanswered when nobody knows whether it did.
    """
    try:
        stored = await js.publish(
            subject,
            encode(event),
            timeout=timeout_s,
            stream=streams.STREAM,
            headers={"Content-Type": CONTENT_TYPE, "Nats-Msg-Id": event.id, **(headers or {})},
        )
    except (APIError, NoStreamResponseError, OutboundBufferLimitError) as error:
        if isinstance(error, APIError) and error.err_code == streams.WRONG_LAST_SEQUENCE:
            raise
        raise Unavailable(_UNREACHABLE) from error
    except (NatsError, OSError) as error:
        raise Unanswered(_UNREACHABLE) from error
    return int(stored.seq)


async def publish_promptly(
    nc: Client, subject: str, event: Event, deadline: Deadline, *, headers: dict[str, str] | None = None
) -> int:
    """As `publish`, for a caller who waits."""
    if not nc.is_connected:
        raise Unavailable(_UNREACHABLE)
    return await publish(nc.jetstream(), subject, event, headers=headers, timeout_s=deadline.left_s)


class Publisher:
    """Publishes in groups, in the background, until stopped; what fails is tried again, sooner or later."""

    def __init__(self, nc: Client, outbox: Outbox, *, on_sent: Callable[[GenerationCompleted], None]) -> None:
        self._js = nc.jetstream()
        self._outbox = outbox
        self._on_sent = on_sent
        self._waiting: list[GenerationCompleted] = []
        # Of settlements that the disk did not take: their generations wait for the stream.
        self._awaited: dict[str, asyncio.Event] = {}
        self._sent_ids: list[str] = []
        self._forgetting: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        # Since its last group the stream has taken nothing.
        self.is_refused = False

    @property
    def backlog(self) -> int:
        return len(self._waiting)

    def offer(self, events: Iterable[GenerationCompleted]) -> None:
        """Settled events, which the outbox has."""
        self._waiting.extend(events)
        self._wake.set()

    async def deliver(self, event: GenerationCompleted, *, timeout_s: float) -> bool:
        """An event that the outbox could not take. Whether the stream has it in time; it goes on trying."""
        taken = self._awaited[event.id] = asyncio.Event()
        self.offer([event])
        try:
            async with asyncio.timeout(timeout_s):
                await taken.wait()
        except TimeoutError:
            return False
        finally:
            del self._awaited[event.id]
        return True

    async def run(self) -> None:
        retry_s = 0.1
        while True:
            await self._wake.wait()
            if self.backlog < GROUP_MAX:
                await asyncio.sleep(GATHER_S)
            if await self.flush():
                retry_s = 0.1
            else:
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_MAX_S, retry_s * 2)

    async def flush(self) -> bool:
        """One group. False when the stream did not take all of it: those stay, and keep their id."""
        self._wake.clear()
        group, self._waiting = self._waiting[:GROUP_MAX], self._waiting[GROUP_MAX:]
        try:
            results = await asyncio.gather(
                *(publish(self._js, streams.GENERATION_COMPLETED, event, timeout_s=ACK_TIMEOUT_S) for event in group),
                return_exceptions=True,
            )
        except asyncio.CancelledError:
            self._waiting[:0] = group  # nobody knows what became of them: they keep their id
            raise
        errors = [result for result in results if isinstance(result, BaseException)]
        unsent = [event for event, result in zip(group, results, strict=True) if isinstance(result, BaseException)]
        sent = [event for event, result in zip(group, results, strict=True) if isinstance(result, int)]
        for event in sent:
            self._on_sent(event)
            if awaited := self._awaited.get(event.id):
                awaited.set()
        self.forget_soon([event.id for event in sent])
        self._waiting[:0] = unsent
        self.is_refused = bool(unsent)
        if self._waiting:
            self._wake.set()
        if unsent:
            log.warning(
                "events_not_published", waiting=len(self._waiting), error=repr(errors[0].__cause__ or errors[0])
            )
        return not unsent

    def forget_soon(self, event_ids: list[str]) -> None:
        """What the outbox need not keep: now, or once its disk lets it."""
        self._sent_ids += event_ids
        if self._forgetting is None and self._sent_ids:
            self._forgetting = asyncio.create_task(self._forget())

    async def _forget(self) -> None:
        """Many together: nobody waits for it, and what is not forgotten is published once more and counted once."""
        wait_s = FORGET_AFTER_S
        while self._sent_ids:
            await asyncio.sleep(wait_s)
            wait_s = FORGET_AFTER_S if await self._forget_sent() else RETRY_MAX_S
        self._forgetting = None

    async def _forget_sent(self) -> bool:
        """False when the disk refuses: they stay for the next time."""
        event_ids, self._sent_ids = self._sent_ids, []
        try:
            await self._outbox.forget(event_ids)
        except sqlite3.Error as error:
            log.error("outbox_not_cleaned", events=len(event_ids), error=str(error))
            self._sent_ids += event_ids
            return False
        return True

    async def close(self) -> None:
        """Forget what the stream has, before the outbox closes."""
        if self._forgetting:
            self._forgetting.cancel()
            await self._forget_sent()
