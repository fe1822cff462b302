"""/api/usage: what is used and left, reported, pushed, day by day, record by record."""

import asyncio
import csv
import io
import json
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, JsonValue, field_validator
from pydantic.alias_generators import to_camel

from services.chat.deadline import Deadline
from services.chat.idempotency import IdempotencyKey
from services.chat.identity import Operator
from services.chat.problems import Problem
from services.chat.push import Watchers
from services.chat.quota import Quota
from services.chat.ratelimit import headers
from services.chat.reading import Body, OneReading
from services.chat.reports import Reports
from services.chat.routes import examples
from services.chat.routes.chat import accepted
from shared import calls
from shared.broker import call
from shared.calls import History, HistoryQuery, Logs, LogsQuery, Usage
from shared.events import Generation, GenerationCompleted, Name, Tokens, UserId, new_id, small, utc_now
from shared.plans import COUNTS
from shared.spreadsheet import cell

router = APIRouter(tags=["usage"], route_class=OneReading)

User = Annotated[UserId, Query(alias="userId", examples=["user_1"])]
HISTORY_DAYS_MAX = 400
# Before the first 30 days of the calendar there is no default for `from`.
FIRST_DAY = date(1970, 1, 1)

_CSV_COLUMNS = (
    "id",
    "time",
    "actionType",
    "model",
    "inputTokens",
    "outputTokens",
    "cacheCreationInputTokens",
    "cacheReadInputTokens",
    "tokensUsed",
    "outcome",
    "usageSource",
    "metadata",
)


@router.get("/api/usage", response_model=Usage, responses=examples.USAGE)
async def usage(request: Request, user_id: User) -> Response:
    """What the user has used in the current period and what is left. A user never seen before has zeros."""
    quota: Quota = request.app.state.quota
    shown = await quota.usage(user_id, Deadline())
    return _json(shown.body, headers(shown.limits))


class ReportMetadata(Body):
    """The split of `tokensUsed`, if it is known, and whatever small facts the reporter wants to keep."""

    model_config = ConfigDict(extra="allow")

    model: Name | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None
    cache_read_input_tokens: Tokens | None = None

    @property
    def facts(self) -> dict[str, JsonValue]:
        return self.model_extra or {}

    @property
    def counts(self) -> dict[str, JsonValue]:
        """Those that are told."""
        told = {to_camel(name): getattr(self, name) for name in COUNTS if name != "tokens_used"}
        return {name: count for name, count in told.items() if count is not None}


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _in_order(value[name]) for name in sorted(value)}
    return [*map(_in_order, value)] if isinstance(value, list) else value


class Report(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "userId": "user_1",
                    "actionType": "chat_generation",
                    "tokensUsed": 8094,
                    "metadata": {"inputTokens": 5282, "outputTokens": 2812, "model": "claude-haiku-4-5"},
                }
            ]
        }
    )

    user_id: UserId
    action_type: Name
    tokens_used: Tokens
    metadata: ReportMetadata = ReportMetadata()

    @field_validator("metadata")
    @classmethod
    def _facts_stay_small(cls, metadata: ReportMetadata) -> ReportMetadata:
        small(metadata.facts | metadata.counts)
        # An object's members have no order: however they come, it is the same report.
        facts = metadata.facts
        in_order = _in_order(facts)
        facts.clear()
        facts.update(in_order)
        return metadata


class Reported(Body):
    success: bool = True


@router.post("/api/usage", responses=examples.REPORT)
async def report(
    request: Request,
    response: Response,
    body: Report,
    _operator: Operator,
    idempotency_key: IdempotencyKey = None,
) -> Reported:
    """Usage that did not pass through /api/chat. Answers once it is durable; a repeated key counts once."""
    event, deadline = _event(body), Deadline()
    reports: Reports = request.app.state.reports
    quota: Quota = request.app.state.quota
    if idempotency_key is None:
        await reports.record(event, deadline)
    else:
        async with quota.telling_limits(body.user_id, deadline):
            await reports.record_once(event, deadline, key=idempotency_key, body=body.model_dump_json().encode())
    response.headers.update(await quota.rate_limit(body.user_id, deadline))
    return Reported()


