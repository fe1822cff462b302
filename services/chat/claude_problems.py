"""What it means that Claude refuses, fails or breaks off, in words for the person who chats and for the operator."""

import re

import aiohttp
import msgspec
from msgspec import Struct

from services.chat.problems import Problem

# For whom it does not say when; and whatever it says, nobody is sent away for longer.
RETRY_AFTER_S, RETRY_AFTER_S_MAX = 5, 3600
# Of the provider's own words.
MESSAGE_LENGTH_MAX = 500

# Worth asking again.
_BUSY = {
    408: "Claude cannot answer now",
    409: "Claude cannot answer now",
    425: "Claude cannot answer now",
    429: "Claude is limiting our rate",
    503: "Claude is overloaded",
    529: "Claude is overloaded",
}
_REFUSALS = {
    401: (502, "Claude refuses our key", "An operator must check ANTHROPIC_API_KEY."),
    402: (502, "Claude refuses our account", "An operator must check its billing at the provider."),
    403: (502, "Claude refuses our key", "An operator must check what ANTHROPIC_API_KEY may do."),
    404: (400, "Model not available", "The provider does not offer this model to this key; name another."),
    413: (413, "Conversation too long", "Shorten the conversation and try again."),
}


class _Error(Struct):
    message: str


class _Refusal(Struct):
    error: _Error


_refusal = msgspec.json.Decoder(_Refusal)


class ProviderError(Exception):
    """Claude refused, failed, or broke off. `problem` says so."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.document["title"])
        self.problem = problem

    @property
    def reason(self) -> str:
        """Its root, for the log: of what is not of the network only the kind, for the words may be somebody's."""
        root: BaseException = self
        while root.__cause__:
            root = root.__cause__
        return (
            f"{type(root).__name__}: {root}"
            if isinstance(root, aiohttp.ClientError | OSError)
            else type(root).__name__
        )


def refused(status: int, *, retry_after: str | None, body: bytes) -> Problem:
    """What a status other than success means."""
    if status in _BUSY:
        return busy(_BUSY[status], retry_after)
    if status in _REFUSALS:
        return Problem(*_REFUSALS[status])
    if 300 <= status < 400:
        return redirected()
    if status >= 500:
        return Problem(502, "Claude failed", "The provider had an internal error; try again.")
    return Problem(400, "Claude refuses the request", _message(body))


def redirected() -> Problem:
    detail = (
        "The provider answered with a redirect, which is not followed: an operator must check ANTHROPIC_BASE_URL."
    )
    return Problem(502, "Claude is at another address", detail)


def failed(kind: str, so_far: str, *, is_begun: bool) -> Problem:
    """What an `error` event of this type means. `so_far`, here and below, says what is counted."""
    if kind in ("overloaded_error", "rate_limit_error"):
        return busy("Claude is overloaded", None, so_far=f"{so_far}. " if is_begun else "")
    return Problem(502, f"Claude failed{' in the middle' if is_begun else ''}", f"{so_far}; try again.")


def cannot_be_reached(status: int) -> Problem:
    return Problem(status, "Claude cannot be reached", "No connection came about. Nothing was spent; try again.")


def silent(so_far: str) -> Problem:
    return Problem(504, "Claude did not answer in time", f"{so_far}; try again.")


def too_long(so_far: str) -> Problem:
    return Problem(504, "Claude took too long", f"{so_far}; ask for less at a time.")


def broke_off(so_far: str) -> Problem:
    return Problem(502, "Claude's answer broke off", f"The connection ended. {so_far}; try again.")


def nonsense(so_far: str) -> Problem:
    return Problem(502, "Claude's answer makes no sense", f"{so_far}; try again.")


def not_claude() -> Problem:
    detail = "Whoever answered is not Claude. Nothing was spent; an operator must check ANTHROPIC_BASE_URL."
    return Problem(502, "Claude's answer makes no sense", detail)


def busy(title: str, retry_after: str | None, *, so_far: str = "") -> Problem:
    # In seconds, as Claude says it; what is no such figure says nothing.
    told = int(retry_after) if retry_after and re.fullmatch("[0-9]{1,9}", retry_after) else RETRY_AFTER_S
    seconds = min(max(told, 1), RETRY_AFTER_S_MAX)
    detail = f"{so_far}Try again in {seconds} second{'s' if seconds > 1 else ''}."
    return Problem(503, title, detail, headers={"Retry-After": str(seconds)})


def _message(body: bytes) -> str:
    try:
        message = _refusal.decode(body).error.message
    except (msgspec.MsgspecError, RecursionError):
        message = ""
    if len(message) > MESSAGE_LENGTH_MAX:
        message = f"{message[: MESSAGE_LENGTH_MAX - 1]}…"
    return message or "The provider found the request invalid."
