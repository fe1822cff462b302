"""The callers: each asks again as soon as it has its whole answer, on a connection of its own that is kept open.

Of HTTP they see the least that tells a whole answer from everything else: they share a core with much of what is
measured, so what they do not spend is there for the others.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from time import perf_counter
from typing import NamedTuple, cast

# No event contains it: JSON escapes carriage returns.
LAST_CHUNK = b"\r\n0\r\n\r\n"
STREAM_TIMEOUT_S = 30


class BadAnswer(Exception):
    """A stream that was refused, broke off, or ended without its last event."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask. Callers repeat the requests, each from another start; only a whole answer contains `end`."""

    port: int
    requests: Sequence[bytes]
    end: bytes


class Timing(NamedTuple):
    first_byte_s: float
    whole_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What one target did for a number of callers."""

    timings: list[Timing]
    seconds: float

    @property
    def streams_per_s(self) -> float:
        return len(self.timings) / self.seconds

    def whole_ms(self, quantile: float) -> float:
        return _quantile([timing.whole_s for timing in self.timings], quantile) * 1000

    def first_byte_ms(self, quantile: float) -> float:
        return _quantile([timing.first_byte_s for timing in self.timings], quantile) * 1000


def _quantile(values: list[float], quantile: float) -> float:
    return sorted(values)[int(quantile * (len(values) - 1))]


def for_seconds(seconds: float) -> Iterator[None]:
    deadline = perf_counter() + seconds
    while perf_counter() < deadline:
        yield


def times(streams: int) -> Iterator[None]:
    return repeat(None, streams)


async def load(target: Target, callers: int, permits: Iterator[None]) -> Load:
    """A stream for each permit, `callers` of them at once. Raises, in a group, BadAnswer or TimeoutError."""
    timings: list[Timing] = []

    async def call(caller: _Caller) -> None:
        for _ in permits:
            async with asyncio.timeout(STREAM_TIMEOUT_S):
                timings.append(await caller.stream())

    apart = len(target.requests) // callers
    connected = [await _connect(target, nth * apart) for nth in range(callers)]
    begun = perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for caller in connected:
                group.create_task(call(caller))
    finally:
        for caller in connected:
            caller.leave()
    return Load(timings, perf_counter() - begun)


class _Caller(asyncio.Protocol):
    _transport: asyncio.Transport
    _first_byte_at: float
    _whole: asyncio.Future[float] | None = None

    def __init__(self, requests: Iterator[bytes], end: bytes) -> None:
        self._requests, self._end = requests, end
        self._answer = bytearray()

    async def stream(self) -> Timing:
        self._answer.clear()
        self._whole = asyncio.get_running_loop().create_future()
        asked_at = perf_counter()
        self._transport.write(next(self._requests))
        whole_at = await self._whole
        self._whole = None
        return Timing(self._first_byte_at - asked_at, whole_at - asked_at)

    def leave(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if not answer:
            self._first_byte_at = perf_counter()
        answer += data
        has_ended = answer.endswith(LAST_CHUNK)
        if has_ended and self._end in answer and self._whole:
            self._whole.set_result(perf_counter())
        elif has_ended or not answer.startswith(b"HTTP/1.1 200"):
            self._fail()

    def connection_lost(self, _error: Exception | None) -> None:
        self._fail()

    def _fail(self) -> None:
        if self._whole and not self._whole.done():
            self._whole.set_exception(BadAnswer(self._answer.decode(errors="replace")[:2000]))


async def _connect(target: Target, start: int) -> _Caller:
    requests = islice(cycle(target.requests), start, None)
    _, caller = await asyncio.get_running_loop().create_connection(
        lambda: _Caller(requests, target.end), "127.0.0.1", target.port
    )
    return caller
