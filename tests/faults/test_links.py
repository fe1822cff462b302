"""Each service, and each thing that it needs, harmed in every way: it is noticed in time, said, and got over.

One stack for all of these tests. Its broker and quota's PostgreSQL are behind proxies; the ledger is on SQLite.
"""

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
import pytest_asyncio
from nats.js import JetStreamContext
from sqlalchemy import make_url

from shared import streams
from shared.broker import connect
from tests.fixtures import MIB, Postgres, broker_in, eventually
from tests.people import rows
from tests.proxy import Mode, Proxy
from tests.stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVICES = ("chat", "quota", "ledger")
# Twice and three times of what is promised: the machine may have other things to do.
NOTICED_WITHIN_S = 30
READY_WITHIN_S = 90
# Of one core. An idle service takes a hundredth or two.
CPU_SHARE_MAX = 0.3


@dataclass
class Rig:
    stack: Stack
    broker: Proxy
    postgres: Proxy
    broker_process: psutil.Process
    js: JetStreamContext

    async def readiness(self, service: str) -> tuple[int, dict[str, str]]:
        """Status and what is missing; 0 where nobody listens. It never takes longer than two seconds to tell."""
        begun = time.monotonic()
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
            try:
                answer = await client.get(f"{self.stack.endpoints[service]}/readyz", timeout=10)
            except httpx2.TransportError:
                return 0, {}
        assert time.monotonic() - begun < 2.5, "two seconds, and a half for a busy machine"
        return answer.status_code, answer.json().get("missing", {})

    async def is_ready(self) -> bool:
        statuses = [(await self.readiness(service))[0] for service in SERVICES]
        return statuses == [200] * len(SERVICES) and all(
            self.said(service)["event"] == "ready" for service in SERVICES
        )

    def said(self, service: str) -> dict[str, Any]:
        """The last that its log tells of its readiness."""
        lines = (self.stack.data / "logs" / f"{service}.log").read_text().splitlines()
        told = [json.loads(line) for line in lines if '"ready"' in line or '"not_ready"' in line]
        return told[-1] if told else {"event": ""}

    async def becomes_ready(self) -> None:
        await eventually(self.is_ready, deadline_s=READY_WITHIN_S)

    async def says_missing(self, part: str, *services: str) -> None:
        """On /readyz and in the log of each, in time."""

        async def is_said() -> bool:
            answers = [await self.readiness(service) for service in services]
            logged = [self.said(service).get("missing", {}) for service in services]
            return all(status == 503 and part in missing for status, missing in answers) and all(
                part in missing for missing in logged
            )

        await eventually(is_said, deadline_s=NOTICED_WITHIN_S)

    async def counts(self, user: str, tokens: int) -> None:
        """What is reported is counted, once, by both."""
        await self.stack.report(user, tokens)

        async def is_counted() -> bool:
            query = f"SELECT coalesce(sum(tokens_used), 0) FROM usage WHERE user_id = '{user}'"  # noqa: S608
            return rows(self.stack.data / "ledger.db", query) == [(tokens,)]

        await eventually(is_counted)
        await self.stack.usage_reaches(user, tokens)


class LogOf:
    """What a service says from now on."""

    def __init__(self, stack: Stack, service: str) -> None:
        self._file = stack.data / "logs" / f"{service}.log"
        self._from = self._file.stat().st_size

    @property
    def lines(self) -> list[str]:
        return self._file.read_bytes()[self._from :].decode().splitlines()

    def has(self, *words: str) -> bool:
        """In one line."""
        return any(all(word in line for word in words) for line in self.lines)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> AsyncIterator[Rig]:
    folder = tmp_path_factory.mktemp("links")
    with broker_in(folder) as broker_url, postgres.new_database() as database_url:
        address = urlsplit(broker_url)
        (process,) = [
            each
            for each in psutil.Process().children()
            if each.name() == "nats-server" and _is_at(each, address.port)
        ]
        async with Proxy("127.0.0.1", address.port or 0) as broker, Proxy(postgres.socket, 0) as database:
            by_tcp = make_url(database_url).set(host="127.0.0.1", port=database.port, query={})
            stack = Stack(
                folder / "data",
                CHATRAIL_NATS_URL=f"nats://127.0.0.1:{broker.port}",
                CHATRAIL_QUOTA_DATABASE_URL=by_tcp.render_as_string(hide_password=False),
                CHATRAIL_STREAM_BYTES_MAX=str(64 * MIB),
            )
            await asyncio.to_thread(stack.start)
            nc = await connect(broker_url, name="test")
            try:
                yield Rig(stack, broker, database, process, nc.jetstream())
            finally:
                await nc.close()
                await asyncio.to_thread(stack.stop)


