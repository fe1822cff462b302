"""Plans, and who has which."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from pydantic import AfterValidator, ConfigDict, Field
from starlette.convertors import Convertor, register_url_convertor

from services.chat.deadline import Deadline
from services.chat.identity import Operator
from services.chat.problems import Problem
from services.chat.quota import Quota
from services.chat.reading import Body, OneReading
from services.chat.routes import examples
from services.chat.settings import Settings
from services.chat.subscriptions import Subscriptions
from shared.calls import View
from shared.events import Name, UserId
from shared.plans import PeriodKind, Plans, known_zone

router = APIRouter(tags=["plans"], route_class=OneReading)


class LimitView(View):
    tokens_limit: int
    period: PeriodKind


class PlanView(View):
    """`tokensLimit` and `period` are of the first of `limits`; an unlimited plan has none."""

    tier: str
    tokens_limit: int | None
    period: PeriodKind
    limits: list[LimitView]
    concurrent_generations_max: int | None
    alert_percents: list[int]
    price_per_1k_tokens_usd: Annotated[str | None, Field(alias="pricePer1kTokensUsd")]
    upgrade_to: str | None


class PlansView(View):
    plans: list[PlanView]
    default: str
    simulated: bool


@router.get("/api/plans", responses=examples.PLANS)
async def plans(request: Request) -> PlansView:
    """The plans that there are. `simulated` says that answers come from the local stand-in, not from Claude."""
    known: Plans = request.app.state.plans
    settings: Settings = request.app.state.settings
    return PlansView(
        plans=[
            PlanView(
                tier=plan.tier,
                tokens_limit=plan.limits[0].limit_tokens,
                period=plan.limits[0].period,
                limits=[
                    LimitView(tokens_limit=limit.limit_tokens, period=limit.period)
                    for limit in plan.limits
                    if limit.limit_tokens is not None
                ],
                concurrent_generations_max=plan.concurrent_generations_max,
                alert_percents=list(plan.alert_percents),
                price_per_1k_tokens_usd=None if plan.price_per_1k_usd is None else str(plan.price_per_1k_usd),
                upgrade_to=plan.upgrade_to,
            )
            for plan in known.plans.values()
        ],
        default=known.default,
        simulated=settings.is_simulated,
    )


class SubscriptionChange(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"tier": "pro"}]})

    tier: Name
    time_zone: Annotated[Name, AfterValidator(known_zone)] | None = None


class Subscribed(View):
    user_id: str
    tier: str
    time_zone: str | None


class _AnyText(Convertor[str]):
    """Like `path`, which ends at a line feed: whoever sends one is to hear what is wrong with it."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _AnyText())


@router.put("/api/subscriptions/{userId:text}", responses=examples.SUBSCRIPTION)
async def subscribe(
    request: Request,
    response: Response,
    user_id: Annotated[UserId, Path(alias="userId")],
    body: SubscriptionChange,
    _operator: Operator,
) -> Subscribed:
    """The operator's: from the next check on, the user has this plan."""
    known: Plans = request.app.state.plans
    quota: Quota = request.app.state.quota
    subscriptions: Subscriptions = request.app.state.subscriptions
    deadline = Deadline()
    async with quota.telling_limits(user_id, deadline):
        if body.tier not in known.plans:
            raise Problem(422, "Unknown plan", f"tier must be one of: {', '.join(known.plans)}.")
        await subscriptions.change(user_id, deadline, tier=body.tier, time_zone=body.time_zone, actor="operator")
    response.headers.update(await quota.rate_limit(user_id, deadline))
    return Subscribed(user_id=user_id, tier=body.tier, time_zone=body.time_zone)
