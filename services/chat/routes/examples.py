"""What each route answers, as /openapi.json shows it: an example of every body. FastAPI drops nulls in them."""

from typing import Any

from services.chat.identity import key_required
from services.chat.problems import MEDIA_TYPE, SCHEMA, Problem, unavailable
from shared.errors import Unavailable

Responses = dict[int | str, dict[str, Any]]
Headers = dict[str, dict[str, Any]]
JSON, CSV, EVENT_STREAM = "application/json", "text/csv", "text/event-stream"


def _answer(**examples: Any) -> dict[str, Any]:
    kinds = {"json": JSON, "csv": CSV, "event_stream": EVENT_STREAM}
    return {"content": {kinds[kind]: {"example": example} for kind, example in examples.items()}}


def _of_a_user(**examples: Any) -> dict[str, Any]:
    return {**_answer(**examples), "headers": _LIMITS}


def _problem(description: str, example: Problem, *, headers: Headers | None = None) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": SCHEMA, "example": example.document}}
    return {"description": description, "content": content, **({"headers": headers} if headers else {})}


def _header(description: str, example: str | int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 0} if isinstance(example, int) else {"type": "string"}
    return {"description": description, "schema": schema, "example": example}


_LIMITS: Headers = {
    "RateLimit-Policy": _header(
        "Each limit of the user's plan: q tokens in w seconds. Unlimited plans have none.",
        '"monthly";q=108000;w=2592000',
    ),
    "RateLimit": _header(
        "What is left of each limit: r tokens, for t seconds until it resets.", '"monthly";r=99906;t=712800'
    ),
}
_RETRY: Headers = {"Retry-After": _header("In how many seconds to ask again; missing where that cannot help.", 1)}
_NEXT_CURSOR: Headers = {
    "X-Next-Cursor": _header("Of CSV: what `cursor` of the next page is; missing on the last.", "eyJzIjo3fQ")
}
_CHALLENGE: Headers = {"WWW-Authenticate": _header("How to present the key.", "Bearer")}


_ID = "01a206ee-eb6d-7077-b0fa-05328a0dbef6"
_MONTH = {"period": "month", "periodStart": "2026-11-01T00:00:00Z", "resetsAt": "2026-12-01T00:00:00Z"}
_USAGE: dict[str, Any] = {
    "tier": "free",
    "tokensUsed": 8094,
    "tokensLimit": 108000,
    "tokensRemaining": 99906,
    "usagePercentage": 7.5,
    "tokensHeld": 0,
    **_MONTH,
    "upgradeTo": "pro",
    "costUsd": "0.00",
}
_COUNTS = {
    "inputTokens": 5282,
    "outputTokens": 2812,
    "cacheCreationInputTokens": 0,
    "cacheReadInputTokens": 0,
    "tokensUsed": 8094,
    "outcome": "completed",
    "usageSource": "provider",
}
_MODEL = "claude-haiku-4-5-20251001"

# Of every route.
PROBLEM: Responses = {
    "default": _problem(
        "A problem, and what to do about it",
        Problem(
            422, "Invalid request", "userId: is required", errors=[{"field": "userId", "message": "is required"}]
        ),
        headers=_LIMITS,
    )
}
_UNAVAILABLE: Responses = {
    503: _problem(
        "Quota, the record or the broker cannot be asked; see Retry-After",
        unavailable(Unavailable("The quota service cannot be asked right now.")),
        headers=_RETRY,
    )
}
_OPERATORS: Responses = {
    401: _problem(
        "CHATRAIL_OPERATOR_KEY is set, and was not presented; nothing was done", key_required(), headers=_CHALLENGE
    )
}

_ANSWER = {
    "model": _MODEL,
    "text": "A token is a piece of a word.",
    "generationId": _ID,
    "inputTokens": 5282,
    "outputTokens": 2812,
    "tokensUsed": 8094,
    "stopReason": "end_turn",
    "usage": _USAGE,
}
_FRAMES = (
    f'event: start\ndata: {{"generationId":"{_ID}","model":"{_MODEL}"}}\n\n'
    'event: delta\ndata: {"text":"A token is "}\n\n'
    'event: usage\ndata: {"tier":"free","tokensUsed":8094,"tokensLimit":108000,"tokensRemaining":99906,…}\n\n'
    f'event: done\ndata: {{"generationId":"{_ID}","inputTokens":5282,"outputTokens":2812,"tokensUsed":8094,'
    '"stopReason":"end_turn"}\n\n'
)
CHAT: Responses = {
    200: {
        **_of_a_user(event_stream=_FRAMES, json=_ANSWER),
        "description": "Events start, delta, usage, done, error; one JSON document if only that is accepted. "
        "`limitReached: true` in done: the plan ended the answer, not Claude.",
    },
    400: _problem(
        "Malformed JSON or an unknown model",
        Problem(400, "Unknown model", "Use one of: claude-haiku-4-5.", models=["claude-haiku-4-5"]),
        headers=_LIMITS,
    ),
    429: _problem(
        "The limit is reached; nothing was sent to Claude",
        Problem(
            429,
            "Token limit exceeded",
            "Upgrade to Pro",
            **_USAGE | {"tokensUsed": 108000, "tokensRemaining": 0, "usagePercentage": 100.0},
            tokensAvailable=0,
        ),
        headers=_RETRY | _LIMITS,
    ),
    503: _problem(
        "Quota cannot be asked, so nothing is spent; see Retry-After",
        unavailable(Unavailable("The quota service cannot be asked right now.")),
        headers=_RETRY,
    ),
}

