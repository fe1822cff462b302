"""What the ledger does when something happened, and when it is asked."""

from collections import Counter as Tally
from collections.abc import Sequence

import structlog
from prometheus_client import Counter

from services.ledger import store
from shared import calls
from shared.answering import Call
from shared.calls import ExplainQuery, History, HistoryQuery, Logs, LogsQuery, RecordedStory
from shared.database import READERS, Database
from shared.events import Event, GenerationCompleted
from shared.plans import Plans
from shared.quarantine import Poison

log = structlog.get_logger()

BATCHES = Counter("chatrail_ledger_batches", "Batches of events that were committed")
EVENTS = Counter("chatrail_ledger_events", "Events that were new and are recorded", ["type", "outcome"])
TOKENS = Counter("chatrail_ledger_tokens", "Tokens of the generations that were new and are recorded")


class Handlers:
    """Events and calls, each mapped to one method below."""

    def __init__(self, database: Database, plans: Plans) -> None:
        self._database, self._plans = database, plans
        self.calls = (
            Call(calls.HISTORY, HistoryQuery, self.history, group_max=1, groups_max=READERS),
            Call(calls.LOGS, LogsQuery, self.logs, group_max=1, groups_max=READERS),
            Call(calls.EXPLAIN_RECORDED, ExplainQuery, self.explain, group_max=1, groups_max=READERS),
        )

    async def on_usage(self, events: list[Event], poison: list[Poison]) -> list[Event]:
        """Record what happened: each event once, all of a batch in one transaction. Returns what contradicts."""
        recorded = await self._database.write(store.record, events, poison)
        _count(recorded.new)
        log.info("usage_recorded", received=len(events), recorded=len(recorded.new), quarantined=len(poison))
        return recorded.contradicting

    async def history(self, queries: Sequence[HistoryQuery]) -> list[History]:
        """A user's days with usage, newest first."""
        return [await self._database.read(store.history, self._plans, query) for query in queries]

    async def logs(self, queries: Sequence[LogsQuery]) -> list[Logs]:
        """A page of a user's records, newest first."""
        return [await self._database.read(store.logs, query) for query in queries]

    async def explain(self, queries: Sequence[ExplainQuery]) -> list[RecordedStory]:
        """What is on record of one event, and where."""
        return [await self._database.read(store.explain, query) for query in queries]


def _count(recorded: list[Event]) -> None:
    BATCHES.inc()
    TOKENS.inc(sum(event.data.tokens_used for event in recorded if isinstance(event, GenerationCompleted)))
    outcomes = [
        (event.type, event.data.outcome if isinstance(event, GenerationCompleted) else "") for event in recorded
    ]
    # Looked up once for each kind of event, not for each event.
    for labels, number in Tally(outcomes).items():
        EVENTS.labels(*labels).inc(number)
