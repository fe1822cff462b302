"""The stream, read as the record that it is: from any place to any other, in order, nothing left out.

For whoever folds what happened: audits, replays, seals. Nothing is acknowledged and no durable moves.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from shared.broker import BROKER_GONE
from shared.errors import Unavailable
from shared.streams import STREAM

BATCH_SIZE = 1000
FIRST = datetime(1970, 1, 1, tzinfo=UTC)
# A reader that says nothing for so long is gone, and the broker forgets it.
READER_FORGOTTEN_S = 30.0
ANSWER_WITHIN_S = 3.0
AGAIN_S = 0.5
PATIENCE_S = 30.0


class Recorded(NamedTuple):
    """One message of the stream, as it was stored."""

    sequence: int
    subject: str
    body: bytes
    stored_at: datetime
    headers: Mapping[str, str] | None = None


async def bounds(nc: Client, *, stream: str = STREAM) -> tuple[int, int]:
    """The sequences of the first and the last message; of an empty stream the last is smaller than the first."""
    state = (await nc.jetstream().stream_info(stream)).state
    return max(1, state.first_seq), state.last_seq


async def recorded(nc: Client, *, first: int, last: int, stream: str = STREAM) -> AsyncGenerator[list[Recorded]]:
    """All messages with sequences from `first` to `last`, in order, in batches of at most BATCH_SIZE.

    Sequences that the stream does not have are passed over. A broker that is away is waited for; raises Unavailable
    when it does not answer for PATIENCE_S.
    """
    sequence, heard_at = first, monotonic()
    while sequence <= last:
        reader = _Reader(nc, stream)
        try:
            await reader.start(sequence)
            while sequence <= last:
                batch = await reader.next_batch()
                heard_at = monotonic()
                yield [message for message in batch if message.sequence <= last]
                sequence = batch[-1].sequence + 1
        except _Interrupted as interruption:
            if monotonic() - heard_at > PATIENCE_S:
                raise Unavailable("The usage stream cannot be read to its end right now.") from interruption
            await asyncio.sleep(AGAIN_S)
            with suppress(NatsError, OSError):  # who is away is asked again
                last = await _last_there(nc, stream, last)
        finally:
            await reader.stop()


async def _last_there(nc: Client, stream: str, last: int) -> int:
    """The last sequence up to `last` that the stream has: of a damaged one the end may be lost."""
    asked = json.dumps({"deleted_details": True}).encode()
    told = await nc.request(f"$JS.API.STREAM.INFO.{stream}", asked, timeout=ANSWER_WITHIN_S)
    lost = set(json.loads(told.data).get("state", {}).get("deleted") or ())
    while last in lost:
        last -= 1
    return last


class _Interrupted(Exception):
    """What comes next is not known: begin again behind what was handed on."""


class _Reader:
    """A pull consumer of its own, asked for the next batch while the one before is being worked on."""

    def __init__(self, nc: Client, stream: str) -> None:
        self._nc, self._stream, self._inbox = nc, stream, nc.new_inbox()
        self._arrived: list[Msg] = []
        self._is_over = asyncio.Event()
        self._delivered = 0

    async def start(self, sequence: int) -> None:
        self._subscription = await self._nc.subscribe(self._inbox, cb=self._heard, pending_bytes_limit=0)
        config = ConsumerConfig(
            ack_policy=AckPolicy.NONE,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=sequence,
            inactive_threshold=READER_FORGOTTEN_S,
            mem_storage=True,
            num_replicas=1,
        )
        try:
            self._name = (await self._nc.jetstream().add_consumer(self._stream, config)).name
            await self._ask()
        except (NatsError, APIError, OSError) as error:
            raise _Interrupted from error

    async def stop(self) -> None:
        with suppress(*BROKER_GONE):
            await self._subscription.unsubscribe()
        with suppress(AttributeError, APIError, *BROKER_GONE):
            await self._nc.jetstream().delete_consumer(self._stream, self._name)

    async def next_batch(self) -> list[Recorded]:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                await self._is_over.wait()
            arrived, self._arrived = self._arrived, []
            self._is_over.clear()
            await self._ask()
        except (TimeoutError, NatsError, OSError) as error:
            raise _Interrupted from error
        if not arrived:
            raise _Interrupted
        return [self._read(message) for message in arrived]

    async def _ask(self) -> None:
        request = json.dumps({"batch": BATCH_SIZE, "no_wait": True}).encode()
        await self._nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}", request, reply=self._inbox)

    async def _heard(self, message: Msg) -> None:
        if message.reply:
            self._arrived.append(message)
        # A whole batch, or the broker's word that there is no more of it.
        if not message.reply or len(self._arrived) == BATCH_SIZE:
            self._is_over.set()

    def _read(self, message: Msg) -> Recorded:
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<stream sequence>.<consumer sequence>.<nanoseconds>.<pending>
        *_, sequence, delivered, nanoseconds, _pending = message.reply.split(".")
        self._delivered += 1
        if int(delivered) != self._delivered:
            raise _Interrupted(f"message {self._delivered} of the reader was lost")
        stored_at = FIRST + timedelta(microseconds=int(nanoseconds) // 1000)
        return Recorded(int(sequence), message.subject, message.data, stored_at, message.headers)
