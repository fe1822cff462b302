"""The outbox on a real file, and the publisher on a real broker: what is settled reaches the stream, whoever dies."""

import asyncio
import json
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from functools import cache
from multiprocessing.synchronize import Event as Signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import APIError
from structlog.testing import capture_logs

from services.chat import publisher as publishing
from services.chat.outbox import Outbox
from services.chat.publisher import GROUP_MAX, Publisher
from shared import streams
from shared.broker import connect
from shared.errors import Misconfigured, Unavailable
from shared.events import GenerationCompleted, decode, encode
from tests.builders import generation_completed, publish_raw
from tests.fixtures import MIB, eventually
from tests.people import rows
from tests.stack import free_port


@cache
def event(event_id: str, *, tokens: int = 8_094, **data: str) -> GenerationCompleted:
    generation = generation_completed(input_tokens=tokens, output_tokens=0, generation_id=event_id, **data)
    return generation.model_copy(update={"id": event_id})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@contextmanager
def opened(path: Path) -> Iterator[Outbox]:
    outbox = Outbox(path)
    try:
        yield outbox
    finally:
        outbox.close()


def recovered(path: Path) -> list[GenerationCompleted]:
    """What the next process finds."""
    with opened(path) as outbox:
        return outbox.recover()


# A process that dies


def _write_and_wait(path: Path, settled: GenerationCompleted, left_open: GenerationCompleted, ready: Signal) -> None:
    async def write() -> None:
        outbox = Outbox(path)
        await outbox.settle(settled)
        await outbox.intend(left_open)

    asyncio.run(write())
    ready.set()
    signal.pause()


@contextmanager
def chat_process(path: Path, settled: GenerationCompleted, left_open: GenerationCompleted) -> Iterator[None]:
    """A process that has written both and still holds the outbox. In the end it is killed."""
    spawning = multiprocessing.get_context("spawn")
    ready = spawning.Event()
    process = spawning.Process(target=_write_and_wait, args=(path, settled, left_open, ready))
    process.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        process.kill()
        process.join()


def test_what_a_killed_process_settled_or_left_open_is_recovered_as_it_stood(path: Path) -> None:
    settled = event("1")
    left_open = event("2", outcome="interrupted", usage_source="estimated")
    with chat_process(path, settled, left_open):
        pass
    assert recovered(path) == [settled, left_open]


def test_a_second_process_on_one_outbox_is_refused_in_words_until_the_first_has_ended(path: Path) -> None:
    with chat_process(path, event("1"), event("2")), pytest.raises(Misconfigured) as refusal:
        Outbox(path)
    assert str(refusal.value) == f"Another chat service uses {path}; give this one a data folder of its own."
    assert len(recovered(path)) == 2


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match=f"The data folder {tmp_path}/file cannot be written"):
        Outbox(tmp_path / "file" / "outbox.db")


# What is written


async def test_a_checkpoint_that_comes_late_never_undoes_a_settlement(path: Path) -> None:
    settled = event("1", outcome="completed")
    with opened(path) as outbox:
        await outbox.intend(event("1", tokens=10, outcome="interrupted"))
        await asyncio.gather(outbox.settle(settled), outbox.intend(event("1", tokens=20, outcome="interrupted")))
        await outbox.intend(event("1", tokens=30, outcome="interrupted"))
    assert recovered(path) == [settled]


async def test_of_several_checkpoints_the_last_stands(path: Path) -> None:
    with opened(path) as outbox:
        await asyncio.gather(*(outbox.intend(event("1", tokens=tokens)) for tokens in range(10)))
    assert recovered(path) == [event("1", tokens=9)]


async def test_what_is_forgotten_is_gone_and_the_rest_stays(path: Path) -> None:
    with opened(path) as outbox:
        for event_id in "123":
            await outbox.settle(event(event_id))
        await outbox.forget(["1", "3", "never written"])
    assert recovered(path) == [event("2")]


async def test_what_was_recovered_is_kept_until_it_is_forgotten(path: Path) -> None:
    with opened(path) as outbox:
        await outbox.intend(event("1"))
    assert recovered(path) == recovered(path) == [event("1")]


async def test_a_full_outbox_admits_nothing_new_and_lets_what_is_under_way_end(path: Path) -> None:
    outbox = Outbox(path, events_max=2)
    await outbox.intend(event("1"))
    await outbox.admit()
    await outbox.intend(event("2"))
    for _ in range(2):
        with pytest.raises(Unavailable, match="2 events that the usage stream has not taken yet"):
            await outbox.admit()
        await outbox.settle(event("1"))
    assert outbox.events == 2
    await outbox.forget(["1"])
    await outbox.admit()
    outbox.close()


