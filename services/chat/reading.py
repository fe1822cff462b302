"""How a request is read: in one way only, so that whoever stands in front of us sees the user whom we see."""

import json
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from services.chat.problems import MALFORMED, NOSNIFF, Problem, is_json


class Body(BaseModel):
    """A request body: camelCase, and a field that nobody knows is a mistake worth hearing of."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class OneReading(APIRoute):
    """Raises Problem 422 for what is there twice, of which others take the first, and for what is no UTF-8, of which
    different bytes would become the same user. The answer is read in one way, too: as what it says that it is."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            _check_address(request)
            _check_headers(request)
            body = _JsonRequest(request.scope, request.receive)
            if is_json(body) and await body.body():
                await body.json()
            answer = await handle(body)
            answer.headers.update(NOSNIFF)
            return answer

        return read


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Read once, and kept. Raises Problem 400 for what is no JSON, and 422 for what is, but no sense."""
        if not hasattr(self, "_read"):
            self._read = _parsed(await self.body())
        return self._read


def _parsed(body: bytes) -> Any:
    try:
        # By its NULs it would be read as UTF-16 or UTF-32, too. A mark at its beginning says nothing (RFC 8259, 8.1).
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Problem(400, *MALFORMED) from None
    except RecursionError:
        raise _invalid("The body is nested too deep.") from None
    except ValueError:  # of thousands of digits
        raise _invalid("The body has a number that is too large.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _invalid("The body names a field twice (RFC 8259, section 4); name each once.")
    return fields


def _check_address(request: Request) -> None:
    path, query = request.scope["raw_path"], request.scope["query_string"]
    if b"%" in path or b"%" in query:
        try:
            unquote_to_bytes(path + b"?" + query).decode()
        except UnicodeDecodeError:
            raise _invalid("The address has bytes that are no UTF-8; encode text as UTF-8, and then by %.") from None
    named = [name for name, _ in request.query_params.multi_items()]
    if twice := {name for name in named if named.count(name) > 1}:
        raise _invalid(f"{', '.join(sorted(twice))}: name it once.")


# A proxy in front may go by another of two than we do.
_ONCE = frozenset({b"host", b"authorization", b"content-type", b"content-encoding", b"idempotency-key"})


def _check_headers(request: Request) -> None:
    named = [name for name, _ in request.scope["headers"] if name in _ONCE]
    if twice := {name.decode() for name in named if named.count(name) > 1}:
        raise _invalid(f"{', '.join(sorted(twice))}: send this header once.")
    if b"content-encoding" in named and request.headers["content-encoding"].strip().lower() != "identity":
        raise Problem(
            415,
            "Packed body",
            "Send the body as it is, without Content-Encoding.",
            headers={"Accept-Encoding": "identity"},
        )


def _invalid(detail: str) -> Problem:
    return Problem(422, "Invalid request", detail)
