"""Requests as the provider reads them: what it accepts, and in what words it refuses the rest."""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from deploy.claude.answers import count_tokens
from deploy.claude.errors import ApiError

# The role and the borders of a message, on top of its text.
MESSAGE_OVERHEAD_TOKENS = 4


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class TextBlock(_Strict):
    type: Literal["text"]
    text: str


Text: TypeAlias = str | list[TextBlock]
UNION_BRANCHES = {"str", "list[TextBlock]"}


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "".join(block.text for block in text)


class Message(_Strict):
    role: Literal["user", "assistant"]
    content: Text


class CountTokensRequest(_Strict):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: Text = ""

    @field_validator("messages")
    @classmethod
    def _from_a_user_who_says_something(cls, messages: list[Message]) -> list[Message]:
        if messages[0].role != "user":
            raise PydanticCustomError("first_role", 'first message must use the "user" role')
        said = messages[:-1] if messages[-1].role == "assistant" else messages
        if not all(_plain(message.content).strip() for message in said):
            raise PydanticCustomError("empty", "text content blocks must be non-empty")
        return messages

    @classmethod
    def parse(cls, body: bytes | bytearray) -> Self:
        """The request in a body; 400 with the first fault in it otherwise."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as invalid:
            raise ApiError(400, _words(invalid.errors(include_url=False, include_input=False))) from None

    @property
    def question(self) -> str:
        """The last user message: where directives are read, and what the answer is about."""
        return next(_plain(said.content) for said in reversed(self.messages) if said.role == "user")

    @property
    def tokens(self) -> int:
        texts = [self.system, *(message.content for message in self.messages)]
        return sum(count_tokens(_plain(text)) for text in texts) + MESSAGE_OVERHEAD_TOKENS * len(self.messages)


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False


def _words(errors: list[ErrorDetails]) -> str:
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"The request body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    if first["type"] == "too_short":
        return "messages: at least one message is required"
    # A text that fits neither branch of the union is reported for each: the list's fault is the telling one.
    told = next((error for error in reversed(errors) if error["loc"][:3] == first["loc"][:3]), first)
    place = ".".join(str(part) for part in told["loc"] if part not in UNION_BRANCHES)
    return f"{place}: {told['msg']}" if place else told["msg"]
