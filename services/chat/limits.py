"""Requests that are too large, or that come from a page that has no business here, stop at the door."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.chat.identity import is_loopback
from services.chat.problems import Problem

BODY_BYTES_MAX = 1024 * 1024


class LocalHost:
    """Only requests that name this machine: a page whose own name points here (DNS rebinding) is turned away."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback(_host(scope)):
            return await _FOREIGN.response()(scope, receive, send)
        return await self._app(scope, receive, send)


def _host(scope: Scope) -> str:
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    return host if host.endswith("]") else host.rpartition(":")[0] or host


_FOREIGN = Problem(421, "Misdirected request", "In open mode chat answers to localhost and 127.0.0.1 only.")


class BodyLimit:
    """413 for a body over 1 MiB, whether it says so or not, before it is read into memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            return await _too_large().response()(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_BYTES_MAX:
                raise _too_large()
            return message

        return await self._app(scope, counted, send)


def _too_large() -> Problem:
    return Problem(413, "Body too large", "A request may take at most 1 MiB; shorten the conversation.")
