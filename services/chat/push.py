"""A user's usage, pushed to every open tab whenever it changes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from services.chat.deadline import Deadline
from services.chat.quota import Quota
from services.chat.sse import KEEPALIVE, EventStream, frame
from shared.errors import Unavailable
from shared.streams import quota_updated

# Pushes are not durable, and a new period begins without one: ask again this often, which also keeps the line open.
ASK_AGAIN_S = 15.0
# What is subscribed before the broker is reached for the first time is forgotten when that fails.
SUBSCRIBE_AGAIN_S = 1.0
_CHANGED, _CLOSED = True, False


class Watchers:
    def __init__(self, nc: Client, quota: Quota) -> None:
        self._nc, self._quota = nc, quota
        self._open: set[asyncio.Queue[bool]] = set()
        self._is_closed = False

    def watch(self, user_id: str, deadline: Deadline, *, headers: Mapping[str, str]) -> EventStream:
        """`deadline` is the first event's. Raises Unavailable once the process is stopping."""
        if self._is_closed:
            raise Unavailable("The service is restarting.", retry_after_s=2)
        news: asyncio.Queue[bool] = asyncio.Queue()
        self._open.add(news)
        return EventStream(
            self._frames(user_id, news, deadline), on_disconnect=lambda: news.put_nowait(_CLOSED), headers=headers
        )

    def close(self) -> None:
        """Ends all that are open, and takes no new ones."""
        self._is_closed = True
        for news in self._open:
            news.put_nowait(_CLOSED)

    async def _frames(self, user_id: str, news: asyncio.Queue[bool], deadline: Deadline) -> AsyncIterator[bytes]:
        async def changed(_message: Any) -> None:
            news.put_nowait(_CHANGED)

        subscription = None
        shown = b""
        try:
            while True:
                try:
                    if subscription is None and self._nc.is_connected:
                        subscription = await self._nc.subscribe(quota_updated(user_id), cb=changed)
                    usage = (await self._quota.usage(user_id, deadline)).body
                except (Unavailable, NatsError):
                    usage = shown  # the rail counts locally meanwhile, and is told as soon as quota answers
                yield frame(b"usage", usage) if usage != shown else KEEPALIVE
                shown = usage
                if not await _wait(news, ASK_AGAIN_S if subscription else SUBSCRIBE_AGAIN_S):
                    return
                deadline = Deadline()
        finally:
            self._open.discard(news)
            if subscription is not None and self._nc.is_connected:
                await subscription.unsubscribe()


async def _wait(news: asyncio.Queue[bool], ask_again_s: float) -> bool:
    """Until something changed, or it is time to ask again. False once the reader has gone."""
    try:
        async with asyncio.timeout(ask_again_s):
            is_open = await news.get()
    except TimeoutError:
        return True
    while is_open and not news.empty():
        is_open = news.get_nowait()
    return is_open
