"""Requests that are too large stop at the door."""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES_MAX = 1024 * 1024
# For what is sent all the same: nobody hears an answer over a connection that is closed with bytes unread.
READ_ON_S = 5.0


class BodyLimit:
    """413 for a body that is too large, declared or not. The framework's own limit would say so in plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        is_too_large = declared.isdecimal() and int(declared) > BODY_BYTES_MAX
        is_closed_next = headers.get("connection", "").lower() == "close" and "expect" not in headers
        size = 0

        async def limited() -> Message:
            nonlocal size
            message: Message = {"more_body": True}
            if not is_too_large:  # else not read at all: who asks first whether to send it is not told to go on
                message = await receive()
                size += len(message.get("body", b""))
                if size <= BODY_BYTES_MAX:
                    return message
            if is_closed_next and message.get("more_body"):
                await _read_on(receive)
            raise HTTPException(413)

        return await self._app(scope, limited, send)


async def _read_on(receive: Receive) -> None:
    """To the end of the body, and keep none of it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(READ_ON_S):
            while (await receive()).get("more_body"):
                pass