async def test_what_is_recovered_takes_up_room_too(path: Path) -> None:
    with opened(path) as outbox:
        await asyncio.gather(outbox.intend(event("1")), outbox.settle(event("2")))
    outbox = Outbox(path, events_max=2)
    outbox.recover()
    with pytest.raises(Unavailable):
        await outbox.admit()
    outbox.close()


async def test_how_long_the_stream_has_not_taken_the_oldest_is_told(path: Path) -> None:
    with opened(path) as outbox:
        await outbox.intend(event("1"))
        assert outbox.oldest_s == 0
        await outbox.settle(event("1"))
        first = outbox.oldest_s
        await outbox.settle(event("2"))
        await outbox.settle(event("1"))
        assert outbox.oldest_s > first
        await outbox.forget(["1", "2"])
        assert outbox.oldest_s == 0


def test_what_an_earlier_release_left_is_recovered_and_what_nobody_can_read_is_left_where_it_is(path: Path) -> None:
    earlier = json.loads(encode(event("1")))
    del earlier["data"]["on_disconnect"]
    earlier["dataschema"] = "urn:chatrail:generation.completed:1"
    with opened(path), sqlite3.connect(path) as database:
        found = [("0", b"no event", 1), ("1", json.dumps(earlier).encode(), 0)]
        database.executemany("INSERT INTO outbox VALUES (?, ?, ?)", found)
    database.close()
    assert recovered(path) == [event("1")]
    assert rows(path, "SELECT event_id FROM outbox") == [("0",), ("1",)]


