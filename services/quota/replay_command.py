"""What `replay` shows of quota: how everybody stood at a moment, and what usage comes to under other weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection

from services.quota.replay import PeriodUsed, RebuiltQuota, periods_used, standing_at, under, used_once
from services.quota.settings import Settings
from shared.database import patient_engine
from shared.plans import Plans
from shared.replay_command import as_of, console
from shared.terminal import printable


async def show_past(settings: Settings, plans: Plans, at: datetime, *, out: Path | None) -> None:
    """Each user as they stood at that moment, by what the stream had then."""
    async with as_of(settings, RebuiltQuota(plans), until=at, out=out) as file:
        table = _table("user", "plan", "period", "used", "limit", "left", "cost USD")
        with _reading(file) as db:
            for user in standing_at(db, plans, at):
                shown, usage = user.tightest, user.usage
                numbers = (shown.used_tokens, shown.limit_tokens, shown.remaining_tokens)
                of_user = Text(printable(user.user_id)), usage.tier, _day(shown.period.start)
                table.add_row(*of_user, *map(_number, numbers), usage.cost_usd)
        console().print(table)


async def compare_weights(
    settings: Settings, plans: Plans, others: Plans, *, until: datetime | None, out: Path | None
) -> None:
    """Each user's periods: what counts and what it costs under the plans in force, and under the others."""
    async with as_of(settings, RebuiltQuota(plans), until=until, out=out) as file:
        table = _table("user", "plan", "period", "used", "cost USD", "would be used", "would cost USD", "difference")
        now_usd = then_usd = Decimal("0.00")
        tiers: set[str] = set()
        with _reading(file) as db:
            for used in periods_used(db, plans):
                now, then = used.under(used.plan), used.under(others.of(used.plan.tier))
                table.add_row(*_names(used), _number(now[0]), str(now[1]), _number(then[0]), str(then[1]),
                              str(then[1] - now[1]))  # fmt: skip
            for plan, totals in used_once(db, plans):
                tiers.add(plan.tier)
                now_usd += under(plan, totals)[1]
                then_usd += under(others.of(plan.tier), totals)[1]
        table.add_section()
        table.add_row("all, each token once", "", "", "", str(now_usd), "", str(then_usd), str(then_usd - now_usd))
        console().print(table)
        if unnamed := sorted(tiers - others.plans.keys()):
            told = f"The other plans do not name {', '.join(unnamed)}: counted as their default, {others.default}."
            console(stderr=True).print(told, markup=False)


def _names(used: PeriodUsed) -> tuple[Text, str, str]:
    return Text(printable(used.user_id)), used.plan.tier, _day(used.period.start)


@contextmanager
def _reading(file: Path) -> Iterator[Connection]:
    engine = patient_engine(f"sqlite:///{file}", begin="BEGIN")
    with engine.begin() as db:
        yield db
    engine.dispose()


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[3:]:
        column.justify = "right"
    return table


def _day(moment: datetime) -> str:
    return moment.isoformat(timespec="minutes").replace("+00:00", "Z")


def _number(tokens: int | None) -> str:
    return "∞" if tokens is None else f"{tokens:,}"
