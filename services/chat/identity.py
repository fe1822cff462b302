"""Who is calling. In open mode the caller's userId is believed, and so only this machine may call."""

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.types import ASGIApp, Receive, Scope, Send

from services.chat.loopback import is_loopback
from services.chat.problems import Problem


def key_required() -> Problem:
    return Problem(
        401,
        "Operator key required",
        "Send Authorization: Bearer with the value of CHATRAIL_OPERATOR_KEY.",
        headers={"WWW-Authenticate": "Bearer"},
    )


class _Operator(SecurityBase):
    """Lets back ends and operators through: wherever a key is set, they must present it. /docs asks for it."""

    model = HTTPBearer(description="The value of CHATRAIL_OPERATOR_KEY; where none is set, nothing is asked for.")
    scheme_name = "operatorKey"

    def __call__(self, request: Request) -> None:
        key = request.app.state.settings.operator_key
        if key is None:
            return
        scheme, presented = _credentials(request.headers.get("authorization", ""))
        # A header's bytes come as Latin-1, whatever they are; clients send what is typed, which is UTF-8.
        is_right = hmac.compare_digest(presented.encode("latin-1"), key.get_secret_value().encode())
        if scheme.lower() != "bearer" or not is_right:
            raise key_required()


def _credentials(field: str) -> tuple[str, str]:
    """The scheme and what is presented by it, without the white space of neither (RFC 9110, sections 5.5, 11.4)."""
    # Spaces and tabs alone: what else Latin-1 takes for white space are bytes of a key in UTF-8.
    scheme, _, presented = field.strip(" \t").partition(" ")
    return scheme, presented.lstrip(" ")


operator = _Operator()
Operator = Annotated[None, Depends(operator)]


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
