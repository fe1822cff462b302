"""How fast the record is audited, and what memory that takes: `make bench-audit`, or `python -m tests.bench.audit`.

At two sizes of the stream, on SQLite and on PostgreSQL, each in a process of its own; beside a bare read of the same
stream in the same round, which looks at nothing.
"""

import asyncio
import gc
import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import psycopg
import uvloop
from nats.aio.client import Client
from nats.js.api import DeliverPolicy
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, make_url

from services.ledger import __main__ as ledger
from services.ledger import store as ledger_store
from services.ledger.audit import Databases, audit
from services.ledger.merkle import leaf_hash
from services.ledger.models import Leaf
from services.ledger.scope import Scope
from services.ledger.scratch import scratch
from services.quota import __main__ as quota
from services.quota import store as quota_store
from shared import streams
from shared.broker import connect
from shared.database import Database, insert_new, table_of
from shared.events import Event, decode, encode
from shared.plans import Plans
from shared.recorded import Recorded, bounds, recorded
from shared.settings import sqlite_url
from tests.bench.processes import Processes, listens
from tests.bench.quota import postgresql
from tests.builders import NOON, authorized, generation_completed
from tests.stack import PROJECT, environment, free_port

USERS = 1000
SIZES, SIZES_QUICK = (100_000, 1_000_000), (20_000, 100_000)
ROUNDS, ROUNDS_QUICK = 3, 1
PUBLISHED_AT_ONCE = 2000
APPLIED_AT_ONCE = 5000
BARE = "bare read of the stream"
KINDS = ("SQLite", "PostgreSQL")
MIB = 1024**2
BYTES_A_MESSAGE = 1500


class Sample(NamedTuple):
    events: int
    seconds: float
    cpu_s: float
    peak_mib: float


async def measured(nats_url: str, urls: Sequence[str]) -> Sample:
    """In this process, whose memory tells of nothing else. Without databases the stream is only read."""
    nc = await connect(nats_url, name="bench")
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    begun, cpu_begun = perf_counter(), process_time()
    if urls:
        with scratch() as kept:
            report = await audit(nc, Databases(*urls), Plans.load(), Scope(), kept)
            events = report.compared["ledger.usage"]
            if not report.agrees:
                sys.exit(f"The audit found differences: {report.found.groups()}")
    else:
        first, last = await bounds(nc)
        events = sum([len(batch) async for batch in recorded(nc, first=first, last=last)])
    seconds, cpu_s = perf_counter() - begun, process_time() - cpu_begun
    await nc.close()
    return Sample(events, seconds, cpu_s, _peak_mib())


def _peak_mib() -> float:
    """Of this program: what rusage tells is also of the process that started it."""
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak_kib) * 1024 / MIB


async def publish(nc: Client, number: int) -> None:
    """So many events of a thousand users; nobody waits for each acknowledgement."""
    await streams.create(nc.jetstream(), max_bytes=number * BYTES_A_MESSAGE)
    for start in range(0, number, PUBLISHED_AT_ONCE):
        for nth in range(start, min(number, start + PUBLISHED_AT_ONCE)):
            at = NOON + timedelta(seconds=nth * 3 % 2_000_000)
            event = generation_completed(
                f"user_{nth % USERS}",
                started_at=at,
                provider_request_id="req_011CSHoEeqs5C35K2UUqR7Fy",
                authorized=authorized(expires_at=at + timedelta(minutes=15)),
            )
            await nc.publish(event.type, encode(event))
        while (await bounds(nc))[1] < min(number, start + PUBLISHED_AT_ONCE):  # noqa: ASYNC110 - of the broker
            await asyncio.sleep(0.01)


async def acknowledge(nc: Client, number: int) -> None:
    """Both durables come to stand where services would have left them."""
    js = nc.jetstream()
    for name in (streams.LEDGER, streams.QUOTA):
        await js.delete_consumer(streams.STREAM, name)
        config = streams.durable(name)
        at_the_end = replace(config, deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=number)
        await js.add_consumer(streams.STREAM, at_the_end)
        pulling = await js.pull_subscribe("", durable=name, stream=streams.STREAM)
        (message,) = await pulling.fetch(1, timeout=10)
        await message.ack_sync()


async def fill(nc: Client, urls: Sequence[str]) -> None:
    """What the services make of the stream."""
    plans = Plans.load()
    databases = [Database(url) for url in urls]
    for database, migrations in zip(databases, (ledger.MIGRATIONS, quota.MIGRATIONS), strict=True):
        database.migrate(migrations)
    first, last = await bounds(nc)
    gathered: list[Recorded] = []
    async for batch in recorded(nc, first=first, last=last):
        gathered += batch
        if len(gathered) >= APPLIED_AT_ONCE or batch[-1].sequence == last:
            events: list[Event] = [decode(message.body) for message in gathered]
            await databases[0].write(_record, events, gathered)
            await databases[1].write(quota_store.settle, plans, events)
            gathered = []
    for database in databases:
        await database.close()


