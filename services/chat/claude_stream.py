"""Claude's answer to one question: sent, read as it arrives, and understood."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx2
import msgspec
from msgspec import Struct
from pydantic import TypeAdapter, ValidationError

from services.chat import claude_problems
from services.chat.claude_problems import ProviderError
from services.chat.problems import Problem
from services.chat.sse import SseParser
from shared.events import EVENT_TOKENS_MAX, Name, TokenCounts

# Behind Claude's last word, and behind the status of a refusal.
END_WITHIN_S = 0.25
# Nothing that the provider says at once is nearly as large: without an end to it, memory would be the limit.
EVENT_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Started:
    """Comes once, before all but pings. `counts` is None where the provider begins without any."""

    model: str
    counts: TokenCounts | None


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Unseen:
    """What Claude writes that is not for the reader, its thinking, say: output as any other."""

    text: str


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True)
class Finished:
    """The provider's own count: cumulative, and possibly repeated, so the last one stands. None where it names none.

    It is the last from the stop reason on, or where the answer ends after it.
    """

    counts: TokenCounts | None
    stop_reason: str | None


Step = Started | Text | Unseen | Ping | Finished


class _Usage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(Struct):
    model: Any = None
    usage: _Usage | None = None


class _MessageStart(Struct):
    message: _Message


class _Delta(Struct, frozen=True):
    type: str = ""
    text: str = ""
    thinking: Any = None
    partial_json: Any = None
    stop_reason: str | None = None


class _BlockStart(Struct):
    content_block: _Delta


class _BlockDelta(Struct):
    delta: _Delta


class _MessageDelta(Struct):
    delta: _Delta = _Delta()
    usage: _Usage | None = None


class _ErrorBody(Struct):
    type: str = "api_error"


class _Error(Struct):
    error: _ErrorBody


class _Counted(Struct):
    """Of an answer that did not come as a stream."""

    usage: dict[str, Any]


# What is no event of Claude's, nested too deep included.
_NONSENSE = (msgspec.MsgspecError, ValidationError, RecursionError, UnicodeDecodeError)
_message_start = msgspec.json.Decoder(_MessageStart)
_block_start = msgspec.json.Decoder(_BlockStart)
_block_delta = msgspec.json.Decoder(_BlockDelta)
_message_delta = msgspec.json.Decoder(_MessageDelta)
_error = msgspec.json.Decoder(_Error)
_counted = msgspec.json.Decoder(_Counted)
_model_name: TypeAdapter[str] = TypeAdapter(Name)


class Question(httpx2.AsyncByteStream):
    """The body of a request, which knows whether anything of the request may have been sent.

    The HTTP client begins to read it when a connection stands, and writes the headers together with it.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.may_be_heard = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.may_be_heard = True
        yield self._body


