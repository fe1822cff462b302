"""Usage that a back end reports: durable on the stream before it is acknowledged, and once a key."""

import hashlib

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NoStreamResponseError

from services.chat.outbox import Outbox
from services.chat.problems import Problem
from services.chat.publisher import Publisher, publish
from services.chat.quota import Quota
from shared import streams
from shared.errors import Unavailable
from shared.events import GenerationCompleted

# Within the two seconds that callers are promised.
ACK_TIMEOUT_S = 1.5
BODY_DIGEST = "Chatrail-Body-Sha256"


class Reports:
    def __init__(self, nc: Client, outbox: Outbox, publisher: Publisher, quota: Quota) -> None:
        self._nc, self._outbox, self._publisher, self._quota = nc, outbox, publisher, quota

    async def record(self, event: GenerationCompleted) -> None:
        """Raises Unavailable when the stream did not take it; then nothing is recorded."""
        if not self._nc.is_connected:
            raise Unavailable("The usage stream cannot be reached right now.")
        try:
            await publish(self._nc.jetstream(), streams.GENERATION_COMPLETED, event, timeout_s=ACK_TIMEOUT_S)
        except Unavailable as error:
            if isinstance(error.__cause__, APIError | NoStreamResponseError):
                raise
            # It was sent and no answer came: the stream may have it. With the same id on the outbox it surely
            # will, and is counted once; a caller told to try again would have it counted twice.
            await self._outbox.settle(event)
            self._quota.remember(event)
            self._publisher.offer([event])
        else:
            self._quota.remember(event)
            self._quota.published(event)

    async def record_once(self, event: GenerationCompleted, *, key: str, body: bytes) -> None:
        """As `record`, once for each key, for ever and across replicas: the stream allows each key one message.

        Raises Problem 409 when the key came with another body before.
        """
        js, subject = self._nc.jetstream(), streams.keyed(hashlib.sha256(key.encode()).hexdigest())
        digest = hashlib.sha256(body).hexdigest()
        only_first = {"Nats-Expected-Last-Subject-Sequence": "0", BODY_DIGEST: digest}
        try:
            await publish(js, subject, event, headers=only_first, timeout_s=ACK_TIMEOUT_S)
        except APIError:  # the key has its message already
            if await self._first_digest(subject) != digest:
                raise Problem(
                    409,
                    "Idempotency key used before",
                    "This Idempotency-Key came with another body; use a new key for each report.",
                ) from None
        else:
            self._quota.remember(event)
            self._quota.published(event)

    async def _first_digest(self, subject: str) -> str | None:
        try:
            first = await self._nc.jetstream().get_last_msg(streams.STREAM, subject)
        except (NatsError, OSError) as error:
            raise Unavailable("The usage stream cannot be reached right now.") from error
        return (first.headers or {}).get(BODY_DIGEST)