def _is_at(process: psutil.Process, port: int | None) -> bool:
    return any(connection.laddr.port == port for connection in process.net_connections())


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def whole(rig: Rig) -> None:
    await rig.becomes_ready()


@contextmanager
def harmed(proxy: Proxy, mode: Mode) -> Iterator[None]:
    proxy.set(mode)
    try:
        yield
    finally:
        proxy.set("pass")


async def idle(stack: Stack, services: tuple[str, ...] = SERVICES) -> None:
    """Nobody burns a core while there is nothing that it could do."""
    processes = [psutil.Process(stack.pid(service)) for service in services]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    begun = time.monotonic()
    await asyncio.sleep(1.5)  # the measurement itself
    passed_s = time.monotonic() - begun
    for service, process, used_s in zip(services, processes, before, strict=True):
        share = (sum(process.cpu_times()[:2]) - used_s) / passed_s
        assert share < CPU_SHARE_MAX, f"{service} takes {share:.0%} of a core"


@pytest.mark.parametrize("mode", ["cut", "half_open"])
async def test_a_link_to_the_broker_that_is_dead_is_noticed_by_each_and_got_over(rig: Rig, mode: Mode) -> None:
    pids = {service: rig.stack.pid(service) for service in SERVICES}
    with harmed(rig.broker, mode):
        await rig.says_missing("nats", *SERVICES)
        await idle(rig.stack)
    await rig.becomes_ready()
    await rig.counts(f"after {mode}", 10)
    assert pids == {service: rig.stack.pid(service) for service in SERVICES}, "none had to end for it"


async def test_a_broker_that_hangs_is_noticed_by_each_and_got_over(rig: Rig) -> None:
    rig.broker_process.suspend()
    try:
        await rig.says_missing("nats", *SERVICES)
        await idle(rig.stack)
    finally:
        rig.broker_process.resume()
    await rig.becomes_ready()
    await rig.counts("after a hang", 10)


async def ends_and_comes_back(
    rig: Rig, services: tuple[str, ...], fault: Callable[[], Awaitable[Any]], words: str
) -> None:
    """Each says why it ends, ends in time, and its successor is ready."""
    logs = {service: LogOf(rig.stack, service) for service in services}
    pids = {service: rig.stack.pid(service) for service in services}
    await fault()

    async def all_ended() -> bool:
        parts = rig.stack.parts()
        return all(
            logs[service].has("process_ends", words) and parts.get(service) != pids[service] for service in services
        )

    await eventually(all_ended, deadline_s=NOTICED_WITHIN_S)
    await rig.becomes_ready()


async def test_a_connection_closed_for_good_ends_each(rig: Rig) -> None:
    async def refuse() -> None:
        # As a broker does whose accounts were changed. The client then closes, and never connects again.
        rig.broker.say_to_clients(b"-ERR 'Authorization Violation'\r\n")

    await ends_and_comes_back(rig, SERVICES, refuse, "closed")
    await rig.counts("after the end", 10)


@pytest.mark.parametrize("service", ["quota", "ledger"])
async def test_a_consumer_that_was_deleted_ends_its_service_and_all_is_counted_once(rig: Rig, service: str) -> None:
    await rig.counts(f"before {service}", 10)

    async def delete() -> None:
        await rig.js.delete_consumer(streams.STREAM, service)

    await ends_and_comes_back(rig, (service,), delete, f"no consumer {service}")
    await rig.counts(f"after {service}", 10)
    await rig.stack.usage_reaches(f"before {service}", 10)


