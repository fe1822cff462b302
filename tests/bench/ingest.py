"""How fast events get from the stream into both databases: `make bench-ingest`, or `python -m tests.bench.ingest`.

The ledger and quota as they run, each on SQLite and on PostgreSQL, work off the same backlog; beside three limits of
the same run: bare fetch and acknowledge, bare bulk insert of the same rows, and the bare fetch-insert-acknowledge
pipeline. Then an event at a time, idle: how long after its publication the service's answers include it.
Who consumes has a core for itself; broker and PostgreSQL share the others.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import psutil
import psycopg
import uvloop
from nats.js.errors import NotFoundError
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from shared import broker, calls, streams
from shared.broker import connect
from shared.calls import History, HistoryQuery, UsageAnswer, UsageQuery
from shared.events import CONTENT_TYPE, encode
from shared.settings import sqlite_url
from tests.bench import bare_ingest
from tests.bench.processes import Cores, Processes, answers, python
from tests.bench.quota import broker_in, cpu_s, postgresql
from tests.builders import authorized, generation_completed
from tests.stack import free_port

USERS = 1000
IN_FLIGHT = 256
LOOK_EVERY_S = 0.02
# A paused durable delivers nothing until it is told to: what is timed begins when the service is ready.
FAR_OFF = "2199-01-01T00:00:00Z"
SHARE_MIN, VISIBLE_MAX_S = 0.8, 0.1
MIB = 1024**2
PLANS = """\
default = "vast"
[plans.vast]
limit_tokens = 1_000_000_000_000_000
period = "month"
"""


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    events: int
    alone: int


FULL, QUICK = Size(rounds=5, events=40_000, alone=10), Size(rounds=2, events=20_000, alone=10)


class Sample(NamedTuple):
    rate: float
    cpu_us: float


DATABASES = ("SQLite", "PostgreSQL")
SERVICES = (streams.LEDGER, streams.QUOTA)


class Figures:
    """What was measured, by what it was measured of; the median of all rounds stands for it."""

    def __init__(self) -> None:
        self._samples: dict[str, list[Sample]] = {}
        self.visible_s: dict[str, list[float]] = {}

    def add(self, name: str, number: int, *, seconds: float, cpu_s: float) -> None:
        self._samples.setdefault(name, []).append(Sample(number / seconds, cpu_s / number * 1e6))

    def rate(self, name: str) -> float:
        return median(sample.rate for sample in self._samples[name])

    def cpu_us(self, name: str) -> float:
        return median(sample.cpu_us for sample in self._samples[name])


class Bench:
    def __init__(self, size: Size, cores: Cores, folder: Path, nats_url: str, postgres_url: str) -> None:
        self._size, self._cores, self._folder = size, cores, folder
        self._nats_url, self._postgres_url = nats_url, postgres_url
        self._published = self._databases = 0
        self._progress = Console(stderr=True, style="dim", highlight=False)
        self.figures = Figures()

    async def run(self) -> None:
        self._nc = await connect(self._nats_url, name="bench")
        await streams.create(self._nc.jetstream(), max_bytes=512 * MIB)
        self._progress.print(f"{self._size.events:,} events onto the stream")
        await self._publish_all()
        for nth in range(self._size.rounds):
            self._progress.print(f"Round {nth + 1} of {self._size.rounds}")
            await self._bare(FETCH, "fetch")
            for database in DATABASES:
                await self._bare(insert_into(database), "insert", self._new_database(database))
                await self._bare(pipeline_into(database), "pipeline", self._new_database(database))
                for service in SERVICES:
                    await self._service(service, database, alone=self._size.alone)
        await self._nc.close()

    async def _publish_all(self) -> None:
        permits = asyncio.Semaphore(IN_FLIGHT)

        async def publish(user_id: str) -> None:
            await self._publish(user_id)
            permits.release()

        async with asyncio.TaskGroup() as publishing:
            for nth in range(self._size.events):
                await permits.acquire()
                publishing.create_task(publish(f"user_{nth % USERS}"))

    async def _publish(self, user_id: str) -> None:
        """An event as chat publishes it; returns once the stream has it."""
        now = datetime.now(UTC)
        event = generation_completed(
            user_id,
            started_at=now,
            provider_request_id="req_011CSHoEeqs5C35K2UUqR7Fy",
            authorized=authorized(expires_at=now + timedelta(minutes=15)),
        )
        headers = {"Content-Type": CONTENT_TYPE, "Nats-Msg-Id": event.id}
        await self._nc.jetstream().publish(event.type, encode(event), headers=headers, timeout=30)
        self._published += 1

    async def _bare(self, name: str, *what: str) -> None:
        await self._new_durable(bare_ingest.DURABLE)
        step, *database_url = what
        number = await self._last()
        command = python("tests.bench.bare_ingest", step, self._nats_url, str(number), *database_url)
        with self._cores.measuring():
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        said, _ = await process.communicate()
        if process.returncode:
            sys.exit(f"{name} failed.")
        self.figures.add(name, number, **json.loads(said))

    async def _service(self, service: str, database: str, *, alone: int) -> None:
        name, number = f"{service}, {database}", await self._last()
        await self._new_durable(service, pause_until=FAR_OFF)
        with self._serving(service, self._new_database(database)) as process:
            cpu_before_s = cpu_s(process)
            await self._nc.jetstream().resume_consumer(streams.STREAM, service)
            await self._delivered(service)
            begun = perf_counter()
            await self._acknowledged(service)
            seconds = perf_counter() - begun
            self.figures.add(name, number, seconds=seconds, cpu_s=cpu_s(process) - cpu_before_s)
            for nth in range(alone):
                await asyncio.sleep(0.1 + 0.007 * (nth % 10))
                self.figures.visible_s.setdefault(name, []).append(await self._visible_s(service))

    async def _new_durable(self, name: str, pause_until: str | None = None) -> None:
        """From the beginning of the stream."""
        js = self._nc.jetstream()
        with suppress(NotFoundError):
            await js.delete_consumer(streams.STREAM, name)
        await js.add_consumer(streams.STREAM, replace(streams.durable(name), pause_until=pause_until))

    def _new_database(self, kind: str) -> str:
        self._databases += 1
        name = f"ingest_{self._databases}"
        if kind == "SQLite":
            return sqlite_url(self._folder, f"{name}.db")
        with psycopg.connect(self._postgres_url, autocommit=True) as postgres:
            postgres.execute(f"CREATE DATABASE {name}")
        return make_url(self._postgres_url).set(database=name).render_as_string(hide_password=False)

    @contextmanager
    def _serving(self, service: str, database_url: str) -> Iterator[psutil.Process]:
        plans, port = self._folder / "plans.toml", free_port()
        plans.write_text(PLANS)
        variables = {
            "CHATRAIL_NATS_URL": self._nats_url,
            "CHATRAIL_PLANS": str(plans),
            "CHATRAIL_PORT": str(port),
            f"CHATRAIL_{service.upper()}_DATABASE_URL": database_url,
        }
        ready = f"http://127.0.0.1:{port}/readyz"
        with Processes(self._folder, variables) as processes:
            processes.run(*python(f"services.{service}", "migrate"))
            with self._cores.measuring():
                serve = python(f"services.{service}", "serve")
                process = processes.start(service, *serve, ready=lambda: answers(ready))
            yield process

    async def _delivered(self, durable: str) -> None:
        """Returns once the broker delivers: a durable that is resumed first lets the request of before run out."""
        while not (await self._nc.jetstream().consumer_info(streams.STREAM, durable)).delivered.stream_seq:  # noqa: ASYNC110 - of the broker
            await asyncio.sleep(0.002)

    async def _acknowledged(self, durable: str) -> None:
        """Returns once the broker has heard of every event that it is settled."""
        settled, last = 0, await self._last()
        while settled < last:
            await asyncio.sleep(LOOK_EVERY_S)
            floor = (await self._nc.jetstream().consumer_info(streams.STREAM, durable)).ack_floor
            settled = floor.stream_seq if floor else 0

    async def _last(self) -> int:
        """How many events the stream has: what was published here, and what the ledger says of itself."""
        return int((await self._nc.jetstream().stream_info(streams.STREAM)).state.last_seq)

    async def _visible_s(self, service: str) -> float:
        """From the publication of an event until the service's answer includes it."""
        user_id = f"alone_{self._published}"
        await self._used_tokens(service, user_id)
        begun = perf_counter()
        await self._publish(user_id)
        while not await self._used_tokens(service, user_id):  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.001)
        return perf_counter() - begun

    async def _used_tokens(self, service: str, user_id: str) -> int:
        if service == streams.QUOTA:
            answer = await broker.call(self._nc, calls.USAGE, UsageQuery(user_id=user_id))
            return UsageAnswer.model_validate_json(answer).usage.tokens_used
        ever = HistoryQuery(user_id=user_id, from_date=date.min, to_date=date.max)
        days = History.model_validate_json(await broker.call(self._nc, calls.HISTORY, ever)).days
        return sum(day.tokens_used for day in days)


