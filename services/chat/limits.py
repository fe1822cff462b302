"""Requests that are too large stop at the door."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES_MAX = 1024 * 1024


class BodyLimit:
    """413 for a body that is too large, declared or not. The framework's own limit would say so in plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        is_too_large = declared.isdecimal() and int(declared) > BODY_BYTES_MAX
        size = 0

        async def limited() -> Message:
            nonlocal size
            if is_too_large:  # not read at all: who asks first whether to send it is not told to go on
                raise HTTPException(413)
            message = await receive()
            size += len(message.get("body", b""))
            if size > BODY_BYTES_MAX:
                raise HTTPException(413)
            return message

        return await self._app(scope, limited, send)
