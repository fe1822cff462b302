"""Claude's Messages API through its SDK: what is asked, and which models there are."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from time import monotonic
from typing import Annotated, Any

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

from services.chat import claude_problems
from services.chat.claude_stream import Question, Stream
from services.chat.metering import estimate_tokens
from services.chat.problems import Problem

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
COUNT_TIMEOUT_S = 5.0
# The SDK hands on whatever was answered.
_NO_ANSWER = (APIError, AttributeError, TypeError, ValueError, RecursionError)

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


class Claude:
    """`model` is known whatever the provider says: the operator named it. `idle_s`: how long the provider may be
    silent, before its first byte and between any two."""

    def __init__(self, *, api_key: str, base_url: str, model: str = "", idle_s: float = 60.0) -> None:
        self._known, self._idle_s = KNOWN | {model}, idle_s
        self._http = DefaultAioHttpClient(
            timeout=httpx2.Timeout(idle_s, connect=CONNECT_TIMEOUT_S),
            # Servers close idle connections after 5 s and more: one that is closing must not be asked, because
            # nobody could tell whether the question was heard, and billed.
            limits=httpx2.Limits(max_connections=2000, max_keepalive_connections=200, keepalive_expiry=4),
            # What people write, and the key, go where an operator said, and nowhere else.
            follow_redirects=False,
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
        self._headers = {**headers, "accept-encoding": "identity"}
        self._extensions = {"timeout": self._http.timeout.as_dict()}
        self._listed: frozenset[str] = frozenset()
        self._listed_at = -LIST_AGAIN_S

    async def close(self) -> None:
        await self._client.close()

    async def resolve(self, model: str) -> str:
        """The model to ask for: a retired id gives its successor. Raises Problem 400 for an id nobody knows."""
        if (retired := RETIRED.get(model)) and retired[0] <= datetime.now(UTC).date():
            return retired[1]
        if model in self._known or model in self._listed:
            return model
        if monotonic() - self._listed_at > LIST_AGAIN_S:
            self._listed, self._listed_at = await self._models_at_the_provider(), monotonic()
        if model in self._listed:
            return model
        known = sorted((self._known | self._listed) - {""})
        raise Problem(400, "Unknown model", f"Use one of: {', '.join(known)}.", models=known)

    async def _models_at_the_provider(self) -> frozenset[str]:
        try:
            page = await self._client.models.list(limit=1000, timeout=5)
            return frozenset(model.id for model in page.data)
        except _NO_ANSWER:
            return self._listed  # a list that cannot be had now is no reason to refuse the known ones

    async def count_input_tokens(self, prompt: Prompt) -> int | None:
        """The provider's estimate, with room for its error; None where it gives none, as not every provider does.

        Raises Problem 502, 503 or 504 where it cannot be asked right now, or refuses us: the question itself would
        meet the same.
        """
        try:
            count = await self._client.messages.count_tokens(**_arguments(prompt), timeout=COUNT_TIMEOUT_S)
            tokens: int = msgspec.convert(count.input_tokens, Annotated[int, msgspec.Meta(ge=0)])
        except APITimeoutError as error:
            raise claude_problems.silent("Nothing was spent") from error
        except APIConnectionError as error:
            raise claude_problems.cannot_be_reached(502) from error
        except APIStatusError as error:
            retry_after = error.response.headers.get("retry-after")
            problem = claude_problems.refused(error.status_code, retry_after=retry_after, body=b"")
            if problem.status >= 500:
                raise problem from error
            return None
        except _NO_ANSWER:
            return None
        return min(prompt.input_tokens_max, tokens + tokens // 50 + MESSAGE_OVERHEAD_TOKENS)

    def stream(self, prompt: Prompt) -> Stream:
        """Claude's answer to this, which is asked for when it is read."""
        # The SDK's client, address and headers; but its `messages.create` walks through every message of the
        # conversation, and through three layers for each of Claude's words.
        body = msgspec.json.encode({**_arguments(prompt), "max_tokens": prompt.output_tokens_max, "stream": True})
        question = Question(body)
        request = httpx2.Request(
            "POST",
            self._messages_url,
            headers={**self._headers, "content-length": str(len(body))},
            stream=question,
            extensions=self._extensions,
        )
        return Stream(self._http, request, question, model=prompt.model, idle_s=self._idle_s)


def _arguments(prompt: Prompt) -> dict[str, Any]:
    arguments: dict[str, Any] = {"model": prompt.model, "messages": prompt.messages}
    if prompt.system:
        arguments["system"] = prompt.system
    return arguments
