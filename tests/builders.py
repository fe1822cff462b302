"""Events as the services publish them: a test names what it is about, the rest is as usual."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from hypothesis import strategies as st
from nats.aio.client import Client

from shared import streams
from shared.calls import Authorize
from shared.events import (
    CONTENT_TYPE,
    Adjustment,
    Authorized,
    Event,
    Generation,
    GenerationCompleted,
    Subscription,
    SubscriptionChanged,
    TokenCounts,
    UsageAdjusted,
    encode,
)

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
# Every user id that is legal: dots, stars, slashes, spaces, emoji, all of Unicode but control characters.
USER_IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=128)


def generation_completed(
    user_id: str = "user_1", *, input_tokens: int = 5_282, output_tokens: int = 2_812, **data: Any
) -> GenerationCompleted:
    """A generation of Claude's, 8,094 tokens unless told."""
    cached = {name: data.get(name, 0) for name in ("cache_creation_input_tokens", "cache_read_input_tokens")}
    counts = TokenCounts(input_tokens=input_tokens, output_tokens=output_tokens, **cached)
    return _generation(user_id, {"tokens_used": counts.total, **counts.model_dump(), **data})


def authorized(**data: Any) -> Authorized:
    """What was asked and granted for a generation of a month's plan, of 8,096 tokens unless told."""
    usual = {
        "input_tokens_max": 4_000,
        "output_tokens_asked": 4_096,
        "output_tokens_granted": 4_096,
        "hold_tokens": 8_096,
        "tier": "free",
        "period": "month",
        "period_start": datetime(2026, 11, 1, tzinfo=UTC),
        "resets_at": datetime(2026, 12, 1, tzinfo=UTC),
        "expires_at": NOON + timedelta(minutes=15),
    }
    return Authorized.model_validate(usual | data)


def usage_reported(user_id: str = "user_1", *, tokens_used: int = 8_094, **data: Any) -> GenerationCompleted:
    """A back end's report that does not split its total."""
    split = dict.fromkeys(TokenCounts.model_fields)
    return _generation(
        user_id, {"tokens_used": tokens_used, **split, "model": None, "usage_source": "reported", **data}
    )


def _generation(user_id: str, data: dict[str, Any]) -> GenerationCompleted:
    usual = {
        "generation_id": f"generation_{uuid4().hex}",
        "action_type": "chat_generation",
        "model": "claude-haiku-4-5",
        "outcome": "completed",
        "usage_source": "provider",
        "started_at": NOON,
        "completed_at": data.get("started_at", NOON),
    }
    return GenerationCompleted(subject=user_id, data=Generation(user_id=user_id, **{**usual, **data}))


def subscription_changed(
    user_id: str = "user_1", tier: str = "pro", *, changed_at: datetime = NOON, actor: str = "operator", **data: Any
) -> SubscriptionChanged:
    change = Subscription(user_id=user_id, tier=tier, changed_at=changed_at, actor=actor, **data)
    return SubscriptionChanged(subject=user_id, data=change)


def usage_adjusted(
    user_id: str = "user_1",
    tokens_used: int = -94,
    *,
    effective_at: datetime = NOON,
    reason: str = "counted twice",
    actor: str = "operator",
    **data: Any,
) -> UsageAdjusted:
    adjustment = Adjustment(
        user_id=user_id, tokens_used=tokens_used, reason=reason, actor=actor, effective_at=effective_at, **data
    )
    return UsageAdjusted(subject=user_id, data=adjustment)


def topped_up(
    user_id: str = "user_1", tokens: int = 5_000, *, lasts: bool = False, effective_at: datetime = NOON
) -> UsageAdjusted:
    return usage_adjusted(user_id, 0, top_up_tokens=tokens, outlives_period=lasts, effective_at=effective_at)


async def publish(nats: Client, *events: Event) -> None:
    """Returns once the stream has them."""
    for event in events:
        await nats.jetstream().publish(
            event.type, encode(event), headers={"Nats-Msg-Id": event.id, "Content-Type": CONTENT_TYPE}
        )


async def publish_raw(nats: Client, body: bytes, *, subject: str = streams.GENERATION_COMPLETED) -> None:
    """What no service of ours would publish."""
    await nats.jetstream().publish(subject, body)


def asking(generation_id: str, user_id: str = "user_1") -> Authorize:
    return Authorize(
        generation_id=generation_id, user_id=user_id, input_tokens_max=10, output_tokens_min=1, output_tokens_max=100
    )
