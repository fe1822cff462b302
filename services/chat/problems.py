"""Problem documents (RFC 9457): every error in words that a person understands, with what to do next."""

import json
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount

from shared.errors import BadCall, Unavailable

MEDIA_TYPE = "application/problem+json"
NOSNIFF = {"X-Content-Type-Options": "nosniff"}
# For the description of every route, in place of the framework's own form of errors.
SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}
log = structlog.get_logger()


class Problem(Exception):
    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})
        kind = title.lower().replace(" ", "-")
        self.document = {
            "type": f"urn:chatrail:problem:{kind}",
            "title": title,
            "status": status,
            "detail": detail,
            **members,
        }

    @property
    def body(self) -> bytes:
        return json.dumps(self.document, ensure_ascii=False).encode()

    def response(self) -> Response:
        headers = {"Cache-Control": "no-store", **NOSNIFF, **self.headers}
        return Response(self.body, self.status, headers, MEDIA_TYPE)


def unavailable(error: Unavailable) -> Problem:
    return Problem(
        503,
        "Temporarily unavailable",
        f"{error.detail} Nothing was spent; try again in a moment.",
        headers={"Retry-After": str(error.retry_after_s)},
    )


def broken(so_far: str) -> Problem:
    """In the middle of an answer. `so_far` says what is counted of it."""
    return Problem(500, "Internal error", f"Something went wrong on our side. {so_far}.")


def restarting(so_far: str) -> Problem:
    return Problem(
        503, "The service is restarting", f"{so_far}. Try again in 2 seconds.", headers={"Retry-After": "2"}
    )


def not_counted_yet() -> Problem:
    return Problem(
        503,
        "Not counted yet",
        "The answer is whole, but neither disk nor stream takes its count now; it is counted once one of them does.",
    )


def install(app: FastAPI) -> None:
    """Every error of every route leaves as a problem document."""

    async def problem(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)  # noqa: S101 - registered for this type
        return error.response()

    async def away(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Unavailable)  # noqa: S101
        return unavailable(error).response()

    async def bad_call(_request: Request, error: Exception) -> Response:
        return Problem(422, "Invalid request", str(error)).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        if not is_json(request) and any(item["type"] == "model_attributes_type" for item in error.errors()):
            return Problem(415, *_NOT_JSON).response()
        return _invalid(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        title, detail = _HTTP.get(error.status_code, ("Request refused", str(error.detail)))
        headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers
        return Problem(error.status_code, title, detail, headers=headers).response()

    async def left(_request: Request, _error: Exception) -> Response:
        # In the middle of its question: nobody hears this, and it is no fault that an operator should look into.
        return Problem(499, "The caller has left", "The request did not come whole, and nothing was done.").response()

    async def unexpected(_request: Request, error: Exception) -> Response:
        log.error("request_failed", error=type(error).__name__)
        return Problem(500, "Internal error", "Something went wrong on our side; it has been logged.").response()

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(Unavailable, away)
    app.add_exception_handler(BadCall, bad_call)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, unexpected)


def _allowed(request: Request) -> list[str]:
    """The methods of all routes at this address; a single route knows but its own. Of files they can be read."""

    def is_answered(method: str) -> bool:
        scope, routes = {**request.scope, "method": method}, request.app.routes
        return any(route.matches(scope)[0] is Match.FULL for route in routes if not isinstance(route, Mount))

    allowed = [method for method in ("GET", "POST", "PUT", "PATCH", "DELETE") if is_answered(method)] or ["GET"]
    return ["GET", "HEAD", *allowed[1:]] if "GET" in allowed else allowed


def is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


_NOT_JSON = ("Not JSON", "Send one JSON object with Content-Type: application/json.")
MALFORMED = ("Malformed JSON", "The body is not valid JSON; send one JSON object.")
_HTTP = {
    400: MALFORMED,
    404: ("Not found", "There is nothing at this address; the API is described at /docs."),
    405: ("Method not allowed", "This address does not answer that method; the API is described at /docs."),
    413: ("Body too large", "A request may take at most 1 MiB; shorten the conversation."),
}


def _invalid(error: RequestValidationError) -> Problem:
    """Names each field and what is wrong with it; never repeats what was sent."""
    errors = [
        {"field": ".".join(str(part) for part in item["loc"][1:]), "message": _words(item)} for item in error.errors()
    ]
    if any(item["loc"] == ("body",) and item["type"] == "missing" for item in error.errors()):
        return Problem(400, "Missing body", "Send one JSON object with Content-Type: application/json.")
    detail = "; ".join(f"{item['field'] or 'body'}: {item['message']}" for item in errors[:5])
    return Problem(422, "Invalid request", detail, errors=errors[:20])


def _words(item: Mapping[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    return {
        "extra_forbidden": "is not a known field",
        "missing": "is required",
        "model_attributes_type": "must be a JSON object",
        "string_unicode": "must be text in valid Unicode",
        "string_pattern_mismatch": "must not contain control characters",
        "date_from_datetime_inexact": "must be a day, such as 2026-11-01",
        "date_from_datetime_parsing": "must be a day, such as 2026-11-01",
    }.get(item["type"], message)
