"""Claude's Messages API through its SDK: what is asked, how the stream is read, which models there are."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from time import monotonic
from typing import Annotated, Any

import aiohttp
import httpx2
import msgspec
from anthropic import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncAnthropic,
    DefaultAioHttpClient,
)
from msgspec import Struct
from pydantic import TypeAdapter, ValidationError

from services.chat.metering import estimate_tokens
from services.chat.problems import Problem
from services.chat.sse import SseParser
from shared.events import EVENT_TOKENS_MAX, Name, TokenCounts

# Where a model was retired, and what takes its place (platform.claude.com, model deprecations).
RETIRED: dict[str, tuple[date, str]] = {
    "claude-3-haiku-20240307": (date(2026, 4, 20), "claude-haiku-4-5"),
    "claude-3-5-haiku-20241022": (date(2026, 2, 19), "claude-haiku-4-5"),
    "claude-3-5-haiku-latest": (date(2026, 2, 19), "claude-haiku-4-5"),
    "claude-3-7-sonnet-20250219": (date(2026, 2, 19), "claude-sonnet-4-6"),
    "claude-3-7-sonnet-latest": (date(2026, 2, 19), "claude-sonnet-4-6"),
    "claude-sonnet-4-0": (date(2026, 6, 15), "claude-sonnet-4-6"),
    "claude-sonnet-4-20250514": (date(2026, 6, 15), "claude-sonnet-4-6"),
    "claude-opus-4-0": (date(2026, 6, 15), "claude-opus-4-8"),
    "claude-opus-4-20250514": (date(2026, 6, 15), "claude-opus-4-8"),
    "claude-sonnet-4-5": (date(2026, 11, 30), "claude-sonnet-4-6"),
    "claude-sonnet-4-5-20250929": (date(2026, 11, 30), "claude-sonnet-4-6"),
}
KNOWN = frozenset(
    {
        "claude-haiku-4-5",
        "claude-haiku-4-5-20251001",
        "claude-haiku-5-5",
        "claude-sonnet-4-5",
        "claude-sonnet-4-5-20250929",
        "claude-sonnet-4-6",
        "claude-sonnet-5",
        "claude-sonnet-5-5",
        "claude-opus-4-5",
        "claude-opus-4-5-20251101",
        "claude-opus-4-6",
        "claude-opus-4-7",
        "claude-opus-4-8",
        "claude-opus-5",
        "claude-opus-5-5",
    }
)

# A model that came out after this release is found at the provider, which is asked no more often than this.
LIST_AGAIN_S = 60.0

CONNECT_TIMEOUT_S = 5.0
# For whom it does not say when; and whatever it says, nobody is sent away for longer.
RETRY_AFTER_S, RETRY_AFTER_S_MAX = 5, 3600
# Behind Claude's last word.
END_WITHIN_S = 0.25
# No event of the provider's is nearly as large: without an end to it, memory would be the limit.
EVENT_BYTES_MAX = 1024 * 1024

# Framing that the provider adds to a message, far above what was ever seen.
MESSAGE_OVERHEAD_TOKENS = 16
REQUEST_OVERHEAD_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """What goes to Claude, and nowhere else: never into an event, a log or a metric."""

    model: str
    messages: list[dict[str, str]]
    system: str | None
    output_tokens_max: int

    @property
    def text_bytes(self) -> int:
        texts = [self.system or "", *(message["content"] for message in self.messages)]
        return sum(len(text.encode()) for text in texts)

    @property
    def input_tokens_max(self) -> int:
        """An upper bound without asking anybody: a token is at least one byte."""
        return self.text_bytes + len(self.messages) * MESSAGE_OVERHEAD_TOKENS + REQUEST_OVERHEAD_TOKENS

    @property
    def input_tokens_estimate(self) -> int:
        return estimate_tokens(self.text_bytes) + len(self.messages) * 4


@dataclass(frozen=True, slots=True)
class Started:
    model: str
    counts: TokenCounts


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True)
class Finished:
    """The provider's own count: cumulative, and possibly repeated, so the last one stands. None where it names none.

    It is the last where it has a stop reason, or where the answer ends after it.
    """

    counts: TokenCounts | None
    stop_reason: str | None


Step = Started | Text | Ping | Finished


class _Usage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(Struct):
    model: str
    usage: _Usage


class _MessageStart(Struct):
    message: _Message


class _Delta(Struct, frozen=True):
    type: str = ""
    text: str = ""
    stop_reason: str | None = None


class _BlockDelta(Struct):
    delta: _Delta


class _MessageDelta(Struct):
    delta: _Delta = _Delta()
    usage: _Usage | None = None


class _ErrorBody(Struct):
    type: str = "api_error"
    message: str = ""


class _Error(Struct):
    error: _ErrorBody


_message_start = msgspec.json.Decoder(_MessageStart)
_block_delta = msgspec.json.Decoder(_BlockDelta)
_message_delta = msgspec.json.Decoder(_MessageDelta)
_error = msgspec.json.Decoder(_Error)
_model_name: TypeAdapter[str] = TypeAdapter(Name)


class ProviderError(Exception):
    """Claude refused, failed, or broke off. `problem` says so in words for the person who chats.

    `gave_nothing`: it is certain that no token was given; else the question may have been heard, and billed.
    """

    def __init__(self, problem: Problem, request_id: str | None = None, *, gave_nothing: bool = False) -> None:
        super().__init__(problem.document["title"])
        self.problem = problem
        self.request_id = request_id
        self.gave_nothing = gave_nothing


class Claude:
    """`idle_s`: how long the provider may be silent, before its first byte and between any two."""

    def __init__(self, *, api_key: str, base_url: str, idle_s: float = 60.0) -> None:
        self._http = DefaultAioHttpClient(
            timeout=httpx2.Timeout(idle_s, connect=CONNECT_TIMEOUT_S),
            # Servers close idle connections after 5 s and more: one that is closing must not be asked, because
            # nobody could tell whether the question was heard, and billed.
            limits=httpx2.Limits(max_connections=2000, max_keepalive_connections=200, keepalive_expiry=4),
        )
        self._client = AsyncAnthropic(
            api_key=api_key,
            base_url=base_url,
            # Each of the SDK's own retries can be billed, and none is counted.
            max_retries=0,
            # Its spans could be told, by a variable, to carry what people wrote.
            open_telemetry=False,
            http_client=self._http,
        )
        # What the SDK sends with every message: it puts it together anew for each, which takes longer than sending.
        self._messages_url = self._client.base_url.join("v1/messages")
        headers = {name: value for name, value in self._client.default_headers.items() if isinstance(value, str)}
        self._headers = httpx2.Headers({**headers, "accept-encoding": "identity"})
        self._extensions = {"timeout": self._http.timeout.as_dict()}
        self._listed: frozenset[str] = frozenset()
        self._listed_at = -LIST_AGAIN_S

    async def close(self) -> None:
        await self._client.close()

    async def resolve(self, model: str) -> str:
        """The model to ask for: a retired id gives its successor. Raises Problem 400 for an id nobody knows."""
        if (retired := RETIRED.get(model)) and retired[0] <= datetime.now(UTC).date():
            return retired[1]
        if model in KNOWN or model in self._listed:
            return model
        if monotonic() - self._listed_at > LIST_AGAIN_S:
            self._listed, self._listed_at = await self._models_at_the_provider(), monotonic()
        if model in self._listed:
            return model
        known = sorted(KNOWN | self._listed)
        raise Problem(400, "Unknown model", f"Use one of: {', '.join(known)}.", models=known)

    async def _models_at_the_provider(self) -> frozenset[str]:
        try:
            page = await self._client.models.list(limit=1000, timeout=5)
            return frozenset(model.id for model in page.data)
        except (APIError, AttributeError, TypeError, ValueError):  # the SDK hands on whatever was answered
            return self._listed  # a list that cannot be had now is no reason to refuse the known ones

    async def count_input_tokens(self, prompt: Prompt) -> int:
        """The provider's estimate, with room for its error; the bound by bytes when it cannot be had."""
        try:
            count = await self._client.messages.count_tokens(**_arguments(prompt), timeout=5)
            tokens: int = msgspec.convert(count.input_tokens, Annotated[int, msgspec.Meta(ge=0)])
        except (APIError, AttributeError, ValueError):  # the SDK hands on whatever was answered
            return prompt.input_tokens_max
        return min(prompt.input_tokens_max, tokens + tokens // 50 + MESSAGE_OVERHEAD_TOKENS)

    @asynccontextmanager
    async def _ask(self, prompt: Prompt) -> AsyncIterator[httpx2.Response]:
        # The SDK's client, address and headers, and its errors; but its `messages.create` walks through every message
        # of the conversation, and through three layers for each of Claude's words.
        asked = {**_arguments(prompt), "max_tokens": prompt.output_tokens_max, "stream": True}
        request = httpx2.Request(
            "POST",
            self._messages_url,
            headers=self._headers,
            content=msgspec.json.encode(asked),
            extensions=self._extensions,
        )
        try:
            response = await self._http.send(request, stream=True)
        except httpx2.TimeoutException:
            raise
        except Exception as error:
            raise APIConnectionError(request=request) from error
        try:
            if not response.is_success:
                await response.aread()
                raise APIStatusError(response.reason_phrase, response=response, body=_json(response))
            yield response
        finally:
            await response.aclose()

    @asynccontextmanager
    async def stream(self, prompt: Prompt) -> AsyncIterator["Stream"]:
        """Ask Claude. Raises ProviderError when the provider refuses, fails, or breaks off."""
        try:
            async with self._ask(prompt) as response:
                yield Stream(response, request_id=_name_of(response.headers.get("request-id")))
        except APIStatusError as error:
            raise ProviderError(_refused(error), error.request_id, gave_nothing=True) from error
        except (APITimeoutError, httpx2.TimeoutException) as error:
            problem = Problem(504, "Claude did not answer in time", "What was answered so far is counted; try again.")
            raise ProviderError(problem, gave_nothing=_was_never_connected(error)) from error
        except (APIConnectionError, httpx2.HTTPError) as error:
            problem = Problem(
                502, "Claude cannot be reached", "The connection to Claude failed or broke off; try again."
            )
            raise ProviderError(problem, gave_nothing=_was_never_connected(error)) from error
        except (msgspec.DecodeError, ValidationError) as error:
            raise ProviderError(
                Problem(502, "Claude cannot be understood", "What Claude's API sent makes no sense; try again.")
            ) from error


class Stream:
    def __init__(self, response: httpx2.Response, *, request_id: str | None) -> None:
        self._response = response
        self.request_id = request_id
        self._counts, self._is_started, self._is_complete = TokenCounts(), False, False
        self._failure: ProviderError | None = None

    async def steps(self) -> AsyncIterator[list[Step]]:
        """What has arrived, as it arrives. Ends after Claude's last word; raises ProviderError if that is missing."""
        parser, chunks = SseParser(), self._response.aiter_raw()
        async for chunk in chunks:
            steps: list[Step] = []
            try:
                for event, data in parser.feed(chunk):
                    if step := self._step(event, data):
                        steps.append(step)
            except (msgspec.MsgspecError, ValidationError) as error:
                self._failure = ProviderError(_nonsense(), self.request_id)
                self._failure.__cause__ = error
            if steps:
                yield steps
            if self._failure:
                raise self._failure
            if self._is_complete:
                await _read_on(chunks)
                return
            if parser.waiting_bytes > EVENT_BYTES_MAX:
                raise ProviderError(_nonsense(), self.request_id)
        raise ProviderError(
            Problem(502, "Claude's answer broke off", "The connection ended in the middle; try again."),
            self.request_id,
        )

    def _step(self, event: bytes, data: bytes) -> Step | None:
        """What the event says; None of what says nothing, and of a failure, which is told after all before it."""
        if event == b"content_block_delta":
            delta = _block_delta.decode(data).delta
            return Text(delta.text) if delta.text and delta.type == "text_delta" else None
        if event == b"message_start":
            message = _message_start.decode(data).message
            self._counts, self._is_started = _overwritten(self._counts, message.usage), True
            return Started(_model_name.validate_python(message.model), self._counts)
        if event == b"message_delta":
            last = _message_delta.decode(data)
            if last.usage:
                self._counts = _overwritten(self._counts, last.usage)
            return Finished(self._counts if last.usage else None, last.delta.stop_reason)
        if event == b"ping":
            return Ping()
        if event == b"error":
            problem = _failed(_error.decode(data).error)
            self._failure = ProviderError(problem, self.request_id, gave_nothing=not self._is_started)
        self._is_complete = self._is_complete or event == b"message_stop"
        return None


async def _read_on(chunks: AsyncIterator[bytes]) -> None:
    """Behind Claude's last word comes the end of the response, with which the connection can be used again. What
    becomes of it otherwise is nobody's concern any more."""
    with suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(END_WITHIN_S):
            async for _ in chunks:
                pass


def _name_of(told: str | None) -> str | None:
    """As much of it as an event can have; None where that is no name."""
    name = (told or "")[:128]
    return name if name and name.isprintable() else None


def _was_never_connected(error: BaseException) -> bool:
    # httpx2 says the same of a connection that never was and of one that broke after the question.
    cause: BaseException | None = error
    while cause and not isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        cause = cause.__cause__
    return cause is not None


def _overwritten(counts: TokenCounts, usage: _Usage) -> TokenCounts:
    # Cumulative: what the event names replaces what was known; what it leaves out stays.
    counts = TokenCounts(
        input_tokens=_known(usage.input_tokens, counts.input_tokens),
        output_tokens=_known(usage.output_tokens, counts.output_tokens),
        cache_creation_input_tokens=_known(usage.cache_creation_input_tokens, counts.cache_creation_input_tokens),
        cache_read_input_tokens=_known(usage.cache_read_input_tokens, counts.cache_read_input_tokens),
    )
    if counts.total > EVENT_TOKENS_MAX:
        raise msgspec.ValidationError("more tokens than any answer can have")
    return counts


def _known(new: int | None, old: int) -> int:
    return old if new is None else new


def _arguments(prompt: Prompt) -> dict[str, Any]:
    arguments: dict[str, Any] = {"model": prompt.model, "messages": prompt.messages}
    if prompt.system:
        arguments["system"] = prompt.system
    return arguments


def _refused(error: APIStatusError) -> Problem:
    """What a status of the provider means to the person who chats, and to the operator."""
    status, retry_after = error.status_code, error.response.headers.get("retry-after")
    if status == 429:
        return _busy("Claude is limiting our rate", retry_after)
    if status in (503, 529):
        return _busy("Claude is overloaded", retry_after)
    if status in _REFUSALS:
        return Problem(*_REFUSALS[status])
    if status >= 500:
        return Problem(502, "Claude failed", "The provider had an internal error; try again.")
    return Problem(400, "Claude refuses the request", _message(error))


_REFUSALS = {
    401: (502, "Claude refuses our key", "An operator must check ANTHROPIC_API_KEY."),
    402: (502, "Claude refuses our account", "An operator must check its billing at the provider."),
    403: (502, "Claude refuses our key", "An operator must check what ANTHROPIC_API_KEY may do."),
    404: (400, "Model not available", "The provider does not offer this model to this key; name another."),
    413: (413, "Conversation too long", "Shorten the conversation and try again."),
}


def _failed(error: _ErrorBody) -> Problem:
    if error.type in ("overloaded_error", "rate_limit_error"):
        return _busy("Claude is overloaded", None)
    return Problem(502, "Claude failed in the middle", "What was answered so far is counted; try again.")


def _nonsense() -> Problem:
    return Problem(502, "Claude's answer makes no sense", "What was answered so far is counted; try again.")


def _busy(title: str, retry_after: str | None) -> Problem:
    # In seconds, as Claude says it; what is no such figure says nothing.
    told = int(retry_after) if retry_after and re.fullmatch("[0-9]{1,9}", retry_after) else RETRY_AFTER_S
    seconds = str(min(max(told, 1), RETRY_AFTER_S_MAX))
    return Problem(503, title, f"Try again in {seconds} seconds.", headers={"Retry-After": seconds})


def _json(response: httpx2.Response) -> object:
    try:
        return response.json()
    except ValueError:
        return None


def _message(error: APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    detail = body.get("error") if isinstance(body.get("error"), dict) else {}
    return str((detail or {}).get("message") or "The provider found the request invalid.")
