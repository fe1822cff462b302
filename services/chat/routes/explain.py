"""GET /api/usage/explain: the story of one generation, report or adjustment."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from services.chat.deadline import Deadline
from services.chat.problems import MEDIA_TYPE, Problem
from services.chat.quota import Quota
from services.chat.reading import OneReading
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
_EXAMPLE = {
    "id": "01a206ee-eb6d-7077-b0fa-05328a0dbef6",
    "userId": "user_1",
    "state": "settled",
    "asked": {"inputTokensMax": 113, "outputTokens": 4096},
    "granted": {
        "outputTokens": 500,
        "at": "2026-11-23T05:44:10.863752Z",
        "tier": "free",
        "limit": {"period": "month", "periodStart": "2026-11-01T00:00:00Z", "resetsAt": "2026-12-01T00:00:00Z"},
    },
    "held": {"tokens": 613, "expiresAt": "2026-11-23T05:59:10.863752Z", "isOpen": False},
    "given": {
        "actionType": "chat_generation",
        "model": "claude-haiku-4-5-20251001",
        "inputTokens": 100,
        "outputTokens": 20,
        "cacheCreationInputTokens": 0,
        "cacheReadInputTokens": 0,
        "tokensUsed": 120,
        "outcome": "completed",
        "usageSource": "provider",
        "onDisconnect": "stop",
        "providerRequestId": "req_011CSHoEeqs5C35K2UUqR7Fy",
        "completedAt": "2026-11-23T05:44:13.204518Z",
        "metadata": {},
    },
    "settled": {
        "countsAt": "2026-11-23T05:44:10.863752Z",
        "tokensCounted": 120,
        "topUpTokens": 0,
        "isLate": False,
        "tier": "free",
        "countedIn": [{"period": "month", "periodStart": "2026-11-01T00:00:00Z", "resetsAt": "2026-12-01T00:00:00Z"}],
    },
    "event": {
        "id": "01a206ee-eb6d-7077-b0fa-05328a0dbef6",
        "type": "generation.completed",
        "streamSequence": 7,
        "leafHash": "5a5c33b3f4a9c0a1a6ad3ff1f1a6fd1ed0f2a7a6a7f7f9e9bd5d1c2a7a3f0c11",
        "sealedBy": {
            "treeSize": 9,
            "rootHash": "0f6b2a7c5e1d4f3a9b8c7d6e5f4a3b2c1d0e9f8a7b6c5d4e3f2a1b0c9d8e7f6a",
            "sealedAt": "2026-11-23T05:45:00Z",
            "keyId": "033df7ae",
        },
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"example": _EXAMPLE}}},
    404: {"description": "No such generation, or another user's", "content": {MEDIA_TYPE: {}}},
}


@router.get("/api/usage/explain", response_model=Story, responses=_RESPONSES)
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
    return Response(told.model_dump_json(), headers=headers, media_type="application/json")


_UNKNOWN = (
    "Nothing is held or on record under this id{}. A generation that was refused leaves nothing: the 429 "
    "itself said why, what was left and when it resets. What has ended this very moment is on record in a second."
)
