"""How long a page of the ledger takes: `python -m tests.bench.pages`, a part of `make bench-audit`.

History (90 days) and logs (50 records: the newest, and far back) at two sizes of the ledger, on SQLite and on
PostgreSQL, asked one after the other as the service asks, size by size in turn. Records are of two years, so that
PostgreSQL has a partition for each of 24 months; a tenth of them is the busiest user's, some thousand others share
the rest. Beside them the same history summed up from the records.
"""

import asyncio
import base64
import random
import signal
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, make_url

from services.ledger import partitions, store
from services.ledger.__main__ import MIGRATIONS
from shared.calls import HistoryQuery, LogsQuery
from shared.database import Database, insert_new, is_sqlite, patient_engine
from shared.events import new_id
from shared.plans import Plans
from shared.settings import sqlite_url
from tests.bench.quota import postgresql
from tests.builders import generation_completed, subscription_changed

USERS, BUSIEST = 997, "user_0"
SIZES, SIZES_QUICK = (100_000, 1_000_000), (10_000, 100_000)
ROUNDS, ROUNDS_QUICK, CALLS = 10, 3, 40
MONTHS, DAYS, PAGE = 24, 90, 50
INSERTED_AT_ONCE = 5000
HISTORY_MAX_S = 0.01
MODELS = ("claude-haiku-4-5", "claude-opus-4-8")

# What is asked: of whom, and the day that a page of 90 days ends with, or that logs go back from.
Ask = Callable[[Connection, str, date], object]


