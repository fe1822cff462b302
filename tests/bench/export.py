"""How fast the ledger is exported, and what memory that takes: `python -m tests.bench.export`.

To each format at two sizes of the ledger, on SQLite and on PostgreSQL, each in a process of its own; beside a bare
read of the same rows in the same order, which the driver hands out in batches and nobody looks at.
"""

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, make_url, select

from services.ledger import store
from services.ledger.__main__ import MIGRATIONS
from services.ledger.export import BATCH_ROWS, Format, export, replacing
from services.ledger.scope import Scope
from shared.database import Database, insert_new, snapshot
from shared.events import new_id
from shared.settings import sqlite_url
from tests.bench.quota import postgresql
from tests.builders import NOON, authorized, generation_completed
from tests.stack import PROJECT, environment

USERS = 1000
SIZES, SIZES_QUICK = (100_000, 1_000_000), (20_000, 200_000)
ROUNDS, ROUNDS_QUICK = 3, 1
INSERTED_AT_ONCE = 5000
BARE = "bare read"
MIB = 1024**2


class Sample(NamedTuple):
    rows: int
    seconds: float
    cpu_s: float
    peak_mib: float


def measured(url: str, what: str, out: Path) -> Sample:
    """In this process, whose memory tells of nothing else."""
    rows = [0]
    begun, cpu_begun = perf_counter(), process_time()
    if what == BARE:
        rows += map(len, _bare_batches(url))
    else:
        with snapshot(url, store.usage) as db, replacing(out) as file:
            export(db, Scope(), Format(what), file, rows.append)
    seconds, cpu_s = perf_counter() - begun, process_time() - cpu_begun
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return Sample(sum(rows), seconds, cpu_s, int(peak_kib) * 1024 / MIB)


def _bare_batches(url: str) -> Iterator[list[Any]]:
    statement = f"SELECT {', '.join(store.usage.c.keys())} FROM usage ORDER BY created_at, id"  # noqa: S608
    if url.startswith("sqlite"):
        cursor: Any = sqlite3.connect(make_url(url).database or "").cursor()
    else:
        cursor = psycopg.connect(url).cursor("bare")
    cursor.execute(statement)
    while batch := cursor.fetchmany(BATCH_ROWS):
        yield batch


async def fill(url: str, number: int) -> None:
    """So many records of a thousand users, as the services would have made them in three seconds each."""
    database = Database(url)
    database.migrate(MIGRATIONS)
    event = generation_completed(provider_request_id="req_011CSHoEeqs5C35K2UUqR7Fy", authorized=authorized())
    await database.write(store.record, [event])
    template = dict(await database.read(lambda db: db.execute(select(store.usage)).mappings().one()))

    def insert(db: Connection, first: int, last: int) -> None:
        insert_new(db, store.usage, [template | _differing(n) for n in range(first, last)])

    for first in range(1, number, INSERTED_AT_ONCE):
        await database.write(insert, first, min(first + INSERTED_AT_ONCE, number))
    await database.close()


def _differing(n: int) -> dict[str, Any]:
    at = NOON + timedelta(seconds=3 * n)
    return {
        "id": new_id(),
        "generation_id": new_id(),
        "user_id": f"user_{n % USERS}",
        "created_at": at,
        "usage_date": at.date(),
        "completed_at": at + timedelta(seconds=2),
    }


class Bench:
    def __init__(self, folder: Path, postgres_url: str) -> None:
        self._folder, self._postgres_url = folder, postgres_url
        self._progress = Console(stderr=True, style="dim", highlight=False)
        self.samples: dict[tuple[str, int, str], list[Sample]] = {}

    def run(self, sizes: tuple[int, ...], rounds: int) -> None:
        for number in sizes:
            urls = {"SQLite": sqlite_url(self._folder, f"{number}.db"), "PostgreSQL": self._new_database(number)}
            for database, url in urls.items():
                self._progress.print(f"{number:,} records into {database}")
                asyncio.run(fill(url, number))
            for nth in range(rounds):
                self._progress.print(f"Round {nth + 1} of {rounds}")
                for database, url in urls.items():
                    for what in (BARE, *Format):
                        self.samples.setdefault((database, number, what), []).append(self._measured(url, what))

    def _new_database(self, number: int) -> str:
        with psycopg.connect(self._postgres_url, autocommit=True) as postgres:
            postgres.execute(f"CREATE DATABASE export_{number}")
        return make_url(self._postgres_url).set(database=f"export_{number}").render_as_string(hide_password=False)

    def _measured(self, url: str, what: str) -> Sample:
        command = [sys.executable, "-m", "tests.bench.export", "--measure", url, what, str(self._folder / "out")]
        said = subprocess.run(command, cwd=PROJECT, env=environment(), stdout=subprocess.PIPE, check=True).stdout
        return Sample(*json.loads(said))


def report(samples: dict[tuple[str, int, str], list[Sample]]) -> Table:
    table = Table("", "records", "a second", "of the bare read", "CPU µs each", "peak MiB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for (database, number, what), taken in samples.items():
        rate, bare = (
            median(sample.rows / sample.seconds for sample in samples[database, number, name])
            for name in (what, BARE)
        )
        cpu_us = median(sample.cpu_s / sample.rows * 1e6 for sample in taken)
        peak_mib = max(sample.peak_mib for sample in taken)
        share = "" if what == BARE else f"{rate / bare:.0%}"
        table.add_row(f"{database}, {what}", f"{number:,}", f"{rate:,.0f}", share, f"{cpu_us:.1f}", f"{peak_mib:.0f}")
    return table


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench.export", description="How fast the ledger is exported.")
    parser.add_argument("--quick", action="store_true", help="a fifth of the records, and once")
    parser.add_argument(
        "--measure", nargs=3, metavar=("URL", "WHAT", "OUT"), help="one export in this process, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        url, what, out = arguments.measure
        sys.stdout.write(json.dumps(measured(url, what, Path(out))))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack.enter_context(postgresql()))
        bench.run(SIZES_QUICK if arguments.quick else SIZES, ROUNDS_QUICK if arguments.quick else ROUNDS)
    Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(report(bench.samples))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
