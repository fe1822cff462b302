"""The rules of the quota, pure: what is left, what a generation may take, what people are shown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from shared.calls import LimitState, Pending, Reason, Usage
from shared.events import Threshold
from shared.plans import FOR_EVER, Counts, Limit, Period, Plan, Weights, weighted_tokens
from shared.subscriptions import Calendar

# While others' generations hold what is left, asking again soon makes sense; what is used only the reset brings back.
RETRY_WHILE_HELD_S = 5


def useful_output_tokens(plan: Plan, *, output_tokens_min: int, output_tokens_max: int) -> int:
    """The least output that is worth asking Claude for: of a generation that wants less, all that it wants."""
    return max(output_tokens_min, min(plan.output_tokens_min, output_tokens_max))


def hold_tokens(weights: Weights, *, input_tokens_max: int, output_tokens_max: int) -> int:
    """The most that a generation can come to count for."""
    return ceil(_dearest_input(weights) * input_tokens_max + weights.output * output_tokens_max)


def _dearest_input(weights: Weights) -> Decimal:
    # Only the provider knows, afterwards, which of the input it wrote to its cache or read from there.
    return max(weights.input, weights.cache_creation, weights.cache_read)


def _for_model(weights: Weights, model: str | None) -> Weights:
    """The same, with the model's weight multiplied in."""
    factor = weights.of_model(model)
    if factor == 1:
        return weights
    kinds = {kind: getattr(weights, kind) * factor for kind in ("input", "output", "cache_creation", "cache_read")}
    return Weights.model_construct(**kinds)


@dataclass(frozen=True, slots=True)
class Totals:
    """One user's tokens in one period, raw: weights are applied when they are read. `models` says whose they were.

    Top-ups raise the limit: `top_up_tokens` in this period alone, `lasting_top_up_tokens` until they are used up.
    """

    counts: Counts = field(default_factory=Counts)
    models: Mapping[str, Counts] = field(default_factory=dict)
    top_up_tokens: int = 0
    lasting_top_up_tokens: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        models = dict(self.models)
        for model, counts in other.models.items():
            models[model] = models.get(model, Counts()) + counts
        return Totals(
            self.counts + other.counts,
            models,
            self.top_up_tokens + other.top_up_tokens,
            self.lasting_top_up_tokens + other.lasting_top_up_tokens,
        )

    def used_tokens(self, weights: Weights) -> int:
        """What counts against a limit. Corrections may bring it below zero."""
        if weights.are_plain:
            return self.counts.tokens_used
        if not weights.models:
            return weighted_tokens(weights, [(None, self.counts)])
        named = sum(self.models.values(), start=Counts())
        unnamed = Counts(*(getattr(self.counts, name) - getattr(named, name) for name in Counts.__slots__))
        return weighted_tokens(weights, [*self.models.items(), (None, unnamed)])


class LimitStanding(NamedTuple):
    """A user and one limit of their plan, at one moment. `limit_tokens` has what was topped up; None is no limit."""

    limit: Limit
    period: Period
    weights: Weights
    totals: Totals
    carried_tokens: int
    limit_tokens: int | None
    used_tokens: int
    held_tokens: int

    @classmethod
    def of(
        cls,
        limit: Limit,
        period: Period,
        weights: Weights,
        totals: Totals,
        *,
        held_tokens: int = 0,
        carried_tokens: int = 0,
    ) -> "LimitStanding":
        """`carried_tokens` is what the periods before left of top-ups that last."""
        limit_tokens = limit.limit_tokens
        if limit_tokens is not None:
            limit_tokens += totals.top_up_tokens + totals.lasting_top_up_tokens + carried_tokens
        # Corrections may bring a total below zero; they never make a plan larger.
        used_tokens = max(0, totals.used_tokens(weights))
        return cls(limit, period, weights, totals, carried_tokens, limit_tokens, used_tokens, held_tokens)

    @property
    def remaining_tokens(self) -> int | None:
        """Of the limit, what is not used; held or not. Above the limit it is zero, never less."""
        return None if self.limit_tokens is None else max(0, self.limit_tokens - self.used_tokens)

    @property
    def available_tokens(self) -> int | None:
        """What is neither used nor held."""
        if self.limit_tokens is None:
            return None
        return max(0, self.limit_tokens - self.used_tokens - self.held_tokens)

    @property
    def beyond_tokens(self) -> int:
        """What was used beyond the plan and the top-ups of this period alone."""
        if self.limit.limit_tokens is None:
            return 0
        return max(0, self.used_tokens - self.limit.limit_tokens - self.totals.top_up_tokens)

    def including(self, used: Totals) -> "LimitStanding":
        return self.of(
            self.limit,
            self.period,
            self.weights,
            self.totals + used,
            held_tokens=self.held_tokens,
            carried_tokens=self.carried_tokens,
        )

    def with_held(self, tokens: int) -> "LimitStanding":
        return LimitStanding(*self[:-1], held_tokens=tokens)

    @property
    def resets_at(self) -> datetime:
        return self.period.bounds[1]

    def state(self, at: datetime) -> LimitState | None:
        """As every convention says it; None without a limit."""
        if self.limit_tokens is None:
            return None
        window_s, resets_in_s = _window_s(self.period, at)
        return LimitState(
            period=self.limit.period,
            limit_tokens=self.limit_tokens,
            remaining_tokens=max(0, self.limit_tokens - self.used_tokens),
            window_s=window_s,
            resets_in_s=resets_in_s,
        )


