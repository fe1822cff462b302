"""What quota does when it is asked, and when something happened."""

import asyncio
from collections.abc import Iterable, Sequence
from datetime import datetime

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError

from services.quota import store
from services.quota.alerts import Alerts
from services.quota.domain import Account, Refusal
from services.quota.standing import Grant
from services.quota.store import Taken
from shared import calls, streams
from shared.answering import Call
from shared.calls import (
    Authorization,
    Authorize,
    CountedStory,
    ExplainQuery,
    Granted,
    Refused,
    UsageAnswer,
    UsageQuery,
)
from shared.database import Database
from shared.errors import BadCall
from shared.events import Event
from shared.plans import Plans
from shared.quarantine import Poison

log = structlog.get_logger()


# A bar on a screen need not move more often than this, however many generations one user runs.
PUSH_AFTER_S = 0.02


class Handlers:
    """Calls and events, each mapped to one method below."""

    def __init__(self, nc: Client, database: Database, plans: Plans) -> None:
        self._nc, self._database, self._plans = nc, database, plans
        self._alerts = Alerts(nc, database)
        self._changed: set[str] = set()
        self._pushing: asyncio.Task[None] | None = None
        self.calls = (
            Call(calls.AUTHORIZE, Authorize, self.authorize),
            Call(calls.USAGE, UsageQuery, self.usage),
            Call(calls.EXPLAIN_COUNTED, ExplainQuery, self.explain, group_max=1),
        )

    async def authorize(self, requests: Sequence[Authorize]) -> list[Authorization | Exception]:
        """Hold room for generations, or say why there is none. Those that arrive together share a transaction."""
        answers, standing, at = await self._database.write(store.authorize, self._plans, requests)
        self._push_soon(standing)
        return [
            _authorization(answer, standing[request.user_id], at)
            for request, answer in zip(requests, answers, strict=True)
        ]

    async def usage(self, queries: Sequence[UsageQuery]) -> list[UsageAnswer]:
        """What users have used and what is left, with the pending usage that the callers know of."""
        users, at = await self._database.read(store.look_up, self._plans, queries)
        return [UsageAnswer(usage=user.usage, limits=user.limits(at)) for user in users]

    async def explain(self, queries: Sequence[ExplainQuery]) -> list[CountedStory]:
        """What is held for one generation, or how its event counts."""
        return [await self._database.read(store.explain, self._plans, query) for query in queries]

    async def on_usage(self, events: list[Event], poison: list[Poison]) -> list[Event]:
        """Settle what happened: each event counted once, its hold released, in one transaction.

        Returns what contradicts.
        """
        settled = await self._database.write(store.settle, self._plans, events, poison)
        self._push_soon(settled.user_ids)
        if settled.alerts:
            self._alerts.publish_soon()
        log.info("usage_settled", received=len(events), settled=settled.events, users=len(settled.user_ids))
        return settled.contradicting

    def _push_soon(self, user_ids: Iterable[str]) -> None:
        self._changed.update(user_ids)
        if self._pushing is None and self._changed:
            self._pushing = asyncio.create_task(self._push())

    async def _push(self) -> None:
        """Tell whoever watches these users to ask. Not durable: a watcher that missed one asks again by itself."""
        await asyncio.sleep(PUSH_AFTER_S)
        changed, self._changed, self._pushing = self._changed, set(), None
        try:
            for user_id in changed:
                await self._nc.publish(streams.quota_updated(user_id))
        except NatsError as error:
            log.warning("changes_not_pushed", users=len(changed), error=repr(error))

    async def publish_alerts(self) -> None:
        """Those that a process took along when it died."""
        await self._alerts.publish()

    async def report_expired_holds(self) -> None:
        """Say once, in the log, that a generation was authorized and never settled."""
        for generation_id, user_id, tokens in await self._database.write(store.expired_holds):
            log.warning("hold_expired", generation_id=generation_id, user_id=user_id, tokens=tokens)


def _authorization(answer: Grant | Taken | Refusal, account: Account, at: datetime) -> Authorization | Exception:
    if isinstance(answer, Taken):
        return BadCall("generation_id is of a generation that is over, or another user's: make a new one")
    limits = account.limits(at)
    if isinstance(answer, Grant):
        return Granted(
            output_tokens_max=answer.output_tokens,
            started_at=answer.started_at,
            hold_tokens=answer.tokens,
            expires_at=answer.expires_at,
            tier=answer.tier,
            period=answer.period,
            period_start=answer.resets_at and answer.period_start,
            resets_at=answer.resets_at,
            limits=limits,
        )
    return Refused(
        reason=answer.reason,
        tokens_available=account.tokens_available,
        retry_after_s=answer.retry_after_s,
        exceeds_plan=answer.exceeds_plan,
        usage=account.usage,
        limits=limits,
    )