def _event(body: Report) -> GenerationCompleted:
    """Raises RequestValidationError where `metadata` contradicts `tokensUsed`."""
    said = body.metadata
    if said.facts.get("tokensUsed", body.tokens_used) != body.tokens_used:
        raise _contradiction(f"it names other tokensUsed than {body.tokens_used}")
    counts = [said.input_tokens, said.output_tokens, said.cache_creation_input_tokens, said.cache_read_input_tokens]
    known = sum(count or 0 for count in counts)
    # Both sides of it, or parts that are all of it.
    is_split = (said.input_tokens is not None and said.output_tokens is not None) or known == body.tokens_used > 0
    if known > body.tokens_used or (is_split and known != body.tokens_used):
        raise _contradiction(f"the counts add up to {known}, and tokensUsed is {body.tokens_used}")
    split = [count or 0 for count in counts] if is_split else [None] * 4
    moment, event_id = utc_now(), new_id()
    generation = Generation(
        generation_id=event_id,
        user_id=body.user_id,
        action_type=body.action_type,
        model=said.model,
        input_tokens=split[0],
        output_tokens=split[1],
        cache_creation_input_tokens=split[2],
        cache_read_input_tokens=split[3],
        tokens_used=body.tokens_used,
        outcome="completed",
        usage_source="reported",
        started_at=moment,
        completed_at=moment,
        # Of a split that is not whole the parts stay facts.
        metadata=said.facts if is_split else said.facts | said.counts,
    )
    return GenerationCompleted(id=event_id, subject=body.user_id, data=generation)


def _contradiction(message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ("body", "metadata"), "msg": message}])


@router.get("/api/usage/history", response_model=History, responses=examples.HISTORY)
async def history(
    request: Request,
    user_id: User,
    from_date: Annotated[
        date | None, Query(alias="from", ge=FIRST_DAY, description="first day, UTC; 30 days before `to`")
    ] = None,
    to_date: Annotated[date | None, Query(alias="to", ge=FIRST_DAY, description="last day, UTC; today")] = None,
) -> Response:
    """A row for each day with usage, newest first."""
    last = to_date or utc_now().date()
    first = from_date or last - timedelta(days=30)
    if not timedelta(0) <= last - first <= timedelta(days=HISTORY_DAYS_MAX):
        raise Problem(
            422, "Invalid request", f"from must not be after to, nor more than {HISTORY_DAYS_MAX} days before."
        )
    query, deadline = HistoryQuery(user_id=user_id, from_date=first, to_date=last), Deadline()
    quota: Quota = request.app.state.quota
    body, rate_limit = await asyncio.gather(
        call(request.app.state.nc, calls.HISTORY, query, timeout_s=deadline.left_s),
        quota.rate_limit(user_id, deadline),
    )
    return _json(body, rate_limit)


@router.get("/api/usage/logs", response_model=Logs, responses=examples.LOGS)
async def logs(
    request: Request,
    user_id: User,
    cursor: Annotated[str | None, Query(max_length=512, description="nextCursor of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """Records, newest first; as CSV for callers that accept text/csv, with the next cursor in a header."""
    query, deadline = LogsQuery(user_id=user_id, cursor=cursor, limit=limit), Deadline()
    quota: Quota = request.app.state.quota
    body, rate_limit = await asyncio.gather(
        call(request.app.state.nc, calls.LOGS, query, timeout_s=deadline.left_s), quota.rate_limit(user_id, deadline)
    )
    if examples.CSV not in accepted(request.headers.get("accept", "")):
        return _json(body, rate_limit)
    page = json.loads(body)
    following = {"X-Next-Cursor": page["nextCursor"]} if page["nextCursor"] else {}
    told = {"Cache-Control": "no-store", **rate_limit, **following}
    return Response(_csv(page["records"]), headers=told, media_type=examples.CSV)


@router.get("/api/usage/events", response_class=Response, responses=examples.USAGE_EVENTS)
async def events(request: Request, user_id: User) -> Response:
    """The body of GET /api/usage as an event `usage`: at once, and whenever it changes."""
    watchers: Watchers = request.app.state.watchers
    quota: Quota = request.app.state.quota
    deadline = Deadline()
    return watchers.watch(user_id, deadline, headers=await quota.rate_limit(user_id, deadline))


def _json(body: bytes, rate_limit: Mapping[str, str]) -> Response:
    return Response(body, headers={"Cache-Control": "no-store", **rate_limit}, media_type=examples.JSON)


def _csv(records: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_CSV_COLUMNS)
    for record in records:
        writer.writerow([_cell(record[column]) for column in _CSV_COLUMNS])
    return out.getvalue()


def _cell(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return cell(value) if isinstance(value, str) else value
