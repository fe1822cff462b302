"""POST /api/chat: a metered answer from Claude, streamed."""

import re
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, field_validator

from services.chat.claude import Prompt
from services.chat.deadline import Deadline
from services.chat.generations import Generations
from services.chat.ratelimit import headers
from services.chat.reading import Body, OneReading
from services.chat.routes import examples
from services.chat.settings import Settings
from services.chat.sse import EventStream, watched
from shared.calls import Usage, View
from shared.events import Name, UserId, new_id

router = APIRouter(tags=["chat"], route_class=OneReading)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Words = Annotated[
    str,
    StringConstraints(max_length=1_000_000),
    AfterValidator(_not_blank),
    Field(json_schema_extra={"minLength": 1, "pattern": r"\S"}),
]


class Message(Body):
    role: Literal["user", "assistant"]
    content: Words


class ChatRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"userId": "user_1", "messages": [{"role": "user", "content": "What is a token?"}]}]
        }
    )

    user_id: UserId
    messages: list[Message] = Field(min_length=1, max_length=1000)
    model: Name | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=128_000, strict=True)
    system: Words | None = None
    conversation_id: Name | None = None

    @field_validator("messages")
    @classmethod
    def _the_user_speaks_first(cls, messages: list[Message]) -> list[Message]:
        if messages[0].role != "user":
            raise ValueError("the first message must have the role user")
        return messages


class Answer(View):
    """The whole answer as one document: what `start`, all `delta`, `usage` and `done` say."""

    model: str
    text: str
    generation_id: str
    input_tokens: int
    output_tokens: int
    tokens_used: int
    stop_reason: str | None
    limit_reached: bool = Field(default=False, description="the plan ended the answer, not Claude")
    usage: Usage | None = Field(description="null where quota does not answer")


@router.post("/api/chat", response_model=Answer, responses=examples.CHAT)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Ask Claude on behalf of a user. Tokens are held before, counted after, whatever happens in between."""
    generations: Generations = request.app.state.generations
    settings: Settings = request.app.state.settings
    async with generations.parts.quota.telling_limits(body.user_id, Deadline()):
        prompt = Prompt(
            model=await generations.parts.claude.resolve(body.model or settings.model),
            messages=[{"role": message.role, "content": message.content} for message in body.messages],
            system=body.system,
            output_tokens_max=body.max_tokens or settings.tokens_max,
        )
        generation = await generations.start(
            prompt,
            generation_id=new_id(),
            user_id=body.user_id,
            metadata={"conversationId": body.conversation_id} if body.conversation_id else {},
            has_left=request.is_disconnected,
        )
    if not _accepts_only_json(request.headers.get("accept", "")):
        return EventStream(generation.frames(), on_disconnect=generation.leave, headers=headers(generation.limits))
    with watched(request.receive, generation.leave):
        answer = msgspec.json.encode(await generation.answer())
    return Response(answer, headers=headers(generation.limits), media_type=examples.JSON)


def _accepts_only_json(accept: str) -> bool:
    taken = accepted(accept)
    return examples.JSON in taken and not taken & {examples.EVENT_STREAM, "text/*", "*/*"}


def accepted(header: str) -> set[str]:
    """The media types that a caller takes (RFC 9110, section 12.5.1); how much it prefers each does not matter."""
    taken = set()
    for part in header.lower().split(","):
        name, *parameters = ("".join(each.split()) for each in part.split(";"))
        if not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters):
            taken.add(name)
    return taken