USAGE: Responses = {200: _of_a_user(json=_USAGE), **_UNAVAILABLE}
USAGE_EVENTS: Responses = {
    200: _of_a_user(event_stream='event: usage\ndata: {"tier":"free","tokensUsed":8094,"tokensLimit":108000,…}\n\n'),
    **_UNAVAILABLE,
}

_USED_KEY: Responses = {
    409: _problem(
        "The key came with another body before",
        Problem(409, "Idempotency key used before", "This Idempotency-Key came with another body; use a new key."),
        headers=_LIMITS,
    )
}
REPORT: Responses = {200: _of_a_user(json={"success": True}), **_OPERATORS, **_USED_KEY, **_UNAVAILABLE}
ADJUSTMENT: Responses = {
    200: _of_a_user(json={"success": True, "id": _ID}),
    **_OPERATORS,
    **_USED_KEY,
    **_UNAVAILABLE,
}

_DAY = {"date": "2026-11-23", "tokensUsed": 8094, "inputTokens": 5282, "outputTokens": 2812, "generations": 1}
HISTORY: Responses = {200: _of_a_user(json={"days": [{**_DAY, "costUsd": "0.00"}]}), **_UNAVAILABLE}

_RECORD = {
    "id": _ID,
    "time": "2026-11-23T05:44:13.204518Z",
    "actionType": "chat_generation",
    "model": _MODEL,
    **_COUNTS,
    "metadata": {"conversationId": "c_1"},
}
_CSV = (
    "id,time,actionType,model,inputTokens,outputTokens,cacheCreationInputTokens,cacheReadInputTokens,tokensUsed,"
    "outcome,usageSource,metadata\r\n"
    f"{_ID},2026-11-23T05:44:13.204518Z,chat_generation,{_MODEL},5282,2812,0,0,8094,completed,provider,{{}}\r\n"
)
LOGS: Responses = {
    200: {
        **_answer(json={"records": [_RECORD], "nextCursor": "eyJzIjo3fQ"}, csv=_CSV),
        "headers": _LIMITS | _NEXT_CURSOR,
    },
    **_UNAVAILABLE,
}

_STORY = {
    "id": _ID,
    "userId": "user_1",
    "state": "settled",
    "asked": {"inputTokensMax": 5300, "outputTokens": 4096},
    "granted": {"outputTokens": 4096, "at": "2026-11-23T05:44:10.863752Z", "tier": "free", "limit": _MONTH},
    "held": {"tokens": 9396, "expiresAt": "2026-11-23T05:59:10.863752Z", "isOpen": False},
    "given": {
        "actionType": "chat_generation",
        "model": _MODEL,
        **_COUNTS,
        "onDisconnect": "stop",
        "providerRequestId": "req_011CSHoEeqs5C35K2UUqR7Fy",
        "completedAt": "2026-11-23T05:44:13.204518Z",
        "metadata": {"conversationId": "c_1"},
    },
    "settled": {
        "countsAt": "2026-11-23T05:44:10.863752Z",
        "tokensCounted": 8094,
        "topUpTokens": 0,
        "isLate": False,
        "tier": "free",
        "countedIn": [_MONTH],
    },
    "event": {
        "id": _ID,
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
EXPLAIN: Responses = {
    200: _of_a_user(json=_STORY),
    404: _problem(
        "No such generation, or another user's",
        Problem(404, "Generation not found", "Nothing is held or on record under this id for this user."),
        headers=_LIMITS,
    ),
    **_UNAVAILABLE,
}

_LIMIT = {"tokensLimit": 108000, "period": "month"}
_PLAN = {
    "tier": "free",
    **_LIMIT,
    "limits": [_LIMIT],
    "concurrentGenerationsMax": 4,
    "alertPercents": [80, 100],
    "pricePer1kTokensUsd": "0",
    "upgradeTo": "pro",
}
PLANS: Responses = {200: _answer(json={"plans": [_PLAN], "default": "free", "simulated": False})}
SUBSCRIPTION: Responses = {
    200: _of_a_user(json={"userId": "user_1", "tier": "pro", "timeZone": "Europe/Berlin"}),
    **_OPERATORS,
    **_UNAVAILABLE,
}
