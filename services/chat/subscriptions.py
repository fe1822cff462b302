"""A change of plan: an event on the stream like all that decides a total, answered once quota knows of it."""

import asyncio

import structlog
from nats.aio.client import Client
from nats.aio.subscription import Subscription as NatsSubscription

from services.chat.publisher import publish
from services.chat.quota import Quota
from shared import streams
from shared.calls import Usage
from shared.errors import Unavailable
from shared.events import Subscription, SubscriptionChanged, utc_now

log = structlog.get_logger()

ACK_TIMEOUT_S = 1.5
# The change is durable by then; waiting for quota only makes "the next check" true for the impatient.
APPLIED_WITHIN_S = 2.0


class Subscriptions:
    def __init__(self, nc: Client, quota: Quota) -> None:
        self._nc, self._quota = nc, quota

    async def change(self, user_id: str, *, tier: str, time_zone: str | None, actor: str) -> None:
        """Raises Unavailable when the stream did not take the change."""
        if not self._nc.is_connected:
            raise Unavailable("The usage stream cannot be reached right now.")
        event = SubscriptionChanged(
            subject=user_id,
            data=Subscription(user_id=user_id, tier=tier, time_zone=time_zone, changed_at=utc_now(), actor=actor),
        )
        updates = await self._nc.subscribe(streams.quota_updated(user_id))
        try:
            await publish(self._nc.jetstream(), streams.SUBSCRIPTION_CHANGED, event, timeout_s=ACK_TIMEOUT_S)
            await self._applied(updates, user_id, tier)
        finally:
            await updates.unsubscribe()

    async def _applied(self, updates: NatsSubscription, user_id: str, tier: str) -> None:
        try:
            async with asyncio.timeout(APPLIED_WITHIN_S):
                async for _ in updates.messages:
                    if Usage.model_validate_json(await self._quota.usage(user_id)).tier == tier:
                        return
        except (TimeoutError, Unavailable):
            log.warning("subscription_not_applied_yet", user_id=user_id)
