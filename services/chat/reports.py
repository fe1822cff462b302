"""Usage that a back end reports: durable on the stream before it is acknowledged, and once a key."""

import sqlite3

import structlog
from nats.aio.client import Client

from services.chat.deadline import Deadline
from services.chat.idempotency import publish_once
from services.chat.outbox import Outbox
from services.chat.problems import Problem
from services.chat.publisher import Publisher, publish_promptly
from services.chat.quota import Quota
from shared import streams
from shared.errors import Unanswered
from shared.events import GenerationCompleted

log = structlog.get_logger()


class Reports:
    def __init__(self, nc: Client, outbox: Outbox, publisher: Publisher, quota: Quota) -> None:
        self._nc, self._outbox, self._publisher, self._quota = nc, outbox, publisher, quota

    async def record(self, event: GenerationCompleted, deadline: Deadline) -> None:
        """Raises Unavailable when the stream did not take it; then nothing is recorded.

        Raises Problem 503 when nobody knows whether it is: then the disk did not take it either.
        """
        await self._outbox.admit()
        try:
            await publish_promptly(self._nc, streams.GENERATION_COMPLETED, event, deadline)
        except Unanswered as unanswered:
            # It was sent and no answer came: the stream may have it. With the same id on the outbox it surely
            # will, and is counted once; a caller told to try again would have it counted twice.
            try:
                await self._outbox.settle(event)
            except sqlite3.Error as error:
                log.error("outbox_cannot_settle", event_id=event.id, error=str(error))
                if not await self._publisher.deliver(event, timeout_s=deadline.left_s):
                    raise _not_confirmed() from unanswered
            else:
                self._publisher.offer([event])
            self._quota.remember(event)
        else:
            self._quota.remember(event)
            self._quota.published(event)

    async def record_once(self, event: GenerationCompleted, deadline: Deadline, *, key: str, body: bytes) -> None:
        """Once for each key, for ever and across replicas; refused or unanswered, the caller may repeat it.

        Raises Problem 409 when the key came with another body before.
        """
        recorded = await publish_once(self._nc, event, deadline, subject_of=streams.keyed, key=key, body=body)
        if recorded.event_id == event.id:
            self._quota.remember(event)
            self._quota.published(event)


def _not_confirmed() -> Problem:
    return Problem(
        503,
        "Report not confirmed",
        "Neither disk nor usage stream takes the report now, and it may still be counted. "
        "Reports with an Idempotency-Key can be repeated safely.",
        headers={"Retry-After": "5"},
    )
