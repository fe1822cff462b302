"""GET /api/usage/explain: the story of one generation, report or adjustment."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from services.chat.deadline import Deadline
from services.chat.problems import Problem
from services.chat.quota import Quota
from services.chat.reading import OneReading
from services.chat.routes import examples
from shared import calls
from shared.broker import call
from shared.calls import CountedStory, ExplainQuery, RecordedStory
from shared.events import Name, UserId
from shared.story import Story, story

router = APIRouter(tags=["usage"], route_class=OneReading)

GenerationId = Annotated[
    Name,
    Query(
        alias="generationId",
        description="of `start` and `done`, or the `id` of any record",
        examples=["01a206ee-eb6d-7077-b0fa-05328a0dbef6"],
    ),
]
User = Annotated[
    UserId | None, Query(alias="userId", description="whose it must be; another's is unknown", examples=["user_1"])
]


@router.get("/api/usage/explain", response_model=Story, responses=examples.EXPLAIN)
async def explain(request: Request, generation_id: GenerationId, user_id: User = None) -> Response:
    """What was asked, granted, held, given and settled, when, by which plan and period, and in which event."""
    quota: Quota = request.app.state.quota
    query, deadline = ExplainQuery(event_id=generation_id, user_id=user_id), Deadline()
    recorded, counted = await asyncio.gather(
        call(request.app.state.nc, calls.EXPLAIN_RECORDED, query, timeout_s=deadline.left_s),
        call(request.app.state.nc, calls.EXPLAIN_COUNTED, query, timeout_s=deadline.left_s),
    )
    told = story(
        generation_id, RecordedStory.model_validate_json(recorded), CountedStory.model_validate_json(counted)
    )
    if told is None:
        limits = await quota.rate_limit(user_id, deadline) if user_id else {}
        raise Problem(
            404, "Generation not found", _UNKNOWN.format(" for this user" if user_id else ""), headers=limits
        )
    headers = {"Cache-Control": "no-store", **await quota.rate_limit(told.user_id, deadline)}
    return Response(told.model_dump_json(), headers=headers, media_type=examples.JSON)


_UNKNOWN = (
    "Nothing is held or on record under this id{}. A generation that was refused leaves nothing: the 429 "
    "itself said why, what was left and when it resets. What has ended this very moment is on record in a second."
)