class Ledger:
    """A database with so many records, of the two years that begin with the next month."""

    def __init__(self, url: str, number: int) -> None:
        self.url, self.number = url, number
        self.database = Database(url)
        today = datetime.now(UTC).date()
        self.months = [partitions.month_after(today.replace(day=1))]
        while len(self.months) <= MONTHS:
            self.months.append(partitions.month_after(self.months[-1]))
        self.first = datetime(self.months[0].year, self.months[0].month, 1, tzinfo=UTC)
        self.lasts = (self.months[-1] - self.months[0]).days

    async def fill(self) -> None:
        self.database.migrate(MIGRATIONS)
        await self.database.write(self._make_partitions)
        event = generation_completed(provider_request_id="req_011CSHoEeqs5C35K2UUqR7Fy")
        (template,) = store.usage_rows([event])
        for first in range(0, self.number, INSERTED_AT_ONCE):
            last = min(first + INSERTED_AT_ONCE, self.number)
            rows = [template | self._differing(n) for n in range(first, last)]
            await self.database.write(insert_new, store.usage, rows)
        changed_at = self.first + timedelta(days=self.lasts // 2, hours=12)
        changes = [subscription_changed(f"user_{n}", changed_at=changed_at) for n in range(USERS)]
        await self.database.write(store.record, changes)
        engine = patient_engine(self.url)
        with engine.begin() as db:
            store.sum_up_days(db)
        engine.dispose()
        if not self.url.startswith("sqlite"):
            with psycopg.connect(self.url, autocommit=True) as postgres:
                postgres.execute("VACUUM ANALYZE")

    def _make_partitions(self, db: Connection) -> None:
        for month in [] if is_sqlite(db) else self.months[:-1]:
            partitions.make(db, month)

    def _differing(self, n: int) -> dict[str, Any]:
        at = self.first + timedelta(days=self.lasts) * (n / self.number)
        return {
            "id": f"{int(at.timestamp() * 1000) >> 16:08x}-{int(at.timestamp() * 1000) & 0xFFFF:04x}{new_id()[13:]}",
            "generation_id": new_id(),
            "user_id": BUSIEST if n % 10 == 0 else f"user_{n % USERS}",
            "model": MODELS[n % 7 == 0],
            "created_at": at,
            "usage_date": at.date(),
            "completed_at": at + timedelta(seconds=2),
        }


def history(plans: Plans, db: Connection, user_id: str, day: date) -> object:
    query = HistoryQuery(user_id=user_id, from_date=day - timedelta(days=DAYS - 1), to_date=day)
    return store.history(db, plans, query)


def from_records(db: Connection, user_id: str, day: date) -> object:
    days = [day - timedelta(days=n) for n in range(DAYS)]
    return db.execute(store._sums_by_day_and_tier(user_id, days)).all()


def newest(db: Connection, user_id: str, day: date) -> object:
    return store.logs(db, LogsQuery(user_id=user_id, limit=PAGE))


def far_back(db: Connection, user_id: str, day: date) -> object:
    """From the middle of a day, as somebody comes to it page by page."""
    noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
    cursor = base64.urlsafe_b64encode(store._position.dump_json((noon, new_id()))).decode()
    return store.logs(db, LogsQuery(user_id=user_id, limit=PAGE, cursor=cursor))


class Bench:
    def __init__(self, ledgers: dict[tuple[str, int], Ledger]) -> None:
        self._ledgers = ledgers
        self._asked: dict[str, Ask] = {
            "history": partial(history, Plans.load()),
            "history, from the records": from_records,
            "logs, newest": newest,
            "logs, far back": far_back,
        }
        self._progress = Console(stderr=True, style="dim", highlight=False)
        self.samples: dict[tuple[str, int, str, str], list[float]] = {}

    async def run(self, rounds: int) -> None:
        for (kind, number), ledger in self._ledgers.items():
            self._progress.print(f"{number:,} records into {kind}")
            await ledger.fill()
        for nth in range(rounds):
            self._progress.print(f"Round {nth + 1} of {rounds}")
            for (kind, number), ledger in self._ledgers.items():
                for what in self._asked:
                    for who in ("anybody", "the busiest"):
                        taken = [await self._ask(ledger, what, who) for _ in range(CALLS)]
                        # The first ones find out how to ask: the driver prepares a statement that comes again.
                        self.samples.setdefault((kind, number, what, who), []).extend(taken if nth else [])
        for ledger in self._ledgers.values():
            await ledger.database.close()

    async def _ask(self, ledger: Ledger, what: str, who: str) -> float:
        user_id = BUSIEST if who == "the busiest" else f"user_{random.randrange(1, USERS)}"  # noqa: S311 - of a bench
        day = ledger.first.date() + timedelta(days=random.randrange(DAYS, ledger.lasts))  # noqa: S311 - as above
        begun = perf_counter()
        await ledger.database.read(self._asked[what], user_id, day)
        return perf_counter() - begun


def report(samples: dict[tuple[str, int, str, str], list[float]]) -> Iterator[Table]:
    table = Table("", "of", "records", "p50 ms", "p99 ms", "aim", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    for (kind, number, what, who), taken in samples.items():
        p99_s = sorted(taken)[int(len(taken) * 0.99)]
        aim = f"≤ {HISTORY_MAX_S * 1000:.0f} {'met' if p99_s <= HISTORY_MAX_S else 'missed'}"
        told = (f"{median(taken) * 1000:.1f}", f"{p99_s * 1000:.1f}", aim if what == "history" else "")
        table.add_row(f"{what}, {kind}", who, f"{number:,}", *told)
    yield table


def _new_database(postgres_url: str, number: int) -> str:
    with psycopg.connect(postgres_url, autocommit=True) as postgres:
        postgres.execute(f"CREATE DATABASE pages_{number}")
    return make_url(postgres_url).set(database=f"pages_{number}").render_as_string(hide_password=False)


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench.pages", description="How long a page of the ledger takes.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the records, and rougher")
    is_quick = parser.parse_args().quick
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as folder, ExitStack() as stack:
        postgres_url = stack.enter_context(postgresql())
        ledgers = {}
        for number in SIZES_QUICK if is_quick else SIZES:
            ledgers["SQLite", number] = Ledger(sqlite_url(Path(folder), f"{number}.db"), number)
            ledgers["PostgreSQL", number] = Ledger(_new_database(postgres_url, number), number)
        bench = Bench(ledgers)
        asyncio.run(bench.run(ROUNDS_QUICK if is_quick else ROUNDS))
    for table in report(bench.samples):
        Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
