"""The rules of the quota, pure: what is left, what a generation may take, what people are shown."""

from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from math import ceil

from shared.calls import Pending, Usage
from shared.plans import Period, Plan, Weights, weighted_tokens

# While others' generations hold what is left, asking again soon makes sense; what is used only the reset brings back.
RETRY_WHILE_HELD_S = 5


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a limit leaves. Without a limit everything fits; a total above the limit leaves zero, never less."""

    limit_tokens: int | None
    used_tokens: int
    held_tokens: int

    @property
    def available_tokens(self) -> int | None:
        if self.limit_tokens is None:
            return None
        return max(0, self.limit_tokens - self.used_tokens - self.held_tokens)

    @property
    def is_used_up(self) -> bool:
        return self.limit_tokens is not None and self.used_tokens >= self.limit_tokens

    def output_granted(
        self, weights: Weights, *, input_tokens_max: int, output_tokens_min: int, output_tokens_max: int
    ) -> int | None:
        """The output that fits beside the whole input, at most what is asked; None when even the least does not."""
        available = self.available_tokens
        if available is None:
            return output_tokens_max
        granted = output_tokens_max
        left = available - _dearest_input(weights) * input_tokens_max
        if left < weights.output * output_tokens_max:
            granted = int(left // weights.output) if weights.output else 0
        return granted if granted >= max(1, output_tokens_min) else None


def useful_output_tokens(plan: Plan, *, output_tokens_min: int, output_tokens_max: int) -> int:
    """The least output that is worth asking Claude for: of a generation that wants less, all that it wants."""
    return max(output_tokens_min, min(plan.output_tokens_min, output_tokens_max))


def hold_tokens(weights: Weights, *, input_tokens_max: int, output_tokens_max: int) -> int:
    """The most that a generation can come to count for."""
    return ceil(_dearest_input(weights) * input_tokens_max + weights.output * output_tokens_max)


def _dearest_input(weights: Weights) -> Decimal:
    # Only the provider knows, afterwards, which of the input it wrote to its cache or read from there.
    return max(weights.input, weights.cache_creation, weights.cache_read)


def period_at(moment: datetime, plan: Plan, time_zone: str | None) -> Period:
    """The user's period. A time zone that this machine does not know is the plan's: one odd event stops nobody."""
    try:
        return Period.containing(moment, plan.period, time_zone or plan.time_zone)
    except ValueError:
        return Period.containing(moment, plan.period, plan.time_zone)


@dataclass(frozen=True, slots=True)
class Totals:
    """Raw tokens of one user in one period; weights are applied when they are read."""

    tokens_used: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0

    def __add__(self, other: "Totals | Pending") -> "Totals":
        return Totals(
            self.tokens_used + other.tokens_used,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_creation_input_tokens + other.cache_creation_input_tokens,
            self.cache_read_input_tokens + other.cache_read_input_tokens,
        )


@dataclass(frozen=True, slots=True)
class Account:
    """A user as the quota sees them at one moment."""

    user_id: str
    plan: Plan
    period: Period
    totals: Totals
    held_tokens: int

    @property
    def allowance(self) -> Allowance:
        # Corrections may bring a total below zero; they never make a plan larger.
        return Allowance(self.plan.limit_tokens, max(0, self.used_tokens), self.held_tokens)

    @property
    def used_tokens(self) -> int:
        totals = self.totals
        return weighted_tokens(
            self.plan.weights,
            tokens_used=totals.tokens_used,
            input_tokens=totals.input_tokens,
            output_tokens=totals.output_tokens,
            cache_creation_input_tokens=totals.cache_creation_input_tokens,
            cache_read_input_tokens=totals.cache_read_input_tokens,
        )

    def holding(self, tokens: int) -> "Account":
        return replace(self, held_tokens=self.held_tokens + tokens)

    def including(self, pending: Pending) -> "Account":
        """With usage that is durable but not settled yet, if it belongs to this period."""
        if not self.period.covers(pending.started_at):
            return self
        return replace(self, totals=self.totals + pending)

    def retry_after_s(self, now: datetime) -> int:
        waits_for_reset = self.allowance.is_used_up or not self.held_tokens
        if waits_for_reset and self.period.end is not None:
            return max(1, ceil((self.period.end - now).total_seconds()))
        return RETRY_WHILE_HELD_S

    @property
    def usage(self) -> Usage:
        allowance, plan = self.allowance, self.plan
        used, limit = allowance.used_tokens, plan.limit_tokens
        return Usage(
            tier=plan.tier,
            tokens_used=used,
            tokens_limit=limit,
            tokens_remaining=None if limit is None else max(0, limit - used),
            usage_percentage=_percentage(used, limit),
            tokens_held=self.held_tokens,
            period=plan.period,
            period_start=None if plan.period == "none" else self.period.start,
            resets_at=self.period.end,
            upgrade_to=plan.upgrade_to,
            cost_usd=str(plan.cost_usd(used)),
        )


def _percentage(used: int, limit: int | None) -> float:
    """One decimal, halves up; 0 without a limit, and 100 where the limit is 0."""
    if limit is None:
        return 0.0
    if limit == 0:
        return 100.0
    return (used * 2000 + limit) // (limit * 2) / 10
