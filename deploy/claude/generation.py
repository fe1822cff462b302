"""One message to be given: planned as a whole, before its first byte."""

import os
from dataclasses import dataclass
from typing import Any

from deploy.claude import events, models
from deploy.claude.answers import Answer, answer
from deploy.claude.directives import Directives
from deploy.claude.errors import ApiError
from deploy.claude.requests import CountTokensRequest, MessagesRequest

PLACEHOLDER_OUTPUT_TOKENS = 1


def new_id(kind: str) -> str:
    return f"{kind}_01{os.urandom(11).hex()}"


def input_tokens(request: CountTokensRequest, told: Directives) -> int:
    return request.tokens if told.input_tokens is None else told.input_tokens


@dataclass(frozen=True, slots=True)
class Generation:
    message_id: str
    request_id: str
    model: str
    input_tokens: int
    answer: Answer
    told: Directives

    @classmethod
    def plan(cls, request: MessagesRequest, told: Directives, *, request_id: str) -> "Generation":
        planned = answer(request.question, told, max_tokens=request.max_tokens)
        if told.ending != "whole":
            planned = planned.first_half()
        if told.together:
            planned = planned.together()
        return cls(
            message_id=new_id("msg"),
            request_id=request_id,
            model=models.resolve(request.model),
            input_tokens=input_tokens(request, told),
            answer=planned,
            told=told,
        )

    def usage(self, output_tokens: int) -> dict[str, int]:
        return {
            "input_tokens": self.input_tokens,
            "cache_creation_input_tokens": self.told.cache_creation_tokens,
            "cache_read_input_tokens": self.told.cache_read_tokens,
            "output_tokens": output_tokens,
        }

    def message(self, content: list[dict[str, str]], stop_reason: str | None, output_tokens: int) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {**self.usage(output_tokens), "service_tier": "standard"},
        }

    def start(self) -> bytes:
        return events.message_start(self.message([], None, PLACEHOLDER_OUTPUT_TOKENS))

    def whole(self) -> dict[str, Any]:
        content = [{"type": "text", "text": self.answer.text}]
        return self.message(content, self.answer.stop_reason, self.answer.output_tokens)

    def closing(self) -> list[bytes]:
        if self.told.ending == "error":
            return [events.encode(ApiError(529).body(self.request_id))]
        if self.told.ending == "garbage":
            return [events.GARBAGE]
        total, reason = self.answer.output_tokens, self.answer.stop_reason
        deltas = [events.message_delta(reason, self.usage(total))]
        if self.told.repeats_usage:
            early = [events.message_delta(said, self.usage(total // 2)) for said in (None, reason)]
            deltas = [*early, *deltas, *deltas]
        if self.told.left_out == "message_delta":
            deltas = []
        stop = [] if self.told.left_out == "message_stop" else [events.MESSAGE_STOP]
        return [events.BLOCK_STOP, *deltas, *stop]
