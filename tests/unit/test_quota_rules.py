"""The rules of the quota as a whole, step by step against a model of a few lines: no clock, no database."""

from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.quota.domain import Account, LimitStanding, Refusal, Totals, carried_tokens
from shared.plans import Counts, Period, Plan

DAY_TOKENS, MONTH_TOKENS, AT_ONCE = 3_000, 10_000, 3
PLAN = Plan.model_validate(
    {
        "tier": "team",
        "limits": [
            {"limit_tokens": DAY_TOKENS, "period": "day"},
            {"limit_tokens": MONTH_TOKENS, "period": "month"},
        ],
        "concurrent_generations_max": AT_ONCE,
    }
)
FIRST_DAY = datetime(2026, 1, 1, 12, tzinfo=UTC)
Day = int
# Mostly today: what meets in one period is what the rules are about.
AGO = st.sampled_from([0, 0, 0, 1, 2, 31])


class AnyYear(RuleBasedStateMachine):
    """One user. What happened is a list of (day, tokens) and a dict of holds; every figure is summed from them."""

    @initialize()
    def begin(self) -> None:
        self.today: Day = 0
        self.used: list[tuple[Day, int]] = []
        self.top_ups: list[tuple[Day, int]] = []
        self.lasting: list[tuple[Day, int]] = []
        self.held: dict[int, tuple[Day, int]] = {}
        self.begun = 0

    @rule(days=st.sampled_from([1, 1, 2, 15, 31]))
    def time_passes(self, days: int) -> None:
        self.today += days

    @rule(beside=st.integers(0, 2_000), asked=st.integers(1, 5_000), least=st.integers(1, 5_000))
    def reserve(self, beside: int, asked: int, least: int) -> None:
        least = min(least, asked)
        known = self.account()
        answer = known.reserve(
            input_tokens_max=beside, output_tokens_min=least, output_tokens_max=asked, at=moment(self.today)
        )
        useful = max(least, min(PLAN.output_tokens_min, asked))
        free = min(limit - used - held for limit, used, held in self.figures())
        ever_free = min(limit - used for limit, used, _ in self.figures())
        if isinstance(answer, Refusal):
            assert free < beside + useful or len(self.held) == AT_ONCE
            assert (answer.reason == "tokens") == (ever_free < beside + useful)
            return
        assert len(self.held) < AT_ONCE
        assert useful <= answer.output_tokens == min(asked, free - beside)
        assert answer.hold_tokens == beside + answer.output_tokens
        self.begun += 1
        self.held[self.begun] = (self.today, answer.hold_tokens)
        after = known.holding(answer.hold_tokens, moment(self.today))
        assert after == self.account()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """In the period in which it was authorized, however late."""
        day, tokens = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        self.used.append((day, data.draw(st.integers(0, tokens))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        before = self.account()
        day, tokens = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        assert before.released(tokens, moment(day)) == self.account()

    @rule(ago=AGO, tokens=st.integers(-4_000, 12_000))
    def adjust(self, ago: int, tokens: int) -> None:
        self.used.append((max(0, self.today - ago), tokens))

    @rule(ago=AGO, tokens=st.integers(1, 4_000), outlives_period=st.booleans())
    def top_up(self, ago: int, tokens: int, outlives_period: bool) -> None:
        (self.lasting if outlives_period else self.top_ups).append((max(0, self.today - ago), tokens))

    @invariant()
    def every_figure_is_the_models(self) -> None:
        standings = self.account().standings
        shown = [(each.limit_tokens, each.used_tokens, each.held_tokens) for each in standings]
        assert shown == self.figures()

    @invariant()
    def the_tightest_limit_is_shown(self) -> None:
        left = min(max(0, limit - used - held) for limit, used, held in self.figures())
        assert self.account().tokens_available == left

    @invariant()
    def the_fold_is_the_same_in_any_order(self) -> None:
        forward = self.account()
        for happened in (self.used, self.top_ups, self.lasting):
            happened.reverse()
        assert self.account() == forward

    def account(self) -> Account:
        """The rules applied to what happened."""
        standings = []
        for limit in PLAN.limits:
            now = Period.containing(moment(self.today), limit.period)
            standing = LimitStanding.of(
                limit,
                now,
                PLAN.weights,
                self.totals(now),
                held_tokens=sum(tokens for day, tokens in self.held.values() if now.covers(moment(day))),
                carried_tokens=carried_tokens(
                    [(moment(day), tokens) for day, tokens in self.lasting if moment(day) < now.start],
                    [
                        (past.bounds[1], LimitStanding.of(limit, past, PLAN.weights, self.totals(past)).beyond_tokens)
                        for past in {Period.containing(moment(day), limit.period) for day in range(self.today + 1)}
                        if past.bounds[1] <= now.start
                    ],
                ),
            )
            standings.append(standing)
        return Account("user_1", PLAN, tuple(standings), open_generations=len(self.held))

    def totals(self, period: Period) -> Totals:
        folded = Totals()
        for day, tokens in self.used:
            if period.covers(moment(day)):
                folded += Totals(Counts(tokens))
        for day, tokens in self.top_ups:
            if period.covers(moment(day)):
                folded += Totals(top_up_tokens=tokens)
        for day, tokens in self.lasting:
            if period.covers(moment(day)):
                folded += Totals(lasting_top_up_tokens=tokens)
        return folded

    def figures(self) -> list[tuple[int, int, int]]:
        """The model: (limit, used, held) of the day and of the month, period by period from the first."""
        figures = []
        for own_tokens, period_of in ((DAY_TOKENS, int), (MONTH_TOKENS, month)):
            pot = 0
            for period in range(period_of(self.today) + 1):
                used = max(0, sum(tokens for day, tokens in self.used if period_of(day) == period))
                had = own_tokens + sum(tokens for day, tokens in self.top_ups if period_of(day) == period)
                pot += sum(tokens for day, tokens in self.lasting if period_of(day) == period)
                limit, pot = had + pot, max(0, pot - max(0, used - had))
            held = sum(tokens for day, tokens in self.held.values() if period_of(day) == period)
            figures.append((limit, used, held))
        return figures


def moment(day: Day) -> datetime:
    return FIRST_DAY + timedelta(days=day)


def month(day: Day) -> int:
    return (moment(day).year - FIRST_DAY.year) * 12 + moment(day).month - 1


TestAnyYear = AnyYear.TestCase
TestAnyYear.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