def _record(db: Connection, events: list[Event], messages: list[Recorded]) -> None:
    ledger_store.record(db, events)
    rows = [
        {"stream_sequence": message.sequence, "event_id": event.id, "leaf_hash": leaf_hash(message.body)}
        for event, message in zip(events, messages, strict=True)
    ]
    insert_new(db, table_of(Leaf), rows)


@contextmanager
def broker_in(folder: Path) -> Iterator[str]:
    """That does not wait for its disk: it is read from, and filling it is not measured."""
    port, server = free_port(), str(Path(sys.executable).with_name("nats-server"))
    with Processes(folder, {}) as processes:
        address = ["-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder / "nats")]
        processes.start("broker", server, *address, ready=lambda: listens(port))
        yield f"nats://127.0.0.1:{port}"


class Bench:
    def __init__(self, sizes: Sequence[int], rounds: int) -> None:
        self._sizes, self._rounds = sizes, rounds
        self._progress = Console(stderr=True, style="dim", highlight=False)
        self.samples: dict[tuple[str, int], list[Sample]] = {}

    def run(self) -> None:
        for size in self._sizes:
            with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as name, ExitStack() as stack:
                folder = Path(name)
                nats_url = stack.enter_context(broker_in(folder))
                postgres_url = stack.enter_context(postgresql())
                urls = {"SQLite": self._sqlite(folder), "PostgreSQL": self._postgresql(postgres_url)}
                self._progress.print(f"{size:,} events onto the stream and into the databases")
                uvloop.run(self._prepare(nats_url, urls, size))
                for nth in range(self._rounds):
                    self._progress.print(f"{size:,} events, round {nth + 1} of {self._rounds}")
                    self._measure(BARE, size, nats_url)
                    for kind in KINDS:
                        self._measure(f"audit, {kind}", size, nats_url, *urls[kind])

    async def _prepare(self, nats_url: str, urls: dict[str, list[str]], size: int) -> None:
        nc = await connect(nats_url, name="bench")
        await publish(nc, size)
        for of_kind in urls.values():
            await fill(nc, of_kind)
        await acknowledge(nc, size)
        await nc.close()

    def _measure(self, what: str, size: int, *urls: str) -> None:
        process = subprocess.run(
            [sys.executable, "-m", "tests.bench.audit", "--measure", *urls],
            cwd=PROJECT,
            env=environment(),
            stdout=subprocess.PIPE,
            check=True,
        )
        self.samples.setdefault((what, size), []).append(Sample(*json.loads(process.stdout.splitlines()[-1])))

    @staticmethod
    def _sqlite(folder: Path) -> list[str]:
        return [sqlite_url(folder, f"{name}.db") for name in (streams.LEDGER, streams.QUOTA)]

    @staticmethod
    def _postgresql(url: str) -> list[str]:
        with psycopg.connect(url, autocommit=True) as postgres:
            for name in (streams.LEDGER, streams.QUOTA):
                postgres.execute(f"CREATE DATABASE {name}")
        names = (streams.LEDGER, streams.QUOTA)
        return [make_url(url).set(database=name).render_as_string(hide_password=False) for name in names]


def report(samples: dict[tuple[str, int], list[Sample]]) -> Table:
    table = Table("", "events", "events a second", "CPU µs", "of the bare read", "peak MiB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def seconds(what: str, size: int) -> float:
        return median(sample.seconds for sample in samples[what, size])

    for (what, size), measured in samples.items():
        cpu_us = median(sample.cpu_s for sample in measured) / size * 1e6
        share = seconds(BARE, size) / seconds(what, size)
        peak = max(sample.peak_mib for sample in measured)
        rate = size / seconds(what, size)
        table.add_row(what, f"{size:,}", f"{rate:,.0f}", f"{cpu_us:.1f}", f"{share:.0%}", f"{peak:.0f}")
    return table


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench.audit", description="How fast the record is audited.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the events, and rougher")
    parser.add_argument("--measure", nargs="+", metavar="URL", help="of broker and databases, in this process")
    options = parser.parse_args()
    if options.measure:
        nats_url, *urls = options.measure
        sys.stdout.write(json.dumps(uvloop.run(measured(nats_url, urls))))
        return
    bench = Bench(SIZES_QUICK, ROUNDS_QUICK) if options.quick else Bench(SIZES, ROUNDS)
    bench.run()
    Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(report(bench.samples))


if __name__ == "__main__":
    main()