def test_a_file_that_is_no_outbox_is_named(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(Misconfigured, match=f"The outbox {path} cannot be used: file is not a database"):
        Outbox(path)


IDS = st.sampled_from("abcd")
WRITES = st.lists(st.tuples(IDS, st.integers(0, 1000), st.booleans()), min_size=1, max_size=6)


class OutboxLikeADict(RuleBasedStateMachine):
    """Writes that arrive together, what is forgotten, and restarts, in any order: it holds what a dict would."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self._path = Path(self._folder.name) / "outbox.db"
        self._runner = asyncio.Runner()
        self._outbox = Outbox(self._path)
        self._tokens: dict[str, int] = {}
        self._settled: set[str] = set()

    @rule(writes=WRITES)
    def write(self, writes: list[tuple[str, int, bool]]) -> None:
        async def all_at_once() -> None:
            await asyncio.gather(*(self._write(*write) for write in writes))

        self._runner.run(all_at_once())
        for event_id, tokens, is_settled in writes:
            if event_id not in self._settled:
                self._tokens[event_id] = tokens
                self._settled |= {event_id} if is_settled else set()

    @rule(event_ids=st.lists(IDS))
    def forget(self, event_ids: list[str]) -> None:
        self._runner.run(self._outbox.forget(event_ids))
        self._tokens = {event_id: tokens for event_id, tokens in self._tokens.items() if event_id not in event_ids}
        self._settled -= set(event_ids)

    @rule()
    def restart(self) -> None:
        self._outbox.close()
        self._outbox = Outbox(self._path)
        self._settled = set(self._tokens)
        found = {event.id: event.data.tokens_used for event in self._outbox.recover()}
        assert found == self._tokens

    @invariant()
    def knows_how_much_it_has(self) -> None:
        assert self._outbox.events == len(self._tokens)

    def teardown(self) -> None:
        try:
            self.restart()
        finally:
            self._outbox.close()
            self._runner.close()
            self._folder.cleanup()

    async def _write(self, event_id: str, tokens: int, is_settled: bool) -> None:
        write = self._outbox.settle if is_settled else self._outbox.intend
        await write(event(event_id, tokens=tokens))


OutboxLikeADict.TestCase.settings = settings(max_examples=25, stateful_step_count=10, deadline=None)
TestOutboxLikeADict = OutboxLikeADict.TestCase


# The publisher


class Broker:
    """A broker that can go away and come back with what it had."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"nats://127.0.0.1:{port}"
        executable = str(Path(sys.executable).with_name("nats-server"))
        listen = ["--addr", "127.0.0.1", "--port", str(port)]
        self._command = [executable, *listen, "--jetstream", "--store_dir", str(folder), "--log", str(folder / "log")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
async def own_nats(broker: Broker) -> AsyncIterator[Client]:
    """A client of the broker that the test may kill, with a stream that has room for little."""
    client = await connect(broker.url, name="chat")
    await streams.create(client.jetstream(), max_bytes=MIB)
    yield client
    await client.close()


@asynccontextmanager
async def running(publisher: Publisher) -> AsyncIterator[None]:
    task = asyncio.create_task(publisher.run())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def forgotten(path: Path) -> None:
    """Returns once the outbox is empty."""

    async def is_empty() -> bool:
        return not rows(path, "SELECT event_id FROM outbox")

    await eventually(is_empty)


async def on_the_stream(js: JetStreamContext) -> list[GenerationCompleted]:
    """Each event that is on it, under the id that the broker was told."""
    found = []
    for sequence in range(1, (await js.stream_info(streams.STREAM)).state.last_seq + 1):
        message = await js.get_msg(streams.STREAM, seq=sequence)
        event = decode(message.data or b"")
        assert isinstance(event, GenerationCompleted)
        assert (message.headers or {})["Nats-Msg-Id"] == event.id
        found.append(event)
    return found


async def test_what_is_settled_while_the_broker_is_away_is_on_the_stream_once_it_is_back(
    broker: Broker, own_nats: Client, path: Path
) -> None:
    events = [event(f"{number:03}") for number in range(GROUP_MAX + 20)]
    sent: list[GenerationCompleted] = []
    with opened(path) as outbox:
        publisher = Publisher(own_nats, outbox, on_sent=sent.append)
        broker.kill()
        await asyncio.gather(*(outbox.settle(event) for event in events))
        publisher.offer(events)
        assert not await publisher.flush()
        assert (publisher.backlog, sent) == (len(events), [])

        async with running(publisher):
            broker.start()
            await forgotten(path)
    assert sent == events
    found = await on_the_stream(own_nats.jetstream())
    assert sorted(found, key=lambda event: event.id) == events


async def test_what_a_full_stream_refuses_is_kept_and_published_when_it_has_room(
    own_nats: Client, path: Path
) -> None:
    js = own_nats.jetstream()
    for size in (100_000, 10_000, 100):  # to the last hundred bytes
        with suppress(APIError):
            while True:
                await publish_raw(own_nats, b"x" * size)
    filled = (await js.stream_info(streams.STREAM)).state.messages
    sent: list[GenerationCompleted] = []
    with opened(path) as outbox:
        publisher = Publisher(own_nats, outbox, on_sent=sent.append)
        await outbox.settle(event("1"))
        publisher.offer([event("1")])
        assert not await publisher.flush()
        assert (publisher.backlog, sent) == (1, [])

        config = (await js.stream_info(streams.STREAM)).config
        await js.update_stream(replace(config, max_bytes=2 * MIB))
        async with running(publisher):
            await forgotten(path)
    assert sent == [event("1")]
    last = await js.get_msg(streams.STREAM, seq=filled + 1)
    assert decode(last.data or b"") == event("1")


async def test_what_was_published_but_not_forgotten_is_published_again_under_the_same_id(
    own_nats: Client, path: Path
) -> None:
    sent: list[GenerationCompleted] = []
    for _ in range(2):
        with opened(path) as outbox:
            await outbox.settle(event("1"))  # as a process finds it that died before it could forget
            publisher = Publisher(own_nats, outbox, on_sent=sent.append)
            publisher.offer(outbox.recover())
            assert await publisher.flush()
    assert sent == [event("1")] * 2
    assert await on_the_stream(own_nats.jetstream()) == [event("1")]


async def test_what_the_disk_does_not_let_be_forgotten_is_forgotten_later(
    own_nats: Client, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "RETRY_MAX_S", 0.01)
    with opened(path) as outbox:
        await outbox.intend(event("1"))
        with closing(sqlite3.connect(path)) as disk:
            disk.execute("ALTER TABLE outbox RENAME TO away")
            with capture_logs() as logs:
                Publisher(own_nats, outbox, on_sent=lambda _: None).forget_soon(["1"])

                async def is_refused() -> bool:
                    return any(line["event"] == "outbox_not_cleaned" for line in logs)

                await eventually(is_refused)
            disk.execute("ALTER TABLE away RENAME TO outbox")
        await forgotten(path)
