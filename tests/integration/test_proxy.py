"""The faults that other tests build on, between a client and a server that sends everything back."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from tests.fixtures import eventually
from tests.proxy import Mode, Proxy

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _send_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(1024):
        writer.write(chunk)
    writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(_send_back, "127.0.0.1", 0)
    async with server, Proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def connected(proxy: Proxy) -> Ends:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def returned(ends: Ends, sent: bytes) -> bytes:
    reader, writer = ends
    writer.write(sent)
    async with asyncio.timeout(10):
        return await reader.read(1024)


async def swallowed(ends: Ends, sent: bytes) -> bool:
    """Whether nothing comes back within a moment."""
    reader, writer = ends
    writer.write(sent)
    try:
        async with asyncio.timeout(0.3):
            await reader.read(1024)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_and_so_does_the_end(proxy: Proxy) -> None:
    reader, writer = ends = await connected(proxy)
    assert await returned(ends, b"hello") == b"hello"
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()

    async def closed() -> bool:
        return proxy.connections == 0

    await eventually(closed)


async def test_a_cut_resets_open_and_new_connections_until_bytes_pass_again(proxy: Proxy) -> None:
    opened = await connected(proxy)
    assert await returned(opened, b"a") == b"a"
    proxy.set("cut")
    for ends in (opened, await connected(proxy)):
        with pytest.raises(ConnectionResetError):
            await ends[0].read()
    proxy.set("pass")
    ends = await connected(proxy)
    assert await returned(ends, b"b") == b"b"
    ends[1].close()


async def test_a_half_open_link_swallows_bytes_without_a_word_and_is_never_healed(proxy: Proxy) -> None:
    opened, unharmed = await connected(proxy), await connected(proxy)
    assert await returned(opened, b"a") == b"a"
    assert await returned(unharmed, b"a") == b"a"
    proxy.set("half_open")
    new = await connected(proxy)
    for ends in (opened, new):
        assert await swallowed(ends, b"b")
    proxy.set("pass")
    for ends in (opened, new):
        with pytest.raises(ConnectionResetError):
            await ends[0].read()
    assert await returned(unharmed, b"c") == b"c"
    unharmed[1].close()


@pytest.mark.parametrize(("mode", "arrives"), [("deaf", b""), ("mute", b"b")])
async def test_a_link_that_is_half_open_one_way_swallows_only_that_way(mode: Mode, arrives: bytes) -> None:
    heard = bytearray()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1024):
            heard.extend(chunk)
            writer.write(b"an answer")
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    async with server, Proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        opened = await connected(proxy)
        assert await returned(opened, b"a") == b"an answer"
        heard.clear()
        proxy.set(mode)
        assert await swallowed(opened, b"b")
        assert heard == arrives
        proxy.set("pass")
        with pytest.raises(ConnectionResetError):
            await opened[0].read()


async def test_a_slow_link_holds_every_chunk_back_each_way(proxy: Proxy) -> None:
    ends = await connected(proxy)
    proxy.delay_s = 0.1
    proxy.set("slow")
    begun = time.monotonic()
    assert await returned(ends, b"a") == b"a"
    assert time.monotonic() - begun >= 0.2
    ends[1].close()
