"""A TCP proxy with faults: between a service and what it needs, so that a test can harm the link between them."""

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Literal

# pass       bytes go through
# cut        every connection is reset, and so is each new one
# half_open  connections stay open and can be opened, and whatever either side sends is swallowed, its end included
# deaf       half-open one way: the server hears nothing, and the client hears it speak
# mute       half-open one way: the server hears, and is not heard
# slow       each chunk is held back for `delay_s`, each way
Mode = Literal["pass", "cut", "half_open", "deaf", "mute", "slow"]
SWALLOWING: dict[str, frozenset[Mode]] = {
    "up": frozenset(["half_open", "deaf"]),
    "down": frozenset(["half_open", "mute"]),
}

CHUNK_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on loopback while its context lasts. `set` takes effect at once, on open connections as on new ones.

    A connection that has lost bytes is never healed, as TCP would not either: it is reset when the mode changes.
    With port 0, `host` is the path of a server's Unix socket.
    """

    def __init__(self, host: str, port: int, *, listen_port: int = 0, delay_s: float = 0.2) -> None:
        self._upstream = host, port
        self.port, self.delay_s = listen_port, delay_s
        self.mode: Mode = "pass"
        self._links: set[_Link] = set()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.close()
        pumps = [pump for link in self._links for pump in link.pumps]
        for link in list(self._links):
            link.reset()
        await asyncio.gather(*pumps, return_exceptions=True)

    @property
    def connections(self) -> int:
        return len(self._links)

    def set(self, mode: Mode) -> None:
        self.mode = mode
        for link in list(self._links):
            if mode == "cut" or (mode in ("pass", "slow") and link.has_lost_bytes):
                link.reset()

    def say_to_clients(self, words: bytes) -> None:
        """Once, on every open connection, as if the server had said it."""
        for link in self._links:
            link.say(words)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, writer)
        self._links.add(link)
        try:
            if self.mode == "cut":
                link.reset()
            elif self.mode == "half_open":
                await link.swallow(reader)
            else:
                await link.run(reader, self._upstream)
        except OSError:
            pass  # the server refuses, or either side has reset its connection
        finally:
            link.reset()
            self._links.discard(link)


class _Link:
    """One client's connection, and the one to the server that was opened for it."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy, self._writers = proxy, [client]
        self.has_lost_bytes = False
        self.pumps: list[asyncio.Task[None]] = []

    async def run(self, client: asyncio.StreamReader, upstream: tuple[str, int]) -> None:
        host, port = upstream
        opening = asyncio.open_connection(host, port) if port else asyncio.open_unix_connection(host)
        server, server_writer = await opening
        self._writers.append(server_writer)
        self.pumps = [
            asyncio.create_task(self._pump("up", client, server_writer)),
            asyncio.create_task(self._pump("down", server, self._writers[0])),
        ]
        await asyncio.wait(self.pumps, return_when=asyncio.FIRST_EXCEPTION)
        self.reset()
        await asyncio.gather(*self.pumps, return_exceptions=True)

    async def swallow(self, client: asyncio.StreamReader) -> None:
        self.has_lost_bytes = True
        self.pumps = [asyncio.create_task(self._pump("up", client, None))]
        await asyncio.gather(*self.pumps, return_exceptions=True)

    def say(self, words: bytes) -> None:
        self._writers[0].write(words)

    def reset(self) -> None:
        for writer in self._writers:
            with suppress(OSError):
                peer = writer.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            if self._proxy.mode == "slow":
                await asyncio.sleep(self._proxy.delay_s)
            if writer is None or self._proxy.mode in SWALLOWING[direction]:
                self.has_lost_bytes = True
            else:
                writer.write(chunk)
                await writer.drain()
        if self._proxy.mode in SWALLOWING[direction]:
            self.has_lost_bytes = True  # nobody is told of the end
        elif writer is not None and not writer.is_closing():
            writer.write_eof()


@contextmanager
def full_listener(port: int = 0) -> Iterator[int]:
    """The port of a server that has no room: connections to it neither come about nor are refused."""
    with socket.socket() as listener, ExitStack() as waiting:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
