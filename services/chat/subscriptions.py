"""A change of plan: an event on the stream like all that decides a total, answered once quota knows of it."""

from nats.aio.client import Client

from services.chat.applied import applied
from services.chat.deadline import Deadline
from services.chat.publisher import publish_promptly
from shared import streams
from shared.events import Subscription, SubscriptionChanged, utc_now


class Subscriptions:
    def __init__(self, nc: Client) -> None:
        self._nc = nc

    async def change(self, user_id: str, deadline: Deadline, *, tier: str, time_zone: str | None, actor: str) -> None:
        """Raises Unavailable when the stream did not take the change."""
        event = SubscriptionChanged(
            subject=user_id,
            data=Subscription(user_id=user_id, tier=tier, time_zone=time_zone, changed_at=utc_now(), actor=actor),
        )
        sequence = await publish_promptly(self._nc, streams.SUBSCRIPTION_CHANGED, event, deadline)
        await applied(self._nc, sequence, deadline)
