"""What a person or a test tells the stand-in to do, read from the last user message."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from deploy.claude.errors import ERROR_TYPES, ApiError

STATUSES = {str(status): status for status in ERROR_TYPES}
STOP_REASONS = {
    "end_turn",
    "max_tokens",
    "stop_sequence",
    "tool_use",
    "pause_turn",
    "refusal",
    "model_context_window_exceeded",
}
Ending = Literal["whole", "error", "cut", "hang", "ping", "garbage"]


@dataclass(frozen=True, slots=True)
class Directives:
    """None means: as the stand-in would by itself."""

    delay_s: float | None = None
    first_byte_s: float = 0.0
    refusal_status: int | None = None
    hangs_before: bool = False
    ending: Ending = "whole"
    left_out: Literal["message_delta", "message_stop"] | None = None
    deltas: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_tokens: int = 0
    cache_read_tokens: int = 0
    stop_reason: str | None = None
    repeats_usage: bool = False
    together: bool = False
    splits_bytes: bool = False
    tag: str | None = None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _seconds(text: str) -> float:
    if text.endswith("ms"):
        return _count(text.removesuffix("ms")) / 1000
    return _count(text.removesuffix("s"))


def _counts(text: str, **fields: str) -> dict[str, int]:
    pairs = (pair.split("=") for pair in text.split())
    return {fields[name]: _count(count) for name, count in pairs}


def _tag(text: str) -> str:
    if not TAG.fullmatch(text):
        raise ValueError(text)
    return text


def _stop_reason(text: str) -> str:
    if text not in STOP_REASONS:
        raise ValueError(text)
    return text


MEANINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "slow": lambda text: {"delay_s": _seconds(text)},
    "first-byte": lambda text: {"first_byte_s": _seconds(text)},
    "deltas": lambda text: {"deltas": max(_count(text), 1)},
    "usage": lambda text: _counts(text, input="input_tokens", output="output_tokens"),
    "cache": lambda text: _counts(text, creation="cache_creation_tokens", read="cache_read_tokens"),
    "stop": lambda text: {"stop_reason": _stop_reason(text)},
    "repeat-delta-usage": lambda text: {"repeats_usage": {"": True}[text]},
    "together": lambda text: {"together": {"": True}[text]},
    "split": lambda text: {"splits_bytes": {"": True}[text]},
    "tag": lambda text: {"tag": _tag(text)},
    "fail": lambda text: {"ending": "error"} if text == "middle" else {"refusal_status": STATUSES[text]},
    "cut": lambda text: {"ending": {"middle": "cut"}[text]},
    "hang": lambda text: {"hangs_before": True} if text == "before" else {"ending": {"middle": "hang"}[text]},
    "ping": lambda text: {"ending": {"middle": "ping"}[text]},
    "garbage": lambda text: {"ending": {"middle": "garbage"}[text]},
    "no": lambda text: {"left_out": {name: name for name in ("message_delta", "message_stop")}[text]},
}
TAG = re.compile(r"[\w.-]{1,128}")
PATTERN = re.compile(rf"\[({'|'.join(MEANINGS)})(?: ([^\[\]]*))?\]")


def read(question: str) -> Directives:
    """The directives in a message; 400 for one that cannot be read."""
    told: dict[str, Any] = {}
    for directive in PATTERN.finditer(question):
        name, text = directive.groups(default="")
        try:
            told |= MEANINGS[name](text)
        except (ValueError, KeyError):
            raise ApiError(400, f"messages: the directive {directive[0]} cannot be read") from None
    return Directives(**told)


def strip(question: str) -> str:
    return PATTERN.sub("", question)