class Stream:
    """One question and its answer. Nothing is sent before `steps` is read. Claude may be silent for `idle_s`."""

    def __init__(
        self, http: httpx2.AsyncClient, request: httpx2.Request, question: Question, *, model: str, idle_s: float
    ) -> None:
        self._http, self._request, self._question = http, request, question
        self._model, self._idle_s = model, idle_s
        self.request_id: str | None = None
        self._parser = SseParser()
        self._counts, self._has_begun, self._is_complete = TokenCounts(), False, False
        self._is_refused = False
        # Whether it says that it is a stream of events, or one of Claude's was in it all the same.
        self._is_stream = True
        self._failure: ProviderError | None = None

    @property
    def gave_nothing(self) -> bool:
        """Whether it is certain that no token was given, however this ended: Claude refused, was sent nothing, or
        was not who answered."""
        return self._is_refused or self._is_somebody_elses or not self._question.may_be_heard

    @property
    def _is_somebody_elses(self) -> bool:
        """A login page, say: no stream, no event of Claude's, and no document that names what it used."""
        return not (self._is_stream or _names_usage(self._parser.waiting))

    @property
    def so_far(self) -> str:
        """What is counted if it ends now, in words."""
        if self.gave_nothing:
            return "Nothing was spent"
        if not self._has_begun:
            return "The question may have been heard, and is counted"
        return "What was answered so far is counted"

    def too_long(self) -> Problem:
        """What it means to the reader that the time for the whole answer is over."""
        return self._problem(claude_problems.too_long, unsent_status=504)

    async def steps(self) -> AsyncGenerator[list[Step], None]:
        """What has arrived, as it arrives. Ends after Claude's last word.

        Raises ProviderError when Claude refuses, fails, or breaks off.
        """
        try:
            response = await self._answer()
            try:
                self.request_id = _name_of(response.headers.get("request-id"))
                if not response.is_success:
                    await self._refuse(response)
                self._is_stream = _is_event_stream(response)
                # Asked for as it is; but a proxy on the way may pack it all the same.
                is_packed = "content-encoding" in response.headers
                chunks = response.aiter_bytes() if is_packed else response.aiter_raw()
                async for chunk in self._in_time(chunks):
                    if steps := self._understood(chunk):
                        yield steps
                    if self._failure:
                        raise self._failure
                    if self._is_complete:
                        await _read_on(chunks)
                        return
                raise ProviderError(self._problem(claude_problems.broke_off, unsent_status=502))
            finally:
                await response.aclose()
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise ProviderError(self._problem(claude_problems.silent, unsent_status=504)) from error
        except httpx2.DecodingError as error:
            raise ProviderError(self._nonsense()) from error
        except (httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            raise ProviderError(self._problem(claude_problems.broke_off, unsent_status=502)) from error

    async def _in_time(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Raises TimeoutError where nothing comes for twice as long as it may: of an answer whose framing makes no
        sense the HTTP client, which looks after silence, says nothing any more, not even that it was closed."""
        idle_s, loop = self._idle_s, asyncio.get_running_loop()
        # Put off once in a while: to do so for each chunk would take longer than to read it.
        put_off_at = loop.time() + idle_s
        async with asyncio.timeout(2 * idle_s) as limit:
            async for chunk in chunks:
                if (heard_at := loop.time()) > put_off_at:
                    put_off_at = heard_at + idle_s
                    limit.reschedule(put_off_at + idle_s)
                yield chunk

    async def _answer(self) -> httpx2.Response:
        try:
            return await self._http.send(self._request, stream=True)
        except httpx2.RemoteProtocolError as error:  # a redirect to what is no address
            self._is_refused = True
            raise ProviderError(claude_problems.redirected()) from error
        except httpx2.HTTPError:
            raise
        except Exception as error:
            raise httpx2.ConnectError(str(error)) from error

    async def _refuse(self, response: httpx2.Response) -> None:
        self._is_refused = True
        body = await _beginning_of(response)
        retry_after = response.headers.get("retry-after")
        raise ProviderError(claude_problems.refused(response.status_code, retry_after=retry_after, body=body))

    def _understood(self, chunk: bytes) -> list[Step]:
        """What it says, up to Claude's last word. A failure is left in `_failure`: it is told after all that came
        before it."""
        steps: list[Step] = []
        try:
            for event, data in self._parser.feed(chunk):
                if step := self._step(event, data):
                    if not self._has_begun and not isinstance(step, Ping):
                        steps += self._begun_with(step)
                    steps.append(step)
                if self._is_complete:
                    break
            if self._is_complete and not self._has_begun:
                steps += self._begun_with(None)
        except _NONSENSE as error:
            self._failure = ProviderError(self._nonsense())
            self._failure.__cause__ = error
        if len(self._parser.waiting) > EVENT_BYTES_MAX and not self._is_complete:
            self._failure = self._failure or ProviderError(self._nonsense())
        return steps

    def _begun_with(self, first: Step | None) -> list[Step]:
        """What is to be said before it: where the provider does not name the model, it is the one that was asked."""
        self._has_begun = self._is_stream = True
        return [] if isinstance(first, Started) else [Started(self._model, None)]

    def _step(self, event: bytes, data: bytes) -> Step | None:
        """What the event says; None of what says nothing, and of a failure."""
        if event == b"content_block_delta":
            delta = _block_delta.decode(data).delta
            return Text(delta.text) if delta.text and delta.type == "text_delta" else _unseen(delta)
        if event == b"content_block_start":
            block = _block_start.decode(data).content_block
            return Text(block.text) if block.text and block.type == "text" else None
        if event == b"message_start":
            return None if self._has_begun else self._started(_message_start.decode(data).message)
        if event == b"message_delta":
            last = _message_delta.decode(data)
            if last.usage:
                self._counts = _overwritten(self._counts, last.usage)
            is_counted = last.usage is not None and last.usage.output_tokens is not None
            return Finished(self._counts if is_counted else None, last.delta.stop_reason)
        if event == b"ping":
            self._is_stream = True
            return Ping()
        if event == b"error":
            self._is_refused = not self._has_begun
            self._failure = ProviderError(self._failed(_error.decode(data).error.type))
        self._is_complete = self._is_complete or event == b"message_stop"
        return None

    def _started(self, message: _Message) -> Started:
        if message.usage:
            self._counts = _overwritten(self._counts, message.usage)
        try:
            model = _model_name.validate_python(message.model)
        except ValidationError:  # it is but a label
            model = self._model
        return Started(model, self._counts if message.usage else None)

    def _failed(self, kind: str) -> Problem:
        return claude_problems.failed(kind, self.so_far, is_begun=self._has_begun)

    def _nonsense(self) -> Problem:
        return self._problem(claude_problems.nonsense, unsent_status=502)

    def _problem(self, told: Callable[[str], Problem], *, unsent_status: int) -> Problem:
        """As it is told of an answer that went wrong; but perhaps there was none, or not of Claude's."""
        if not self._question.may_be_heard:
            return claude_problems.cannot_be_reached(unsent_status)
        return claude_problems.not_claude() if self._is_somebody_elses else told(self.so_far)


def _unseen(delta: _Delta) -> Unseen | None:
    text = delta.thinking or delta.partial_json
    return Unseen(text) if text and isinstance(text, str) else None


def _is_event_stream(response: httpx2.Response) -> bool:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower() == "text/event-stream"


def _names_usage(body: bytes) -> bool:
    try:
        return bool(_counted.decode(body).usage)
    except _NONSENSE:
        return False


async def _beginning_of(response: httpx2.Response) -> bytes:
    """As much as comes of the words of a refusal: its status is enough."""
    body = b""
    with suppress(OSError, httpx2.HTTPError, aiohttp.ClientError):
        async with asyncio.timeout(END_WITHIN_S):
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > EVENT_BYTES_MAX:
                    break
    return body


async def _read_on(chunks: AsyncIterator[bytes]) -> None:
    """Behind Claude's last word comes the end of the response, with which the connection can be used again. What
    becomes of it otherwise is nobody's concern any more."""
    with suppress(OSError, httpx2.HTTPError, aiohttp.ClientError):
        async with asyncio.timeout(END_WITHIN_S):
            async for _ in chunks:
                pass


def _name_of(told: str | None) -> str | None:
    """As much of it as an event can have; None where that is no name."""
    name = (told or "")[:128]
    return name if name and name.isprintable() else None


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