def output_granted(
    available_tokens: int | None,
    weights: Weights,
    *,
    input_tokens_max: int,
    output_tokens_min: int,
    output_tokens_max: int,
) -> int | None:
    """The output that fits beside the whole input, at most what is asked; None when even the least does not.

    Without a limit (None) everything fits.
    """
    if available_tokens is None:
        return output_tokens_max
    granted = output_tokens_max
    left = available_tokens - _dearest_input(weights) * input_tokens_max
    if left < weights.output * output_tokens_max:
        granted = int(left // weights.output) if weights.output else 0
    return granted if granted >= max(1, output_tokens_min) else None


def carried_tokens(top_ups: Iterable[tuple[datetime, int]], spent: Iterable[tuple[datetime, int]]) -> int:
    """What is left of top-ups that outlive their period: (when, tokens) of each, and (when, tokens) of each period
    that used more than it had itself, at its end. A period takes no more than there is by then."""
    left = 0
    moves = [(moment, 0, tokens) for moment, tokens in top_ups] + [(moment, 1, -tokens) for moment, tokens in spent]
    for _, _, tokens in sorted(moves):
        left = max(0, left + tokens)
    return left


def is_kept_and_quiet(
    plan: Plan, calendar: Calendar, used_tokens: Mapping[tuple[datetime, datetime], int], moments: Sequence[datetime]
) -> bool:
    """Whether each limit of the plan has a total among `used_tokens`, by the bounds of its period, that covers all
    these moments, and is far from every alert. False where only the whole account tells."""
    if not plan.weights.are_plain:
        return False
    for limit in plan.limits:
        period = calendar.period(moments[0], plan, limit)
        used = used_tokens.get(period.bounds)
        if used is None or not all(period.covers(moment) for moment in moments):
            return False
        # Top-ups can only raise the limit.
        if limit.limit_tokens is not None and any(used * 100 >= limit.limit_tokens * p for p in plan.alert_percents):
            return False
    return True


class Reserved(NamedTuple):
    """Room for a generation: what it may write, and what is held for all of it."""

    output_tokens: int
    hold_tokens: int


class Refusal(NamedTuple):
    reason: Reason
    retry_after_s: int
    # Not even an unused plan has room for it, so that no reset helps.
    exceeds_plan: bool = False


class Account(NamedTuple):
    """A user as the quota sees them at one moment: one standing for each limit of the plan."""

    user_id: str
    plan: Plan
    standings: tuple[LimitStanding, ...]
    open_generations: int = 0

    def reserve(
        self,
        *,
        input_tokens_max: int,
        output_tokens_min: int,
        output_tokens_max: int,
        at: datetime,
        model: str | None = None,
    ) -> Reserved | Refusal:
        """As much of the output as fits under every limit, or why not even the least that is useful does."""
        plan, weights = self.plan, _for_model(self.plan.weights, model)
        least = useful_output_tokens(plan, output_tokens_min=output_tokens_min, output_tokens_max=output_tokens_max)

        def granted(available_tokens: int | None) -> int | None:
            return output_granted(
                available_tokens,
                weights,
                input_tokens_max=input_tokens_max,
                output_tokens_min=least,
                output_tokens_max=output_tokens_max,
            )

        output_tokens = output_tokens_max
        is_held = False
        never, exceeds_plan = [], False
        for standing in self.standings:
            fitting = granted(standing.available_tokens)
            if fitting is not None:
                output_tokens = min(output_tokens, fitting)
            elif granted(standing.remaining_tokens) is None:
                never.append(standing.resets_at)
                exceeds_plan = exceeds_plan or granted(standing.limit_tokens) is None
            else:
                is_held = True
        if never:
            return Refusal("tokens", _reset_s(max(never), at), exceeds_plan)
        if plan.concurrent_generations_max and self.open_generations >= plan.concurrent_generations_max:
            return Refusal("concurrency", RETRY_WHILE_HELD_S)
        if is_held:
            return Refusal("held", RETRY_WHILE_HELD_S)
        held = hold_tokens(weights, input_tokens_max=input_tokens_max, output_tokens_max=output_tokens)
        return Reserved(output_tokens, held)

    def holding(self, tokens: int, since: datetime) -> "Account":
        """With one more generation under way that holds `tokens` in the periods of `since`."""
        return self._with_held(tokens, since, generations=1)

    def released(self, tokens: int, since: datetime) -> "Account":
        return self._with_held(-tokens, since, generations=-1)

    def _with_held(self, tokens: int, since: datetime, *, generations: int) -> "Account":
        standings = tuple(
            standing.with_held(standing.held_tokens + tokens) if standing.period.covers(since) else standing
            for standing in self.standings
        )
        return Account(self.user_id, self.plan, standings, self.open_generations + generations)

    def including(self, pending: Pending) -> "Account":
        """With usage that is durable but not settled yet, in the periods that it belongs to."""
        counts = Counts(
            pending.tokens_used,
            pending.input_tokens,
            pending.output_tokens,
            pending.cache_creation_input_tokens,
            pending.cache_read_input_tokens,
        )
        used = Totals(counts, {pending.model: counts} if pending.model else {})
        standings = tuple(
            standing.including(used) if standing.period.covers(pending.started_at) else standing
            for standing in self.standings
        )
        return self._replace(standings=standings)

    @property
    def tightest(self) -> LimitStanding:
        """The limit that leaves least, and of equals the one that resets last: it decides, and it is shown."""
        if len(self.standings) == 1:
            return self.standings[0]

        def left(standing: LimitStanding) -> tuple[float, float]:
            available = standing.available_tokens
            return (float("inf") if available is None else available, -standing.resets_at.timestamp())

        return min(self.standings, key=left)

    @property
    def tokens_available(self) -> int:
        return self.tightest.available_tokens or 0

    def limits(self, at: datetime) -> tuple[LimitState, ...]:
        states = [standing.state(at) for standing in self.standings]
        return tuple(state for state in states if state is not None)

    def covers(self, moment: datetime) -> bool:
        """Whether every limit's period is the one of that moment."""
        return all(standing.period.covers(moment) for standing in self.standings)

    def thresholds(self, at: datetime) -> list[tuple[Period, Threshold]]:
        """Of each limit, each per cent that is used of those that the plan wants to hear of."""
        return [
            (
                standing.period,
                Threshold(
                    user_id=self.user_id,
                    tier=self.plan.tier,
                    percent=percent,
                    tokens_used=used,
                    tokens_limit=limit,
                    period=standing.limit.period,
                    period_start=None if standing.period.end is None else standing.period.start,
                    resets_at=standing.period.end,
                    reached_at=at,
                ),
            )
            for standing in self.standings
            for used, limit in [(standing.used_tokens, standing.limit_tokens)]
            for percent in self.plan.alert_percents
            if limit and used * 100 >= limit * percent
        ]

    @property
    def usage(self) -> Usage:
        shown, plan = self.tightest, self.plan
        used, limit = shown.used_tokens, shown.limit_tokens
        return Usage(
            tier=plan.tier,
            tokens_used=used,
            tokens_limit=limit,
            tokens_remaining=shown.remaining_tokens,
            usage_percentage=_percentage(used, limit),
            tokens_held=shown.held_tokens,
            period=shown.limit.period,
            period_start=None if shown.limit.period == "none" else shown.period.start,
            resets_at=shown.period.end,
            upgrade_to=plan.upgrade_to,
            cost_usd=str(plan.cost_usd(used)),
        )


def _reset_s(end: datetime, at: datetime) -> int:
    """Until the limit begins anew. One that never does asks to try again all the same."""
    return RETRY_WHILE_HELD_S if end == FOR_EVER else _seconds_until(end, at)


@lru_cache(maxsize=256)
def _window_s(period: Period, at: datetime) -> tuple[int | None, int | None]:
    """How long the period is, and what is left of it: the same for all users of a transaction."""
    if period.end is None:
        return None, None
    return round((period.end - period.start).total_seconds()), _seconds_until(period.end, at)


def _seconds_until(end: datetime, at: datetime) -> int:
    return max(1, ceil((end - at).total_seconds()))


def _percentage(used: int, limit: int | None) -> float:
    """One decimal, halves up; 0 without a limit, and 100 where the limit is 0."""
    if limit is None:
        return 0.0
    if limit == 0:
        return 100.0
    return (used * 2000 + limit) // (limit * 2) / 10
