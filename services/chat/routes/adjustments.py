"""POST /api/usage/adjustments: what an operator credits, refunds, charges or adds."""

import re
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from services.chat.adjustments import Adjustments
from services.chat.deadline import Deadline
from services.chat.idempotency import IdempotencyKey
from services.chat.identity import Operator
from services.chat.quota import Quota
from services.chat.reading import Body, OneReading
from services.chat.routes import examples
from shared.events import Adjustment, Moment, Name, SignedTokens, Tokens, UsageAdjusted, UserId, utc_now

router = APIRouter(tags=["usage"], route_class=OneReading)


def _not_zero(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("must not be 0: negative is a credit, positive a charge")
    return tokens


def _as_text(moment: object) -> object:
    # Digits alone would be taken for seconds since 1970.
    if moment is None or (isinstance(moment, str) and re.match(r"\d{4}-\d\d-\d\d", moment)):
        return moment
    raise ValueError("must be a time such as 2026-11-30T18:00:00Z")


class AdjustmentRequest(Body):
    """A credit (negative `tokensUsed`), a charge (positive), or a top-up (`topUpTokens`). `effectiveAt` is now."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["tokensUsed"]}, {"required": ["topUpTokens"]}],
            "examples": [
                {"userId": "user_1", "tokensUsed": -8094, "reason": "counted twice", "actor": "support"},
                {
                    "userId": "user_1",
                    "topUpTokens": 50000,
                    "outlivesPeriod": True,
                    "reason": "invoice 7",
                    "actor": "billing",
                },
            ],
        }
    )

    user_id: UserId
    reason: Name
    actor: Name
    tokens_used: Annotated[SignedTokens, AfterValidator(_not_zero)] | None = None
    top_up_tokens: Annotated[Tokens, Field(ge=1)] | None = None
    outlives_period: Annotated[bool, Field(strict=True)] = False
    effective_at: Annotated[Moment | None, BeforeValidator(_as_text)] = None

    @model_validator(mode="after")
    def _one_amount(self) -> "AdjustmentRequest":
        if (self.tokens_used is None) == (self.top_up_tokens is None):
            raise ValueError("send either tokensUsed or topUpTokens")
        if self.outlives_period and self.top_up_tokens is None:
            raise ValueError("outlivesPeriod goes with topUpTokens only")
        return self


class Adjusted(Body):
    success: bool = True
    id: str


@router.post("/api/usage/adjustments", responses=examples.ADJUSTMENT)
async def adjust(
    request: Request,
    response: Response,
    body: AdjustmentRequest,
    _operator: Operator,
    idempotency_key: IdempotencyKey = None,
) -> Adjusted:
    """The operator's: counts in the period of `effectiveAt`. A repeated key counts once and has the first's `id`."""
    adjustments: Adjustments = request.app.state.adjustments
    quota: Quota = request.app.state.quota
    deadline = Deadline()
    async with quota.telling_limits(body.user_id, deadline):
        event_id = await adjustments.record(
            _event(body), deadline, key=idempotency_key, body=body.model_dump_json().encode()
        )
    response.headers.update(await quota.rate_limit(body.user_id, deadline))
    return Adjusted(id=event_id)


def _event(body: AdjustmentRequest) -> UsageAdjusted:
    adjustment = Adjustment(
        user_id=body.user_id,
        tokens_used=body.tokens_used or 0,
        top_up_tokens=body.top_up_tokens or 0,
        outlives_period=body.outlives_period,
        reason=body.reason,
        actor=body.actor,
        effective_at=body.effective_at or utc_now(),
    )
    return UsageAdjusted(subject=body.user_id, data=adjustment)