@pytest.mark.parametrize("service", ["quota", "ledger"])
async def test_a_consumer_with_another_config_ends_its_service_which_then_says_why_it_does_not_start(
    rig: Rig, service: str
) -> None:
    ours = streams.durable(service)
    log, pid = LogOf(rig.stack, service), rig.stack.pid(service)
    await rig.js.add_consumer(streams.STREAM, replace(ours, max_deliver=5))
    try:

        async def is_refused() -> bool:
            return log.has("process_ends", "max_deliver = 5") and rig.stack.parts().get(service) != pid

        await eventually(is_refused, deadline_s=NOTICED_WITHIN_S)

        async def is_told() -> bool:
            return any(line.startswith(f"The consumer {service} has max_deliver = 5") for line in log.lines)

        await eventually(is_told, deadline_s=NOTICED_WITHIN_S)
    finally:
        await rig.js.add_consumer(streams.STREAM, ours)
    await rig.becomes_ready()


async def test_a_stream_that_was_deleted_ends_each_and_a_new_one_is_used(rig: Rig) -> None:
    await rig.counts("on the old stream", 10)

    async def delete() -> None:
        await rig.js.delete_stream(streams.STREAM)

    await ends_and_comes_back(rig, SERVICES, delete, "stream USAGE")
    await rig.counts("on the new stream", 10)
    await rig.stack.usage_reaches("on the old stream", 10)


async def test_a_stream_that_was_made_anew_before_anybody_looked_ends_each_all_the_same(rig: Rig) -> None:
    await rig.counts("on the first stream", 10)

    async def make_anew() -> None:
        await rig.js.delete_stream(streams.STREAM)
        await streams.create(rig.js, max_bytes=64 * MIB)

    await ends_and_comes_back(rig, SERVICES, make_anew, "stream USAGE")
    await rig.counts("on the second stream", 10)
    await rig.stack.usage_reaches("on the first stream", 10)


@pytest.mark.parametrize("mode", ["cut", "half_open"])
async def test_a_postgresql_that_is_away_is_noticed_and_got_over(rig: Rig, mode: Mode) -> None:
    pid = rig.stack.pid("quota")
    await rig.counts(f"database {mode}", 10)
    with harmed(rig.postgres, mode):
        await rig.says_missing("database", "quota")
        await rig.says_missing("quota", "chat")
        begun = time.monotonic()
        async with httpx2.AsyncClient(base_url=rig.stack.url, trust_env=False, verify=False) as client:
            question = {"userId": "away", "messages": [{"role": "user", "content": "Anybody?"}]}
            answer = await client.post("/api/chat", json=question, timeout=10)
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        assert time.monotonic() - begun < 2.5
        await idle(rig.stack, ("quota",))
    await rig.becomes_ready()
    await rig.counts(f"database after {mode}", 10)
    assert rig.stack.pid("quota") == pid


async def test_a_postgresql_that_is_slow_is_still_used(rig: Rig) -> None:
    rig.postgres.delay_s = 0.05
    with harmed(rig.postgres, "slow"):
        await rig.counts("slow", 10)


async def test_a_sqlite_file_that_another_process_keeps_locked_is_noticed_and_nothing_is_lost(rig: Rig) -> None:
    other = sqlite3.connect(rig.stack.data / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        await rig.stack.report("locked", 10)
        await rig.says_missing("database", "ledger")
        await idle(rig.stack, ("ledger",))
    finally:
        other.execute("ROLLBACK")
        other.close()
    await rig.becomes_ready()

    async def is_recorded() -> bool:
        return bool(rows(rig.stack.data / "ledger.db", "SELECT 1 FROM usage WHERE user_id = 'locked'"))

    await eventually(is_recorded)


async def test_a_sqlite_file_that_is_gone_is_noticed_and_what_comes_meanwhile_is_kept_for_its_return(
    rig: Rig,
) -> None:
    data: Path = rig.stack.data
    await rig.counts("before it went", 10)
    parts = ("ledger.db", "ledger.db-wal", "ledger.db-shm")
    elsewhere = data / "elsewhere"
    elsewhere.mkdir()
    for part in parts:
        os.replace(data / part, elsewhere / part)
    await rig.stack.report("while it is gone", 10)
    await rig.says_missing("database", "ledger")
    await idle(rig.stack, ("ledger",))
    for part in parts:
        (data / part).unlink(missing_ok=True)  # an empty one, made in between
        os.replace(elsewhere / part, data / part)
    await rig.becomes_ready()

    async def is_recorded() -> bool:
        return bool(rows(data / "ledger.db", "SELECT 1 FROM usage WHERE user_id = 'while it is gone'"))

    await eventually(is_recorded)
