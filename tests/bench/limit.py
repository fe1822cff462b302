"""The bare limit: the least that a metered pass-through can be, to measure the real one against.

Raw ASGI under uvicorn. For each stream it asks NATS once, reads the provider with bare aiohttp, passes the bytes on,
and ends once the broker has one event on disk. It parses, counts, checks and keeps nothing.

    python -m tests.bench.limit pass-on NATS_URL CLAUDE_URL PORT     the pass-through
    python -m tests.bench.limit allow NATS_URL                       who is asked, standing for quota
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

import aiohttp
import nats
import uvicorn
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.streams import GIB, USAGE_STREAM

MAY_I = "bench.may_i"
COMPLETED = "bench.completed"
STREAM = replace(USAGE_STREAM, name="BENCH", subjects=[COMPLETED], max_bytes=GIB)
# As large as what really crosses: a call of quota, its answer, an event.
QUESTION, ANSWER, EVENT = b"q" * 200, b"a" * 100, b"e" * 800
TIMEOUT_S = 5
PASSED_ON = frozenset({b"x-api-key", b"anthropic-version", b"content-type"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class PassThrough:
    def __init__(self, nc: Client, provider: aiohttp.ClientSession, url: str) -> None:
        self._nc, self._provider, self._url = nc, provider, url

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        headers = {name.decode(): value.decode() for name, value in scope["headers"] if name in PASSED_ON}
        await self._nc.request(MAY_I, QUESTION, timeout=TIMEOUT_S)
        async with self._provider.post(self._url, data=body, headers=headers) as answer:
            start = [(b"content-type", answer.headers["content-type"].encode())]
            await send({"type": "http.response.start", "status": answer.status, "headers": start})
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        stored = await self._nc.request(COMPLETED, EVENT, timeout=TIMEOUT_S)
        if b'"error"' in stored.data:
            raise RuntimeError(stored.data.decode())
        await send({"type": "http.response.body", "body": b""})


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


async def pass_on(nats_url: str, claude_url: str, port: int) -> None:
    nc = await nats.connect(nats_url)
    await nc.jetstream().add_stream(STREAM)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as provider:
        config = uvicorn.Config(
            PassThrough(nc, provider, f"{claude_url}/v1/messages"),
            port=port,
            http="httptools",
            lifespan="off",
            access_log=False,
            log_level="warning",
        )
        await uvicorn.Server(config).serve()


async def allow(nats_url: str) -> None:
    nc = await nats.connect(nats_url)

    async def yes(question: Msg) -> None:
        await nc.publish(question.reply, ANSWER)

    await nc.subscribe(MAY_I, cb=yes)
    await asyncio.Event().wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case "pass-on", nats_url, claude_url, port:
            uvloop.run(pass_on(nats_url, claude_url, int(port)))
        case "allow", nats_url:
            uvloop.run(allow(nats_url))
