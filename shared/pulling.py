"""Messages of a durable consumer, asked for ahead: the next batch arrives while one is being committed."""

import asyncio
import json
from contextlib import suppress
from time import monotonic

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError

from shared.broker import BROKER_GONE
from shared.streams import STREAM

log = structlog.get_logger()

BATCH_SIZE = 1000
# Those that come within BATCH_AGE_S of a message share its transaction. One that was waited for so long that nobody
# seems to be about has it for itself, at once.
BATCH_AGE_S, ALONE_AFTER_S = 0.04, 0.08
# A request that was under way when the broker died is lost; the next one is made after this long.
PULL_S = 1.0
GRACE_S = 0.25

REQUEST_OVER, PENDING = "408", "Nats-Pending-Messages"


class Pulling:
    """nats-py's `fetch` makes a task for each message: it costs more than to decode the message and insert it."""

    def __init__(self, nc: Client, durable: str) -> None:
        self._nc = nc
        self._subject, self._inbox = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{durable}", nc.new_inbox()
        self._request = json.dumps({"batch": BATCH_SIZE, "expires": int(PULL_S * 1e9)}).encode()
        self._arrived: list[Msg] = []
        # What was asked for and may still come, and until when.
        self._owed, self._owed_until = 0, 0.0
        self._wake = asyncio.Event()

    async def start(self) -> None:
        # Two batches at most are on their way: nats-py has no need to drop what it calls slow.
        self._subscription = await self._nc.subscribe(self._inbox, cb=self._heard, pending_bytes_limit=0)

    async def stop(self) -> list[Msg]:
        """Hear no more. The messages that came and were in no batch yet."""
        with suppress(*BROKER_GONE):
            await self._subscription.unsubscribe()
        return self._take(len(self._arrived))

    async def next_batch(self) -> list[Msg]:
        """At least one message. Raises ConnectionClosedError when there will never be another."""
        begun = monotonic()
        while not self._arrived:
            await self._ask()
            await self._woken(PULL_S + GRACE_S)
        arrived = monotonic()
        deadline = arrived + BATCH_AGE_S if arrived < begun + ALONE_AFTER_S else arrived
        while len(self._arrived) < BATCH_SIZE and (left_s := deadline - monotonic()) > 0:
            await self._woken(left_s)
        batch = self._take(BATCH_SIZE)
        await self._ask()
        return batch

    def _take(self, number: int) -> list[Msg]:
        taken, self._arrived = self._arrived[:number], self._arrived[number:]
        return taken

    async def _ask(self) -> None:
        """For a batch, unless one is on its way."""
        if self._owed and monotonic() > self._owed_until:
            log.warning("events_not_pulled", owed=self._owed)
            self._owed = 0
        if len(self._arrived) + self._owed >= 2 * BATCH_SIZE or self._owed >= BATCH_SIZE:
            return
        try:
            await self._nc.publish(self._subject, self._request, reply=self._inbox)
        except ConnectionClosedError:
            raise
        except (NatsError, OSError) as error:
            log.warning("events_not_pulled", error=repr(error))
        else:
            self._owed += BATCH_SIZE
            self._owed_until = monotonic() + PULL_S + GRACE_S

    async def _heard(self, message: Msg) -> None:
        if message.reply:
            self._owed = max(0, self._owed - 1)
            self._arrived.append(message)
            if len(self._arrived) in (1, BATCH_SIZE):
                self._wake.set()
            return
        # A request is over: what it did not bring is not owed any more.
        told = message.headers or {}
        self._owed = max(0, self._owed - int(told.get(PENDING, BATCH_SIZE)))
        if told.get("Status") == REQUEST_OVER:
            self._wake.set()
        else:  # the next request waits for its time: whatever this is, it is not over in a moment
            log.warning("events_not_pulled", status=told.get("Status"), reason=told.get("Description"))

    async def _woken(self, within_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._wake.wait()
        self._wake.clear()
