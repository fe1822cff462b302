"""The client's dangerous defaults, put right."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from nats.aio.client import Client
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError

from shared.broker import Connection, cancelled, connect, connect_options
from tests.fixtures import MIB, broker_in, eventually
from tests.proxy import Proxy

Node = tuple[str, psutil.Process]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[list[Node]]:
    with ExitStack() as running:
        nodes = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            before = set(psutil.Process().children())
            url = running.enter_context(broker_in(tmp_path / name))
            (process,) = set(psutil.Process().children()) - before
            nodes.append((url, process))
        yield nodes


async def test_a_node_that_takes_no_more_bytes_is_left_for_another(two_nodes: list[Node]) -> None:
    client = await connect(",".join(url for url, _ in two_nodes), name="test")
    assert client.connected_url
    ((_, stopped),) = [node for node in two_nodes if node[0].endswith(f":{client.connected_url.port}")]
    stopped.suspend()
    try:
        for _ in range(40):  # more than the system itself takes
            await client.publish("somewhere", bytes(MIB))

        async def is_with_the_other() -> bool:
            return client.is_connected and client.stats["reconnects"] > 0

        await eventually(is_with_the_other, deadline_s=15)
    finally:
        stopped.resume()
        await client.close()


async def test_a_node_that_takes_a_call_and_says_nothing_is_left_with_no_link_open(tmp_path: Path) -> None:
    links: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def say_nothing(*link: Any) -> None:
        links.append(link)

    async def has_called_twice() -> bool:
        return len(links) > 1

    with broker_in(tmp_path) as url:
        client = await connect(url, name="test")
    async with await asyncio.start_server(say_nothing, "127.0.0.1", urlsplit(url).port):
        await eventually(has_called_twice, deadline_s=15)
        first, _ = links[0]
        async with asyncio.timeout(1):
            assert await first.read() == b""
        await client.close()
        for _, writer in links:
            writer.close()


async def test_who_closes_in_the_moment_in_which_a_node_takes_the_call_calls_no_more(tmp_path: Path) -> None:
    called, others = asyncio.Event(), asyncio.all_tasks()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        await reader.read()
        writer.close()

    with broker_in(tmp_path) as url:
        client = await connect(url, name="test")
    async with await asyncio.start_server(say_nothing, "127.0.0.1", urlsplit(url).port):
        await called.wait()
        await client.close()
    left = asyncio.all_tasks() - others
    try:
        _, still_calling = await asyncio.wait(left, timeout=1)
        assert not still_calling
    finally:
        await cancelled(*left)


async def test_who_asks_while_the_first_attempts_to_connect_fail_is_answered_afterwards(nats_server: str) -> None:
    address = urlsplit(nats_server)
    async with Proxy("127.0.0.1", address.port or 0) as proxy:
        proxy.set("half_open")
        client, failed = Connection(), asyncio.Event()
        url = f"nats://127.0.0.1:{proxy.port}"
        connecting = asyncio.create_task(client.connect(pending_size=0, **connect_options(url, "test")))

        async def is_attempted() -> bool:
            return proxy.connections > 0

        async def ask() -> bool:
            """As a service does, whether it is connected or not."""
            try:
                await client.jetstream(timeout=0.2).account_info()
            except ConnectionClosedError:
                failed.set()
                return False
            except (NatsError, OSError):
                return False
            return True

        async def an_attempt_has_failed() -> bool:
            await ask()
            return failed.is_set()

        await eventually(is_attempted)
        await eventually(an_attempt_has_failed)
        proxy.set("pass")
        await connecting
        await eventually(ask, deadline_s=5)
        await client.close()


async def test_what_asks_the_broker_ends_when_it_is_told_to_at_whatever_moment(bare_nats: Client) -> None:
    async def ask() -> None:
        while True:
            await bare_nats.jetstream().account_info()

    async with asyncio.timeout(20):
        for moments in range(60):
            asking = asyncio.create_task(ask())
            for _ in range(moments):
                await asyncio.sleep(0)
            await cancelled(asking)
