"""How fast the stream is replayed, in what memory, and how long writers wait: `python -m tests.bench.replay`.

At two sizes of the stream, on SQLite and on PostgreSQL, each in a process of its own, over a database that has it all
already, and once into one that was lost; beside a bare read of the same stream into a bare table of the same kind of
database in the same round.
"""

import gc
import json
import resource
import subprocess
import sys
import tempfile
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import psycopg
import uvloop
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from services.ledger.replay import RebuiltLedger
from services.quota.replay import RebuiltQuota
from shared.broker import connect
from shared.plans import Plans
from shared.recorded import bounds, recorded
from shared.replaying import Rebuilt, replay
from shared.settings import sqlite_url
from tests.bench import bare_ingest
from tests.bench.audit import KINDS, MIB, SIZES, SIZES_QUICK, publish
from tests.bench.quota import broker_in, postgresql
from tests.stack import PROJECT, environment

ROUNDS, ROUNDS_QUICK = 3, 1
SHARE_MIN, LOCKED_MAX_S = 0.8, 0.3
WORK = ("bare", "ledger", "quota")


class Sample(NamedTuple):
    events: int
    seconds: float
    cpu_s: float
    peak_mib: float
    locked_s: float


async def measured(work: str, nats_url: str, url: str) -> Sample:
    """In this process, whose memory tells of nothing else."""
    nc = await connect(nats_url, name="bench")
    first, last = await bounds(nc)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    begun, cpu_begun, locked_s = perf_counter(), process_time(), 0.0
    if work == "bare":
        insert = bare_ingest.copying(url)
        async for batch in recorded(nc, first=first, last=last):
            insert([bare_ingest._row(message.body) for message in batch])
    else:
        rebuilt: Rebuilt = RebuiltLedger() if work == "ledger" else RebuiltQuota(Plans.load())
        locked_s = (await replay(nc, url, rebuilt)).locked_s
    seconds, cpu_s = perf_counter() - begun, process_time() - cpu_begun
    await nc.close()
    return Sample(last, seconds, cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB, locked_s)


class Bench:
    def __init__(self, folder: Path, postgres_url: str) -> None:
        self._folder, self._postgres_url, self._databases = folder, postgres_url, 0
        self._progress = Console(stderr=True, style="dim", highlight=False)
        self.samples: dict[tuple[int, str, str], list[Sample]] = {}

    async def run(self, events: int, rounds: int, kinds: list[str]) -> None:
        folder = self._folder / str(events)
        folder.mkdir()
        with broker_in(folder) as (_, nats_url, _):
            nc = await connect(nats_url, name="bench")
            self._progress.print(f"{events:,} events onto the stream")
            await publish(nc, events)
            await nc.close()
            kept = {(kind, work): self._new_database(kind) for kind in kinds for work in WORK[1:]}
            lost = {(kind, work): self._in_a_process(work, nats_url, url) for (kind, work), url in kept.items()}
            for nth in range(rounds):
                self._progress.print(f"Round {nth + 1} of {rounds}")
                for kind in kinds:
                    for work in WORK:
                        url = kept.get((kind, work)) or self._new_database(kind)
                        sample = self._in_a_process(work, nats_url, url)
                        self.samples.setdefault((events, kind, work), []).append(sample)
            for (kind, work), sample in lost.items():
                self.samples[events, kind, f"{work}, lost"] = [sample]

    def _in_a_process(self, work: str, nats_url: str, url: str) -> Sample:
        command = [sys.executable, "-m", "tests.bench.replay", "--measure", work, nats_url, url]
        said = subprocess.run(command, cwd=PROJECT, env=environment(), stdout=subprocess.PIPE, check=True).stdout
        return Sample(*json.loads(said.splitlines()[-1]))

    def _new_database(self, kind: str) -> str:
        self._databases += 1
        name = f"replay_{self._databases}"
        if kind == "SQLite":
            return sqlite_url(self._folder, f"{name}.db")
        with psycopg.connect(self._postgres_url, autocommit=True) as postgres:
            postgres.execute(f"CREATE DATABASE {name}")
        return make_url(self._postgres_url).set(database=name).render_as_string(hide_password=False)


def report(samples: dict[tuple[int, str, str], list[Sample]]) -> Iterator[Table]:
    table = Table("events", "", "events a second", "CPU µs", "peak MiB", "of the bare read", "writers waited ms",
                  box=None, pad_edge=False, padding=(0, 2, 0, 0))  # fmt: skip
    for (events, kind, work), found in samples.items():
        rate = median(sample.events / sample.seconds for sample in found)
        bare = median(sample.events / sample.seconds for sample in samples[events, kind, "bare"])
        cpu_us = median(sample.cpu_s / sample.events * 1e6 for sample in found)
        peak = max(sample.peak_mib for sample in found)
        waited_s = max(sample.locked_s for sample in found)
        judged = () if work == "bare" else (f"{rate / bare:.0%}", f"{waited_s * 1000:.0f}")
        table.add_row(f"{events:,}", f"{work}, {kind}", f"{rate:,.0f}", f"{cpu_us:.1f}", f"{peak:.0f}", *judged)
    yield table


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench.replay", description="How fast the stream is replayed.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the events, once")
    parser.add_argument("--sizes", type=int, nargs="*", help="numbers of events")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--measure", nargs=3, help=SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        sys.stdout.write("\n" + json.dumps(uvloop.run(measured(*asked.measure))))
        return
    sizes = asked.sizes or (SIZES_QUICK if asked.quick else SIZES)
    with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack.enter_context(postgresql()))
        for events in sizes:
            uvloop.run(bench.run(events, ROUNDS_QUICK if asked.quick else ROUNDS, asked.kinds))
    for table in report(bench.samples):
        Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
