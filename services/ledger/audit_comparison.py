"""The comparison: the stream batch by batch, each event handed to all that should have it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, islice
from typing import Any, TypeVar

from services.ledger import store
from services.ledger.audit_expected import (
    CHANGES,
    PLAN_CHANGES,
    SETTLEMENTS,
    SUBSCRIPTIONS,
    USAGE,
    Uses,
    settlement,
    subscribed,
)
from services.ledger.audit_holds import look_for_impossible_holds
from services.ledger.audit_quarantine import Quarantine
from services.ledger.audit_records import Arrived, TableCheck
from services.ledger.audit_sums import DAYS, TOTALS, compare_days, compare_totals
from services.ledger.scope import Scope
from services.ledger.scratch import CHANGES as CHANGED
from services.ledger.scratch import EVENTS, SUMS, Scratch
from services.ledger.snapshots import BATCH_SIZE, Copy, Layout, Row, Snapshot, as_sqlite_has_it
from shared.errors import PoisonMessage
from shared.events import Event, GenerationCompleted, SubscriptionChanged, UsageAdjusted, decode
from shared.plans import Plans
from shared.recorded import Recorded
from shared.streams import LEDGER, LEDGER_SEALED, QUOTA

Item = TypeVar("Item")


@dataclass(slots=True)
class Tally:
    messages: int = 0
    unreadable: int = 0
    repeated: int = 0
    compared: dict[str, int] = field(default_factory=dict)


class Comparison:
    """Takes the stream batch by batch; what must wait for its end is kept on disk."""

    def __init__(
        self,
        ledger: Snapshot,
        quota: Snapshot,
        plans: Plans,
        floors: Mapping[str, int],
        *,
        scope: Scope,
        scratch: Scratch,
    ) -> None:
        self._scope, self._scratch, self._ledger, self._quota, self._plans = scope, scratch, ledger, quota, plans
        self.tally = Tally()
        quarantines = {
            LEDGER: Quarantine(LEDGER, ledger, floors[LEDGER]),
            QUOTA: Quarantine(QUOTA, quota, floors[QUOTA]),
        }

        def check(layout: Layout) -> TableCheck:
            service = layout.service
            copy = Copy(ledger if service == LEDGER else quota, layout)
            return TableCheck(copy, floors[service], quarantines[service], scope, scratch)

        self._usage, self._settlements = check(USAGE), check(SETTLEMENTS)
        self._changes, self._plan_changes = check(CHANGES), check(PLAN_CHANGES)
        self._subscriptions = check(SUBSCRIPTIONS)
        self._quarantines = list(quarantines.values())

    def take(self, batch: Sequence[Recorded]) -> None:
        uses: list[tuple[Recorded, Uses]] = []
        changes: list[tuple[Recorded, SubscriptionChanged]] = []
        unreadable, others = [], []
        for message in batch:
            if message.subject == LEDGER_SEALED:
                continue  # the tamper evidence is about these
            try:
                event = decode(message.body)
            except PoisonMessage:
                unreadable.append(message)
                continue
            if self._scope.user_id is not None and event.subject != self._scope.user_id:
                others.append((event.id, event.subject))
                continue
            if isinstance(event, SubscriptionChanged):
                changes.append((message, event))
            elif isinstance(event, GenerationCompleted | UsageAdjusted):
                uses.append((message, event))
        self.tally.messages += len(batch)
        for quarantine in self._quarantines:
            quarantine.explained_by(batch)
        self._scratch.keep_others(others)
        self._look_for_in_quarantine(unreadable)
        self._take_uses(uses)
        self._take_changes(changes)

    def _take_uses(self, uses: list[tuple[Recorded, Uses]]) -> None:
        rows = store.usage_rows([event for _, event in uses])
        recorded_as = [Arrived(message, event, row) for (message, event), row in zip(uses, rows, strict=True)]
        settled_as = [Arrived(message, event, settlement(event)) for message, event in uses]
        is_first = self._scratch.firsts(EVENTS, [event.id for _, event in uses])
        kept = self._usage.take(_only(recorded_as, is_first))
        counted = self._settlements.take(_only(settled_as, is_first))
        self._scratch.keep_events(
            [
                (*_folded(event, record), event.id in counted, event.id in kept)
                for _, event, record in _only(settled_as, is_first)
            ]
        )
        self._look_at_seconds(is_first, (self._usage, recorded_as), (self._settlements, settled_as))

    def _take_changes(self, changes: list[tuple[Recorded, SubscriptionChanged]]) -> None:
        recorded_as = [Arrived(message, event, store.change_row(event)) for message, event in changes]
        kept_as = [
            Arrived(message, event, {"event_id": event.id} | event.data.model_dump(exclude={"actor"}))
            for message, event in changes
        ]
        is_first = self._scratch.firsts(CHANGED, [event.id for _, event in changes])
        self._changes.take(_only(recorded_as, is_first))
        counted = self._plan_changes.take(_only(kept_as, is_first))
        self._scratch.keep_changes(
            [
                (event.id, event.subject, as_sqlite_has_it(event.data.changed_at), *data, event.id in counted)
                for _, event in _only(changes, is_first)
                if (data := (event.data.tier, event.data.time_zone))
            ]
        )
        self._look_at_seconds(is_first, (self._changes, recorded_as), (self._plan_changes, kept_as))

    def _look_at_seconds(self, is_first: list[bool], *tables: tuple[TableCheck, list[Arrived]]) -> None:
        """Events whose id was there before: with the same content they are the same event."""
        if all(is_first):
            return
        is_second = [not first for first in is_first]
        self.tally.repeated += sum(is_second)
        told = set()
        for check, arrived in tables:
            for difference in check.contradicting(_only(arrived, is_second)):
                if difference.id not in told:
                    told.add(difference.id)
                    self._scratch.add(difference)
        self.tally.repeated -= len(told)

    def _look_for_in_quarantine(self, unreadable: list[Recorded]) -> None:
        self.tally.unreadable += len(unreadable)
        for quarantine in self._quarantines:
            for difference in quarantine.lacking(unreadable):
                self._scratch.add(difference)

    def end(self) -> None:
        for check in (self._usage, self._changes, self._settlements, self._plan_changes):
            known = EVENTS if check in (self._usage, self._settlements) else CHANGED
            check.look_for_unexplained(partial(self._scratch.known, known))
            self.tally.compared[check.copy.layout.name] = check.matched
        for quarantine in self._quarantines:
            for difference in quarantine.not_as_sent():
                self._scratch.add(difference)
        self.tally.compared[DAYS] = compare_days(self._ledger, self._scope, self._scratch)
        self._compare_subscriptions()
        self.tally.compared[TOTALS] = compare_totals(self._quota, self._plans, self._scope, self._scratch)
        look_for_impossible_holds(self._quota, self._scope, self._scratch)

    def _compare_subscriptions(self) -> None:
        check = self._subscriptions
        for users in _in_batches(subscribed(self._scratch.changes()), BATCH_SIZE):
            check.take_all(users)
        check.look_for_unexplained(self._scratch.subscribed)
        self.tally.compared[check.copy.layout.name] = check.matched


def _only(items: Sequence[Item], wanted: Sequence[bool]) -> list[Item]:
    return list(compress(items, wanted))


def _in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _folded(event: Event, record: Mapping[str, Any]) -> Row:
    sums = [record[name] for name in SUMS]
    moment, is_generation = as_sqlite_has_it(record["started_at"]), isinstance(event, GenerationCompleted)
    return (record["event_id"], record["user_id"], moment, *sums, is_generation, record["model"])
