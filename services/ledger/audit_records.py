"""Records one by one: a table held against what the stream says that it should be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from services.ledger.audit_quarantine import Quarantine, sha256_of
from services.ledger.findings import Difference
from services.ledger.scope import Scope
from services.ledger.scratch import Scratch
from services.ledger.snapshots import Copy, Row
from shared.events import Event
from shared.recorded import Recorded
from shared.streams import STREAM


class Arrived(NamedTuple):
    """An event as it came, and how a table should have it."""

    message: Recorded
    event: Event
    record: Mapping[str, Any]


class TableCheck:
    """One table, compared with what the stream says that it should be."""

    def __init__(self, copy: Copy, floor: int, quarantine: Quarantine, scope: Scope, scratch: Scratch) -> None:
        self.copy, self.matched = copy, 0
        self._floor, self._quarantine, self._scope, self._scratch = floor, quarantine, scope, scratch
        self._moment, self._any_changed = copy.layout.moment, False

    def take(self, arrived: Sequence[Arrived]) -> set[str]:
        """Compare what came for the first time. The ids of those that count: that are there, or should be."""
        rows = [self.copy.row(record) for _, _, record in arrived]
        found = self.copy.find([row[0] for row in rows])
        counted, absent = set(found), []
        for (message, event, record), expected in zip(arrived, rows, strict=True):
            row = found.get(event.id)
            if row is None:
                if message.sequence <= self._floor:
                    absent.append((message, event, record, expected))
            elif self._scope.covers(record[self._moment]):
                self.matched += 1
                if row != expected:
                    self._compare(expected, row)
            elif row != expected and self.copy.is_within(self._scope, row):
                self._compare(expected, row)
        return counted | self._look_for_absent(absent)

    def _look_for_absent(self, absent: Sequence[tuple[Recorded, Event, Mapping[str, Any], Row]]) -> set[str]:
        kept = self._quarantine.among([message for message, *_ in absent])
        due = set()
        for message, event, record, expected in absent:
            is_kept = sha256_of(message) in kept
            if not is_kept:
                due.add(event.id)
            if self._scope.covers(record[self._moment]):
                self._add("quarantined" if is_kept else "missing", expected, self.copy.told(expected), None)
        return due

    def take_all(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Compare records that must all be there."""
        rows = [self.copy.row(record) for record in records]
        found = self.copy.find([row[0] for row in rows])
        for expected in rows:
            if (row := found.get(expected[0])) is None:
                self._add("missing", expected, self.copy.told(expected), None)
            else:
                self.matched += 1
                self._compare(expected, row)

    def _compare(self, expected: Row, found: Row) -> None:
        if parts := self.copy.differing(expected, found):
            self._any_changed = True
            self._add("changed", expected, *parts)

    def contradicting(self, arrived: Sequence[Arrived]) -> Iterator[Difference]:
        """Of events that came under an id which was there before, those that say something else."""
        rows = [self.copy.row(record) for _, _, record in arrived]
        found = self.copy.find([row[0] for row in rows])
        for (message, event, record), expected in zip(arrived, rows, strict=True):
            row = found.get(event.id)
            parts = self.copy.differing(expected, row) if row else None
            if parts and self._scope.covers(record[self._moment]):
                second, first = parts
                yield Difference(
                    f"stream {STREAM}",
                    "contradicting",
                    event.id,
                    event.subject,
                    first,
                    {"sequence": message.sequence} | second,
                )

    def look_for_unexplained(self, known: Callable[[list[str]], set[str]]) -> None:
        """Rows that no event explains. `known` tells of keys which of them the stream has."""
        # Every row that is expected was found by its key: where there are as many, there are no others.
        if not self._any_changed and self.copy.number(self._scope) == self.matched:
            return
        for rows in self.copy.batches(self._scope):
            explained = known([row[0] for row in rows])
            strange = [row for row in rows if row[0] not in explained]
            owners = self._scratch.owners([row[0] for row in strange])
            for row in strange:
                if owner := owners.get(row[0]):
                    self._add("changed", row, {"user_id": owner}, {"user_id": self._scope.user_id})
                else:
                    self._add("unexplained", row, None, self.copy.told(row))

    def _add(self, kind: str, row: Row, expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> None:
        user_id = row[self.copy.layout.columns.index("user_id")]
        self._scratch.add(Difference(self.copy.layout.name, kind, row[0], user_id, expected, found))