FETCH = "bare fetch and acknowledge"


def insert_into(database: str) -> str:
    return f"bare bulk insert, {database}"


def pipeline_into(database: str) -> str:
    return f"bare fetch-insert-acknowledge, {database}"


def report(figures: Figures) -> Iterator[Table]:
    rates = _table("", "events a second", "CPU µs", "of the bare pipeline", "aim")
    rates.add_row(FETCH, f"{figures.rate(FETCH):,.0f}", f"{figures.cpu_us(FETCH):.1f}")
    for database in DATABASES:
        limit = pipeline_into(database)
        for name in (insert_into(database), limit):
            rates.add_row(name, f"{figures.rate(name):,.0f}", f"{figures.cpu_us(name):.1f}")
        for service in SERVICES:
            name = f"{service}, {database}"
            share = figures.rate(name) / figures.rate(limit)
            aim = f"≥ {SHARE_MIN:.0%} {_verdict(share >= SHARE_MIN)}"
            rates.add_row(name, f"{figures.rate(name):,.0f}", f"{figures.cpu_us(name):.1f}", f"{share:.0%}", aim)
    yield rates
    visible = _table("idle, visible after its publication", "p50 ms", "at most ms", "aim")
    for name, seconds in figures.visible_s.items():
        aim = f"≤ {VISIBLE_MAX_S * 1000:.0f} ms {_verdict(max(seconds) <= VISIBLE_MAX_S)}"
        visible.add_row(name, f"{median(seconds) * 1000:.0f}", f"{max(seconds) * 1000:.0f}", aim)
    yield visible


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench.ingest", description="How fast events reach both databases.")
    parser.add_argument("--quick", action="store_true", help="a minute and a half instead of five, and rougher")
    size, cores = QUICK if parser.parse_args().quick else FULL, Cores()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as folder, ExitStack() as stack:
        postgres_url = stack.enter_context(postgresql())
        _, nats_url, _ = stack.enter_context(broker_in(Path(folder)))
        bench = Bench(size, cores, Path(folder), nats_url, postgres_url)
        uvloop.run(bench.run())
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    for table in report(bench.figures):
        console.print(table, end="\n\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
