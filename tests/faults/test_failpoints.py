"""Every step of a generation, a report and a settlement as the last one of a process: what is counted afterwards?

A process is killed at the step and started again; then the provider's own count, ledger and totals must agree.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import psutil
import pytest
from nats.aio.client import Client
from sqlalchemy import Connection, text

from services.chat.claude import Prompt
from shared import streams
from shared.broker import connect
from shared.calls import Authorize, Granted
from shared.database import Database
from shared.events import GenerationCompleted, new_id
from tests import forked
from tests.builders import generation_completed, publish
from tests.faults.failpoints import CRASH_AT, arm
from tests.fixtures import MIB, broker_in, eventually, new_database
from tests.forked import Forked
from tests.integration.test_claude_stand_in import stand_in
from tests.people import rows
from tests.quota_process import authorize, authorize_once
from tests.stack import PROJECT, environment, free_port

MODEL = "claude-haiku-4-5"
OUTPUT_TOKENS_MAX = 200
KILLED = -9
# What a killed process had taken comes again after this.
ACK_WAIT_S = 0.5
DEADLINE_S = 60


@dataclass
class Service:
    """One service, one process at a time."""

    name: str
    settings: dict[str, str]
    folder: Path
    url: str = ""
    process: Forked | None = field(default=None, init=False)

    def start(self, crash_at: str | None = None) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        step = {CRASH_AT: crash_at} if crash_at else {}
        variables = environment(**self.settings, **step, CHATRAIL_PORT=str(port))
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = forked.start(
                "tests.faults.failpoints", f"services.{self.name}", "serve", env=variables, output=log
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    async def is_ready(self) -> None:
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:

            async def look() -> bool:
                assert self.is_running, (self.folder / f"{self.name}.log").read_text()[-3000:]
                with suppress(httpx2.TransportError):
                    return (await client.get(f"{self.url}/readyz")).is_success
                return False

            await eventually(look, deadline_s=DEADLINE_S)

    async def dies(self, crash_at: str) -> None:
        """Returns once it has killed itself."""
        assert self.process, "it was never started"
        async with asyncio.timeout(DEADLINE_S):
            assert await self.process.ended() == KILLED, f"{self.name} was never {crash_at}"

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


@dataclass
class System:
    """A broker, quota and ledger on the databases of one kind, and what can be read from them."""

    nats_url: str
    quota: Service
    ledger: Service
    quota_url: str
    ledger_url: str

    async def recorded(self, user_id: str) -> list[dict[str, Any]]:
        return await _select(self.ledger_url, "SELECT * FROM usage WHERE user_id = :user", user=user_id)

    async def total(self, user_id: str) -> int:
        query = "SELECT coalesce(sum(tokens_used), 0) AS tokens FROM usage_totals WHERE user_id = :user"
        return int((await _select(self.quota_url, query, user=user_id))[0]["tokens"])

    async def held(self, user_id: str) -> list[str]:
        found = await _select(self.quota_url, "SELECT generation_id FROM holds WHERE user_id = :user", user=user_id)
        return [row["generation_id"] for row in found]


async def _select(url: str, query: str, **values: str) -> list[dict[str, Any]]:
    def work(db: Connection) -> list[dict[str, Any]]:
        return [dict(row) for row in db.execute(text(query), values).mappings()]

    database = Database(url)
    try:
        return await database.read(work)
    finally:
        await database.close()


async def _create_stream(url: str) -> None:
    nats = await connect(url, name="test")
    js = nats.jetstream()
    await streams.create(js, max_bytes=64 * MIB)
    for durable in streams.DURABLES:
        await js.delete_consumer(streams.STREAM, durable.durable_name or "")
        await js.add_consumer(streams.STREAM, replace(durable, ack_wait=ACK_WAIT_S))
    await nats.close()


@contextmanager
def _system(folder: Path, quota_url: str, ledger_url: str) -> Iterator[System]:
    with broker_in(folder) as nats_url:
        asyncio.run(_create_stream(nats_url))
        settings = {
            "CHATRAIL_NATS_URL": nats_url,
            "CHATRAIL_QUOTA_DATABASE_URL": quota_url,
            "CHATRAIL_LEDGER_DATABASE_URL": ledger_url,
        }
        quota, ledger = (Service(name, settings, folder) for name in ("quota", "ledger"))
        try:
            yield System(nats_url, quota, ledger, quota_url, ledger_url)
        finally:
            for service in (quota, ledger):
                service.kill()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("system")
    with (
        new_database(request, request.param, folder, "quota") as quota_url,
        new_database(request, request.param, folder, "ledger") as ledger_url,
        _system(folder, quota_url, ledger_url) as system,
    ):
        yield system


@pytest.fixture
async def nats(system: System) -> AsyncIterator[Client]:
    client = await connect(system.nats_url, name="test")
    yield client
    await client.close()
    for service in (system.quota, system.ledger):
        service.kill()


async def everything_is_acknowledged(nats: Client) -> None:
    last = (await nats.jetstream().stream_info(streams.STREAM)).state.last_seq

    async def look() -> bool:
        consumers = [await nats.jetstream().consumer_info(streams.STREAM, name) for name in ("quota", "ledger")]
        return all(consumer.ack_floor.stream_seq >= last for consumer in consumers if consumer.ack_floor)

    await eventually(look, deadline_s=DEADLINE_S)


# A generation


OUTBOX, PUBLISHER, METER = "services.chat.outbox:Outbox", "services.chat.publisher", "services.chat.metering:Meter"
NOTHING, SOMETHING, ALL = "nothing", "something", "all"
# What is counted of a generation whose process dies there: nothing before Claude may be asked, then what is known.
GENERATION_STEPS = {
    f"before {OUTBOX}.intend": NOTHING,
    f"after {OUTBOX}.intend": NOTHING,
    "before services.chat.quota:Quota.authorize": NOTHING,
    "after services.chat.quota:Quota.authorize": NOTHING,
    f"before {OUTBOX}.intend#2": NOTHING,
    f"after {OUTBOX}.intend#2": SOMETHING,
    "before services.chat.claude:Claude.stream": SOMETHING,
    f"after {METER}.started": SOMETHING,
    f"after {OUTBOX}.intend#3": SOMETHING,
    f"after {OUTBOX}.intend#4": SOMETHING,
    f"after {METER}.wrote#12": SOMETHING,
    f"after {METER}.counted": SOMETHING,
    f"before {OUTBOX}.settle": SOMETHING,
    f"after {OUTBOX}.settle": ALL,
    f"before {PUBLISHER}:publish": ALL,
    f"after {PUBLISHER}:publish": ALL,
    f"before {OUTBOX}.forget": ALL,
    f"after {OUTBOX}.forget": ALL,
}


@dataclass
class Chatting:
    """Chat beside a system that runs, and the provider that it asks."""

    system: System
    chat: Service
    claude_port: int

    async def ask(self, user_id: str, question: str) -> None:
        body = {
            "userId": user_id,
            "messages": [{"role": "user", "content": question}],
            "maxTokens": OUTPUT_TOKENS_MAX,
            "model": MODEL,
        }
        await self._post("/api/chat", body)

    async def report(self, user_id: str, tokens: int) -> None:
        body = {"userId": user_id, "actionType": "chat_generation", "tokensUsed": tokens}
        await self._post("/api/usage", body)

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        async with httpx2.AsyncClient(trust_env=False, verify=False, timeout=DEADLINE_S) as client:
            with suppress(httpx2.TransportError):
                await client.post(f"{self.chat.url}{path}", json=body)

    async def given(self, tag: str) -> list[dict[str, Any]]:
        """What the provider gave, once it has noticed that its caller is dead."""
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
            records = (await client.get(f"http://127.0.0.1:{self.claude_port}/given?records=1")).json()["records"]
        return [record for record in records if record.get("tag") == tag]

    async def starts_again_and_settles(self, nats: Client) -> None:
        self.chat.start()
        await self.chat.is_ready()

        async def outbox_is_empty() -> bool:
            return not rows(Path(self.chat.settings["CHATRAIL_DATA"]) / "outbox.db", "SELECT event_id FROM outbox")

        await eventually(outbox_is_empty, deadline_s=DEADLINE_S)
        await everything_is_acknowledged(nats)
        self.chat.kill()


@pytest.fixture
async def chatting(system: System, tmp_path: Path) -> AsyncIterator[Chatting]:
    for service in (system.quota, system.ledger):
        service.start()
    with stand_in() as port:
        settings = {
            "CHATRAIL_NATS_URL": system.nats_url,
            "CHATRAIL_DATA": str(tmp_path),
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
        }
        chat = Service("chat", settings, tmp_path)
        try:
            yield Chatting(system, chat, port)
        finally:
            for service in (chat, system.quota, system.ledger):
                service.kill()


@pytest.mark.parametrize("system", ["sqlite"], indirect=True)
async def test_a_generation_is_counted_once_at_whichever_step_its_process_dies(
    chatting: Chatting, nats: Client
) -> None:
    for step, counted in GENERATION_STEPS.items():
        user_id, tag = f"user {uuid4()}", uuid4().hex
        question = f"Hello [deltas 14] [slow 20ms] [usage input=30 output=50] [cache read=7] [tag {tag}]"
        chatting.chat.start(step)
        await chatting.chat.is_ready()
        await chatting.ask(user_id, question)
        await chatting.chat.dies(step)
        await chatting.starts_again_and_settles(nats)

        recorded = await chatting.system.recorded(user_id)
        tokens = sum(row["tokens_used"] for row in recorded)
        assert len(recorded) <= 1, step
        assert await chatting.system.total(user_id) == tokens, step
        assert await chatting.system.held(user_id) == [], step
        if counted == NOTHING:
            assert (tokens, await chatting.given(tag)) == (0, []), step
        elif counted == ALL:
            assert (recorded[0]["outcome"], tokens) == ("completed", 30 + 7 + 50), step
        else:
            prompt = Prompt(MODEL, [{"role": "user", "content": question}], None, OUTPUT_TOKENS_MAX)
            held = prompt.input_tokens_max + OUTPUT_TOKENS_MAX
            # From the first checkpoint with Claude's first word on, it is the provider's own count of the input.
            least = 30 + 7 if "intend#3" in step or "intend#4" in step else prompt.input_tokens_estimate
            assert recorded[0]["outcome"] == "interrupted", step
            assert least <= tokens <= held, step


@pytest.mark.parametrize("system", ["sqlite"], indirect=True)
async def test_a_process_that_dies_again_while_it_recovers_leaves_it_to_the_next(
    chatting: Chatting, nats: Client
) -> None:
    user_id = f"user {uuid4()}"
    chatting.chat.start(f"after {OUTBOX}.intend#4")
    await chatting.chat.is_ready()
    await chatting.ask(user_id, "Hello [deltas 14] [slow 20ms] [usage input=30]")
    await chatting.chat.dies("at its checkpoint")
    for step in (f"after {OUTBOX}.recover", f"before {PUBLISHER}:publish", f"after {PUBLISHER}:publish"):
        chatting.chat.start(step)
        await chatting.chat.dies(step)
    await chatting.starts_again_and_settles(nats)
    (record,) = await chatting.system.recorded(user_id)
    assert record["outcome"] == "interrupted"
    assert await chatting.system.total(user_id) == record["tokens_used"] >= 30
    assert await chatting.system.held(user_id) == []


@pytest.mark.parametrize("system", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("step", "records"), [("before", 0), ("after", 1)])
async def test_a_report_that_was_not_answered_is_on_the_stream_once_or_not_at_all(
    chatting: Chatting, nats: Client, step: str, records: int
) -> None:
    user_id = f"user {uuid4()}"
    chatting.chat.start(f"{step} {PUBLISHER}:publish")
    await chatting.chat.is_ready()
    await chatting.report(user_id, 8_094)
    await chatting.chat.dies(step)
    await chatting.starts_again_and_settles(nats)
    assert [row["tokens_used"] for row in await chatting.system.recorded(user_id)] == [8_094] * records
    assert await chatting.system.total(user_id) == 8_094 * records


@pytest.mark.parametrize("system", ["sqlite"], indirect=True)
async def test_a_report_of_which_nobody_knows_whether_the_stream_has_it_is_counted_once(
    chatting: Chatting, nats: Client
) -> None:
    user_id = f"user {uuid4()}"
    step = f"after {OUTBOX}.settle"
    chatting.chat.start(step)
    await chatting.chat.is_ready()
    broker = _listener(chatting.system.nats_url)
    broker.suspend()
    try:
        await chatting.report(user_id, 8_094)  # sent, and unanswered: it goes to the outbox
        await chatting.chat.dies(step)
    finally:
        broker.resume()
    await chatting.starts_again_and_settles(nats)
    assert [row["tokens_used"] for row in await chatting.system.recorded(user_id)] == [8_094]
    assert await chatting.system.total(user_id) == 8_094


def _listener(url: str) -> psutil.Process:
    port = int(url.rpartition(":")[2])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    return psutil.Process(pid)


# A settlement


HANDLERS = {"quota": "services.quota.handlers:Handlers", "ledger": "services.ledger.handlers:Handlers"}
TRANSACTIONS = {"quota": "services.quota.store:settle", "ledger": "services.ledger.store:record"}
ACK = "nats.aio.msg:Msg.ack"


def _request(user_id: str) -> Authorize:
    return Authorize(
        generation_id=new_id(),
        user_id=user_id,
        input_tokens_max=1_000,
        output_tokens_min=1,
        output_tokens_max=1_000,
    )


async def _held_generation(nats: Client, user_id: str) -> GenerationCompleted:
    """A generation that is over, and whose hold stands."""
    request = _request(user_id)
    granted = await authorize(nats, request)
    assert isinstance(granted, Granted)
    event = generation_completed(
        user_id,
        input_tokens=1_000,
        output_tokens=500,
        generation_id=request.generation_id,
        started_at=granted.started_at,
    )
    return event.model_copy(update={"id": request.generation_id})


IsCounted = Callable[[GenerationCompleted], Awaitable[bool]]


async def _dies_at_each_statement(service: Service, is_counted: Callable[[], Awaitable[bool]]) -> int:
    """How many statements the transaction has: after each of them the process died, and nothing was changed."""

    async def has_ended() -> bool:
        return not service.is_running or await is_counted()

    number = 0
    while True:
        step = f"within {TRANSACTIONS[service.name]}#{number + 1}"
        service.start(step)
        await eventually(has_ended, deadline_s=DEADLINE_S)
        if service.is_running:
            service.kill()
            return number
        await service.dies(step)
        assert not await is_counted(), step
        number += 1


async def _have_everything(system: System, nats: Client) -> None:
    """Both do, and have noted it: in their next process nothing is delivered or read again."""
    for service in (system.quota, system.ledger):
        service.kill()
        service.start()
    await everything_is_acknowledged(nats)
    for service in (system.quota, system.ledger):
        service.kill()
        service.start()
        await service.is_ready()


async def _dies_until_the_commit(service: Service, is_counted: IsCounted, event: GenerationCompleted) -> int:
    step = f"before {HANDLERS[service.name]}.on_usage"
    service.start(step)
    await service.dies(step)
    assert not await is_counted(event)
    return await _dies_at_each_statement(service, lambda: is_counted(event))


async def _dies_after_the_commit(service: Service, is_counted: IsCounted, event: GenerationCompleted) -> None:
    for step in (f"after {HANDLERS[service.name]}.on_usage", f"after {ACK}"):
        service.start(step)
        await service.dies(step)
        assert await is_counted(event)
    service.start()


async def test_an_event_is_counted_once_at_whichever_step_its_consumers_die(system: System, nats: Client) -> None:
    user_id = f"user {uuid4()}"
    quota, ledger = system.quota, system.ledger
    await _have_everything(system, nats)
    first, second = [await _held_generation(nats, user_id) for _ in range(2)]
    quota.kill()
    ledger.kill()

    async def is_settled(event: GenerationCompleted) -> bool:
        return event.id not in await system.held(user_id)

    async def is_recorded(event: GenerationCompleted) -> bool:
        return event.id in [row["id"] for row in await system.recorded(user_id)]

    await publish(nats, first)
    statements = await asyncio.gather(
        _dies_until_the_commit(quota, is_settled, first), _dies_until_the_commit(ledger, is_recorded, first)
    )
    assert min(statements) >= 1
    assert await system.total(user_id) == 1_500

    await _have_everything(system, nats)
    quota.kill()
    ledger.kill()
    await publish(nats, second)
    await asyncio.gather(
        _dies_after_the_commit(quota, is_settled, second), _dies_after_the_commit(ledger, is_recorded, second)
    )
    await everything_is_acknowledged(nats)
    assert [row["tokens_used"] for row in await system.recorded(user_id)] == [1_500] * 2
    assert await system.total(user_id) == 3_000


async def test_a_hold_stands_once_at_whichever_step_of_authorizing_quota_dies(system: System, nats: Client) -> None:
    user_id, quota = f"user {uuid4()}", system.quota
    steps = [f"{when} {HANDLERS['quota']}.authorize" for when in ("before", "after")]
    steps += [
        "after shared.prepared:execute#1",
        "after shared.prepared:execute#2",
        "after services.quota.store:insert_last",
    ]
    for step in steps:
        request = _request(user_id)
        quota.start(step)
        await quota.is_ready()
        asking = asyncio.create_task(authorize_once(nats, request))
        await quota.dies(step)
        asking.cancel()
        is_held = request.generation_id in await system.held(user_id)
        assert is_held == (step == steps[1]), step

        quota.start()
        await quota.is_ready()
        assert isinstance(await authorize(nats, request), Granted)
        assert (await system.held(user_id)).count(request.generation_id) == 1
        quota.kill()


# The launcher


def test_a_step_that_does_not_exist_is_a_mistake_and_not_a_test_that_passes() -> None:
    with pytest.raises(ValueError, match="it should read like"):
        arm("sometime")
    with pytest.raises(AttributeError):
        arm("after services.chat.outbox:Outbox.no_such_step")


def test_any_of_our_modules_can_be_started_with_a_step_by_hand(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.failpoints", "services.chat", "serve"]
    variables = environment(CHATRAIL_DATA=str(tmp_path), **{CRASH_AT: f"after {OUTBOX}.recover"})
    assert subprocess.run(command, cwd=PROJECT, env=variables, timeout=DEADLINE_S, check=False).returncode == KILLED
