"""A link between two parts that can be cut, left half-open, or slowed: a TCP proxy on this machine."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Literal

Direction = Literal["up", "down", "both"]

# What a switch or a kernel holds of a connection that is slow.
PIECE_BYTES = 64 * 1024


class Link:
    """Listens on `port` and passes everything on to `target_port`, until it is told otherwise.

    `up` is from whoever connects to whom they reach. What was swallowed is gone: a connection that lost bytes is
    reset when the link is healed, and never goes on with a hole in it.
    """

    def __init__(self, name: str, target_port: int) -> None:
        self.name = name
        self._target_port = target_port
        self._is_cut = False
        self._swallows: set[str] = set()
        self._delay_s, self._bytes_per_s = 0.0, 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._healed = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        self._reset_all()

    def cut(self) -> None:
        """Every connection is reset, and so is whoever tries to connect."""
        self._is_cut = True
        self._reset_all()

    def half_open(self, direction: Direction) -> None:
        """Connections stand, new ones are accepted, and bytes go nowhere."""
        self._swallows = {"up", "down"} if direction == "both" else {direction}

    def slow(self, *, delay_s: float, bytes_per_s: float) -> None:
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s

    def heal(self) -> None:
        if self._swallows:
            self._reset_all()
        self._is_cut, self._swallows, self._delay_s, self._bytes_per_s = False, set(), 0.0, 0.0
        self._healed.set()
        self._healed = asyncio.Event()

    def _reset_all(self) -> None:
        for writer in list(self._open):
            _reset(writer)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        self._open.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            self._open.discard(writer)
            _reset(writer)
            return
        self._open.add(up_writer)
        pumps = [
            asyncio.create_task(self._pump("up", reader, up_writer)),
            asyncio.create_task(self._pump("down", up_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, up_writer):
                self._open.discard(end)
                end.close()

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s + len(piece) / self._bytes_per_s)
                if direction not in self._swallows:
                    writer.write(piece)
                    await writer.drain()
        # Nobody hears of an end on a link that is half-open, either.
        while direction in self._swallows:
            await self._healed.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST, as a machine answers that knows of no such connection."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
