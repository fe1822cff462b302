"""Server-sent events as the provider writes them."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle
from typing import Any

from pydantic_core import to_json


def encode(payload: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (payload["type"].encode(), to_json(payload))


PING = encode({"type": "ping"})
BLOCK_START = encode({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
BLOCK_STOP = encode({"type": "content_block_stop", "index": 0})
MESSAGE_STOP = encode({"type": "message_stop"})
GARBAGE = b'event: content_block_delta\ndata: {"delta": \xff\xfe\n\n'


@lru_cache(maxsize=8192)
def text_delta(text: str) -> bytes:
    return encode({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})


def message_start(message: dict[str, Any]) -> bytes:
    return encode({"type": "message_start", "message": message})


def message_delta(stop_reason: str | None, usage: dict[str, int]) -> bytes:
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return encode({"type": "message_delta", "delta": delta, "usage": usage})


def shreds(event: bytes) -> Iterator[bytes]:
    """The same bytes in pieces that break lines and multi-byte characters, as a network may."""
    start = 0
    for size in cycle((1, 7, 2, 5)):
        if start >= len(event):
            return
        yield event[start : start + size]
        start += size
