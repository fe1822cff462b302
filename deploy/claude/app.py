"""The HTTP side of the stand-in: routes, pacing, and the record of what was given.

Raw ASGI, because a bench calls it thousands of times a second and wants to measure something else.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

from pydantic_core import to_json

from deploy.claude import directives, events, models
from deploy.claude.directives import Directives
from deploy.claude.errors import ApiError
from deploy.claude.generation import Generation, input_tokens, new_id
from deploy.claude.given import Given, Outcome
from deploy.claude.requests import CountTokensRequest, MessagesRequest

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Gone: TypeAlias = asyncio.Future[None]

PING_EVERY_S = 0.05
BODY_BYTES_MAX = 32 * 1024 * 1024


class ClaudeStandIn:
    def __init__(self, given: Given, *, delay_s: float = 0.0) -> None:
        self._given = given
        self._delay_s = delay_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_id("req")
        try:
            await self._route(scope, receive, send, request_id)
        except ApiError as error:
            await _send_json(send, error.body(request_id), request_id, status=error.status, headers=error.headers)

    async def _route(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        match scope["method"], scope["path"]:
            case "POST", "/v1/messages":
                self._given.message_requests += 1
                request = MessagesRequest.parse(await _authorized_body(scope, receive))
                await self._create(request, receive, send, request_id)
            case "POST", "/v1/messages/count_tokens":
                self._given.count_tokens_calls += 1
                counted = CountTokensRequest.parse(await _authorized_body(scope, receive))
                await _send_json(send, {"input_tokens": _count(counted)}, request_id)
            case "GET", "/v1/models":
                _authorize(scope)
                await _send_json(send, _models_page(scope), request_id)
            case "GET", path if path.startswith("/v1/models/"):
                _authorize(scope)
                model = models.resolve(path.removeprefix("/v1/models/"))
                await _send_json(send, models.describe(model), request_id)
            case "GET", "/given":
                await _send_json(send, self._given_body(scope), request_id)
            case "GET", "/healthz":
                await _send_json(send, {"status": "ok"}, request_id)
            case _:
                raise ApiError(404)

    async def _create(self, request: MessagesRequest, receive: Receive, send: Send, request_id: str) -> None:
        told = directives.read(request.question)
        if told.refusal_status is not None:
            raise ApiError(told.refusal_status)
        generation = Generation.plan(request, told, request_id=request_id)
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            if told.first_byte_s or told.hangs_before:
                await _pause(None if told.hangs_before else told.first_byte_s, gone)
            if not gone.done():
                await (self._stream if request.stream else self._whole)(generation, send, gone)
        finally:
            gone.cancel()

    async def _stream(self, generation: Generation, send: Send, gone: Gone) -> None:
        told = generation.told
        delay_s = self._delay(told)
        put = _put_shredded if told.splits_bytes else _put
        await send(_start(200, generation.request_id, b"text/event-stream; charset=utf-8"))
        await put(send, generation.start())
        if gone.done():
            return
        outcome: Outcome = "failed"
        output_tokens = 0
        try:
            await put(send, events.BLOCK_START)
            await put(send, events.PING)
            for delta in generation.answer.deltas:
                if delay_s:
                    await _pause(delay_s, gone)
                await put(send, delta.event)
                if gone.done():
                    outcome = "disconnected"
                    return
                output_tokens = delta.tokens_so_far
            if told.ending == "cut":
                return
            if told.ending in ("hang", "ping"):
                outcome = "disconnected"
                while not gone.done():
                    await _pause(PING_EVERY_S if told.ending == "ping" else None, gone)
                    await put(send, events.PING)
                return
            for event in generation.closing():
                await put(send, event)
            if told.ending == "whole":
                outcome = "completed"
            await send({"type": "http.response.body"})
        finally:
            self._record(generation, outcome, output_tokens)

    async def _whole(self, generation: Generation, send: Send, gone: Gone) -> None:
        told = generation.told
        if told.ending == "error":
            raise ApiError(529)
        if told.ending in ("hang", "ping"):
            await _pause(None, gone)
            return
        if delay_s := self._delay(told):
            await _pause(delay_s * len(generation.answer.deltas), gone)
        if gone.done():
            return
        output_tokens = generation.answer.output_tokens
        if told.ending == "cut":
            self._record(generation, "failed", output_tokens)
            await send(_start(200, generation.request_id, b"application/json"))
            await _put(send, to_json(generation.whole())[:-1])
        else:
            self._record(generation, "completed", output_tokens)
            await _send_json(send, generation.whole(), generation.request_id)

    def _delay(self, told: Directives) -> float:
        return self._delay_s if told.delay_s is None else told.delay_s

    def _record(self, generation: Generation, outcome: Outcome, output_tokens: int) -> None:
        self._given.record(
            outcome,
            {
                "inputTokens": generation.input_tokens,
                "outputTokens": output_tokens,
                "cacheCreationInputTokens": generation.told.cache_creation_tokens,
                "cacheReadInputTokens": generation.told.cache_read_tokens,
            },
            messageId=generation.message_id,
            requestId=generation.request_id,
            model=generation.model,
            **({"tag": generation.told.tag} if generation.told.tag else {}),
        )

    def _given_body(self, scope: Scope) -> bytes:
        totals = to_json(self._given.totals())
        if _query(scope).get("records") != "1":
            return totals
        return totals[:-1] + b',"records":' + self._given.records() + b"}"


def _count(request: CountTokensRequest) -> int:
    """All that a message would later report as input, cached or not."""
    models.resolve(request.model)
    told = directives.read(request.question)
    return input_tokens(request, told) + told.cache_creation_tokens + told.cache_read_tokens


def _query(scope: Scope) -> dict[str, str]:
    return dict(parse_qsl(scope["query_string"].decode("latin-1")))


def _models_page(scope: Scope) -> dict[str, Any]:
    query = _query(scope)
    limit = query.get("limit", "20")
    if not (limit.isdecimal() and 1 <= int(limit) <= 1000):
        raise ApiError(400, "limit: Input should be between 1 and 1000")
    return models.page(after_id=query.get("after_id"), before_id=query.get("before_id"), limit=int(limit))


def _authorize(scope: Scope) -> dict[bytes, bytes]:
    headers = dict(scope["headers"])
    key = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer")
    if not key.strip():
        raise ApiError(401, "x-api-key header is required")
    if not headers.get(b"anthropic-version"):
        raise ApiError(400, "anthropic-version: header is required")
    return headers


async def _authorized_body(scope: Scope, receive: Receive) -> bytearray:
    headers = _authorize(scope)
    if int(headers.get(b"content-length", b"0")) > BODY_BYTES_MAX:
        raise ApiError(413)
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_BYTES_MAX:
            raise ApiError(413)
    return body


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pause(seconds: float | None, gone: Gone) -> None:
    """Ends early when the caller has gone; without a time only then."""
    await asyncio.wait((gone,), timeout=seconds)


def _start(status: int, request_id: str, content_type: bytes) -> dict[str, Any]:
    headers = [
        (b"content-type", content_type),
        (b"cache-control", b"no-cache"),
        (b"request-id", request_id.encode()),
    ]
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _put(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _put_shredded(send: Send, event: bytes) -> None:
    for shred in events.shreds(event):
        await _put(send, shred)
        # Gives the transport a chance to write this piece before the next joins it.
        await asyncio.sleep(0)


async def _send_json(
    send: Send,
    payload: dict[str, Any] | bytes,
    request_id: str,
    *,
    status: int = 200,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    body = payload if isinstance(payload, bytes) else to_json(payload)
    start = _start(status, request_id, b"application/json")
    start["headers"] += [(b"content-length", b"%d" % len(body)), *(headers or [])]
    await send(start)
    await send({"type": "http.response.body", "body": body})
