"""Usage that a back end reports: durable on the stream before it is acknowledged, and once a key."""

from nats.aio.client import Client

from services.chat.idempotency import publish_once
from services.chat.outbox import Outbox
from services.chat.publisher import Publisher, publish_promptly
from services.chat.quota import Quota
from shared import streams
from shared.errors import Unanswered
from shared.events import GenerationCompleted


class Reports:
    def __init__(self, nc: Client, outbox: Outbox, publisher: Publisher, quota: Quota) -> None:
        self._nc, self._outbox, self._publisher, self._quota = nc, outbox, publisher, quota

    async def record(self, event: GenerationCompleted) -> None:
        """Raises Unavailable when the stream did not take it; then nothing is recorded."""
        try:
            await publish_promptly(self._nc, streams.GENERATION_COMPLETED, event)
        except Unanswered:
            # It was sent and no answer came: the stream may have it. With the same id on the outbox it surely
            # will, and is counted once; a caller told to try again would have it counted twice.
            await self._outbox.settle(event)
            self._quota.remember(event)
            self._publisher.offer([event])
        else:
            self._quota.remember(event)
            self._quota.published(event)

    async def record_once(self, event: GenerationCompleted, *, key: str, body: bytes) -> None:
        """As `record`, once for each key, for ever and across replicas; unanswered, the caller may repeat it.

        Raises Problem 409 when the key came with another body before.
        """
        recorded = await publish_once(self._nc, event, subject_of=streams.keyed, key=key, body=body)
        if recorded.event_id == event.id:
            self._quota.remember(event)
            self._quota.published(event)
