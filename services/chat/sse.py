"""Server-sent events (WHATWG HTML, section 9.2), read from Claude and written to browsers."""

import asyncio
import re
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEPALIVE = b": keep-alive\n\n"

# A line's end and an empty line, each with an ending of its own; spelt out, because a group is six times slower.
_EVENT_END = re.compile(rb"\n\n|\n\r\n?|\r\n\n|\r\n\r\n?|\r\r\n?")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseParser:
    """Events out of bytes that may be cut anywhere, with any of the three line endings."""

    def __init__(self) -> None:
        self._rest = b""
        self._has_begun = False

    @property
    def waiting(self) -> bytes:
        """Of an event whose end has not come."""
        return self._rest

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, bytes]]:
        """(event, data) of each event that is complete now."""
        # Where a CRLF is cut in two, its LF is but one more empty line.
        rest = self._rest + chunk
        if not self._has_begun and not BOM_UTF8.startswith(rest):
            self._has_begun, rest = True, rest.removeprefix(BOM_UTF8)
        *blocks, self._rest = _blocks(rest)
        for block in blocks:
            event, data = b"", []
            for line in _lines(block):
                field, _, value = line.partition(b":")
                value = value.removeprefix(b" ")
                if field == b"event":
                    event = value
                elif field == b"data":
                    data.append(value)
            if data:
                yield event, b"\n".join(data)


# Hardly anybody sends a CR: without one both patterns are an LF, or two, which bytes find in a tenth of the time.
def _blocks(text: bytes) -> list[bytes]:
    return _EVENT_END.split(text) if b"\r" in text else text.split(b"\n\n")


def _lines(block: bytes) -> list[bytes]:
    return _LINE_END.split(block) if b"\r" in block else block.split(b"\n")


def frame(event: bytes, data: bytes) -> bytes:
    """One event; `data` is JSON without line breaks."""
    return b"event: " + event + b"\ndata: " + data + b"\n\n"


class EventStream(Response):
    """Sends frames as they come, without a middle layer, and tells when the reader has gone away.

    The status goes out with the first of them: what is raised in its place has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        on_disconnect: Callable[[], None],
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._frames = frames
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with watched(receive, self._on_disconnect):
            first = await anext(self._frames, b"")
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for chunk in self._frames:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def watched(receive: Receive, on_disconnect: Callable[[], None]) -> Iterator[None]:
    """While this lasts, a reader who goes away is noticed."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_disconnect()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
