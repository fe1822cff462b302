"""What an audit keeps on disk while it reads, so that its memory does not grow with the stream: a file for its time.

The fold of the stream (each event's id, user, moment and counts), beside it quota's totals and the ledger's sums of
days, and the differences.
"""

import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

from services.ledger.findings import KINDS, Difference, Group
from shared.errors import Misconfigured
from shared.plans import COUNTS

SUMS = (*COUNTS, "top_up_tokens", "lasting_top_up_tokens")
DAILY = (*COUNTS, "generations")
EVENTS, CHANGES = "events", "changes"

_SUMS, _DAILY = ", ".join(SUMS), ", ".join(DAILY)
_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -16384;
CREATE TABLE events (
    id TEXT PRIMARY KEY, user_id TEXT, moment TEXT, {_SUMS}, generations INT, model TEXT,
    is_counted INT, is_recorded INT
) WITHOUT ROWID;
CREATE TABLE changes (id TEXT PRIMARY KEY, user_id TEXT, moment TEXT, tier TEXT, time_zone TEXT, is_counted INT);
CREATE INDEX changes_by_user ON changes (user_id, moment, id);
CREATE TABLE others (id TEXT PRIMARY KEY, user_id TEXT) WITHOUT ROWID;
CREATE TABLE totals (
    nth INTEGER PRIMARY KEY, user_id TEXT, period_start TEXT, period_end TEXT, {_SUMS}, models TEXT
);
CREATE TABLE periods (user_id TEXT, period_start TEXT, period_end TEXT);
CREATE TABLE days (user_id TEXT, usage_date TEXT, model TEXT, {_DAILY}, is_expected INT);
CREATE TABLE differences (
    nth INTEGER PRIMARY KEY, place TEXT, kind TEXT, id TEXT, user_id TEXT, expected TEXT, found TEXT
);
CREATE INDEX differences_by_group ON differences (place, kind);
"""
_EVENT = f"INSERT INTO events VALUES ({', '.join('?' * (7 + len(SUMS)))})"  # noqa: S608
_TOTAL = f"INSERT INTO totals VALUES (NULL, {', '.join('?' * (4 + len(SUMS)))})"  # noqa: S608
_CHANGE = "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?)"
_DAY = f"INSERT INTO days VALUES (?, ?, ?, {', '.join('?' * len(DAILY))}, 0)"  # noqa: S608
_INDEXES = """
CREATE INDEX events_by_user ON events (user_id, moment) WHERE is_counted;
CREATE INDEX totals_by_user ON totals (user_id, period_start DESC);
"""
_FOLD = f"""
SELECT nth, model, {", ".join(f"sum(events.{name})" for name in SUMS)}
FROM totals JOIN events ON events.user_id = totals.user_id AND is_counted
 AND moment >= period_start AND moment < period_end
GROUP BY nth, model ORDER BY nth, model
"""  # noqa: S608
_ENDS_OF_DAYS = """
SELECT user_id, min(moment), max(moment) FROM events WHERE is_counted
GROUP BY user_id, substr(moment, 1, 10) ORDER BY user_id, min(moment)
"""
_LACKING = f"""
SELECT periods.*, {", ".join(f"sum(events.{name})" for name in SUMS)} FROM periods
JOIN events ON events.user_id = periods.user_id AND is_counted AND moment >= period_start AND moment < period_end
WHERE period_end > ? AND period_start <= ? AND NOT EXISTS (
 SELECT 1 FROM totals WHERE totals.user_id = periods.user_id
 AND totals.period_start = periods.period_start AND totals.period_end = periods.period_end)
GROUP BY 1, 2, 3 HAVING {" OR ".join(f"max(abs(events.{name}))" for name in SUMS)}
"""  # noqa: S608
_EXPECTED_DAYS = f"""
INSERT INTO days
SELECT user_id, substr(moment, 1, 10) AS day, coalesce(model, ''), {", ".join(f"sum({name})" for name in DAILY)}, 1
FROM events WHERE is_recorded AND tokens_used != 0 AND day >= ? AND day <= ? GROUP BY 1, 2, 3
"""  # noqa: S608
_DIFFERING_DAYS = f"""
SELECT user_id, usage_date, model, max(is_expected), min(is_expected),
 {", ".join(f"sum({name}) FILTER (WHERE is_expected)" for name in DAILY)},
 {", ".join(f"sum({name}) FILTER (WHERE NOT is_expected)" for name in DAILY)}
FROM days GROUP BY 1, 2, 3
HAVING count(*) != 2 OR {" OR ".join(f"min({name}) != max({name})" for name in DAILY)} ORDER BY 1, 2, 3
"""  # noqa: S608
_KNOWN = {
    EVENTS: "SELECT id FROM events WHERE id IN (SELECT value FROM json_each(?))",
    CHANGES: "SELECT id FROM changes WHERE id IN (SELECT value FROM json_each(?))",
}


class Change(NamedTuple):
    """Of a user's plan; the moment as text."""

    user_id: str
    changed_at: str
    event_id: str
    tier: str
    time_zone: str | None


class Total(NamedTuple):
    """A total as quota has it (`found`), and the sum of its user's events in its period."""

    user_id: str
    period_start: str | None
    period_end: str | None
    found: Sequence[int]
    found_models: str
    sums: Sequence[int]
    models: dict[str, Sequence[int]]


class Day(NamedTuple):
    """What a user used of a model on a day: the sum of the events, and as the ledger has it, where there is one."""

    user_id: str
    usage_date: str
    model: str
    expected: Sequence[int] | None
    found: Sequence[int] | None


class Scratch:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.executescript(_SCHEMA)
        # One transaction for all: by itself every row would be one, and written to the file.
        connection.execute("BEGIN")

    def firsts(self, table: str, ids: Sequence[str]) -> list[bool]:
        """Of each id whether it is here for the first time."""
        seen = self.known(table, ids)
        firsts = []
        for event_id in ids:
            firsts.append(event_id not in seen)
            seen.add(event_id)
        return firsts

    def known(self, table: str, ids: Sequence[str]) -> set[str]:
        return {row[0] for row in self._connection.execute(_KNOWN[table], (_listed(ids),))}

    def keep_events(self, rows: Iterable[Sequence[Any]]) -> None:
        """(id, user, moment as text, the sums, generations, model, whether quota and ledger count it) of each."""
        self._connection.executemany(_EVENT, rows)

    def keep_changes(self, rows: Iterable[Sequence[Any]]) -> None:
        """(id, user, moment as text, tier, time zone, whether it counts) of each."""
        self._connection.executemany(_CHANGE, rows)

    def keep_others(self, rows: Iterable[tuple[str, str]]) -> None:
        """(id, user) of events of users who are not looked at."""
        self._connection.executemany("INSERT OR IGNORE INTO others VALUES (?, ?)", rows)

    def owners(self, ids: Sequence[str]) -> dict[str, str]:
        """Of ids that are others', whose."""
        owned = "SELECT id, user_id FROM others WHERE id IN (SELECT value FROM json_each(?))"
        return dict(self._connection.execute(owned, (_listed(ids),)))

    def changes(self) -> Iterator[Change]:
        """Those that count, user by user, the oldest first; of two at once, by id."""
        order = (
            "SELECT user_id, moment, id, tier, time_zone FROM changes WHERE is_counted ORDER BY user_id, moment, id"
        )
        return (Change(*row) for row in self._connection.execute(order))

    def changes_of(self, user_id: str) -> list[Change]:
        """Those that count, the oldest first; of two at once, by id."""
        order = (
            "SELECT user_id, moment, id, tier, time_zone FROM changes WHERE is_counted AND user_id = ?"
            " ORDER BY moment, id"
        )
        return [Change(*row) for row in self._connection.execute(order, (user_id,))]

    def subscribed(self, user_ids: Sequence[str]) -> set[str]:
        """Those of them who have ever changed their plan."""
        changed = "SELECT user_id FROM changes WHERE is_counted AND user_id IN (SELECT value FROM json_each(?))"
        return {row[0] for row in self._connection.execute(changed, (_listed(user_ids),))}

    def keep_days(self, rows: Iterable[Sequence[Any]], *, first: str, last: str) -> int:
        """(user, day as text, model, its sums) of each from `first` to `last`, in any order. How many there were."""
        number = self._connection.executemany(_DAY, rows).rowcount
        self._connection.execute(_EXPECTED_DAYS, (first, last))
        return max(number, 0)

    def differing_days(self) -> Iterator[Day]:
        """Those of which the ledger does not have what the events come to; by user and day."""
        for user_id, usage_date, model, is_expected, is_extra, *sums in self._connection.execute(_DIFFERING_DAYS):
            expected = sums[: len(DAILY)] if is_expected else None
            found = None if is_extra else sums[len(DAILY) :]
            yield Day(user_id, usage_date, model, expected, found)

    def keep_totals(self, rows: Iterable[Sequence[Any]]) -> None:
        """(user, start and end of the period as text, the sums, models as JSON) of each. To be kept last."""
        self._connection.executemany(_TOTAL, rows)
        self._connection.executescript(_INDEXES)
        self._connection.execute("BEGIN")

    def totals(self) -> Iterator[Total]:
        folded = groupby(self._connection.execute(_FOLD), key=lambda row: row[0])
        nth, parts = next(folded, (None, iter(())))
        for row in self._connection.execute("SELECT * FROM totals ORDER BY nth"):
            sums, models = [0] * len(SUMS), dict[str, Sequence[int]]()
            if row[0] == nth:
                for _, model, *counts in parts:
                    sums = [tokens + more for tokens, more in zip(sums, counts, strict=True)]
                    if model:
                        models[model] = counts[: len(COUNTS)]
                nth, parts = next(folded, (None, iter(())))
            _, user_id, start, end, *found, found_models = row
            yield Total(user_id, start, end, found, found_models, sums, models)

    def moments_used(self) -> Iterator[tuple[str, list[str]]]:
        """Each user, and the first and the last moment of each day in UTC of events that count, in order."""
        by_user = groupby(self._connection.execute(_ENDS_OF_DAYS), key=lambda row: row[0])
        return ((user_id, [end for _, *ends in of_user for end in ends]) for user_id, of_user in by_user)

    def keep_periods(self, rows: Iterable[Sequence[Any]]) -> None:
        """(user, start and end as text) of each that should have a total if there are events in it, none twice."""
        self._connection.executemany("INSERT INTO periods VALUES (?, ?, ?)", rows)

    def lacking_totals(self, first: str, last: str) -> Iterator[tuple[Any, ...]]:
        """(user, start, end, the sums of its events) of each period without the total that it should have, of those
        with something of what is between the two moments."""
        return iter(self._connection.execute(_LACKING, (first, last)))

    def add(self, difference: Difference) -> None:
        told = [_dumped(difference.expected), _dumped(difference.found)]
        whose = [as_text(difference.id), as_text(difference.user_id)]
        row = (difference.where, difference.kind, *whose, *told)
        self._connection.execute("INSERT INTO differences VALUES (NULL, ?, ?, ?, ?, ?, ?)", row)

    def groups(self) -> list[Group]:
        found = self._connection.execute("SELECT place, kind, count(*) FROM differences GROUP BY place, kind")
        order = list(KINDS)
        return sorted((Group(*row) for row in found), key=lambda group: (order.index(group.kind), group.where))

    def differences(self, where: str, kind: str) -> Iterator[Difference]:
        of_group = "SELECT id, user_id, expected, found FROM differences WHERE place = ? AND kind = ? ORDER BY nth"
        for event_id, user_id, expected, found in self._connection.execute(of_group, (where, kind)):
            yield Difference(where, kind, event_id, user_id, json.loads(expected), json.loads(found))


@contextmanager
def scratch() -> Iterator[Scratch]:
    """Gone with the end of the context. Raises Misconfigured where it cannot be kept."""
    with (
        tempfile.TemporaryDirectory(prefix="chatrail-audit-") as folder,
        closing(sqlite3.connect(f"{folder}/scratch.db", isolation_level=None)) as connection,
    ):
        try:
            yield Scratch(connection)
        except sqlite3.OperationalError as error:
            raise Misconfigured(
                f"What an audit keeps while it reads cannot be kept in {folder}: {error}. Make room there, or name "
                "another folder with TMPDIR."
            ) from error


def as_text(value: Any) -> Any:
    """Bytes as SQL has them: SQLite takes them for text."""
    return f"x'{value.hex()}'" if isinstance(value, bytes) else value


def _dumped(told: Any) -> str:
    return json.dumps(told, ensure_ascii=False, default=lambda value: str(as_text(value)))


def _listed(keys: Sequence[Any]) -> str:
    """For `json_each`. What is no text is no key of ours."""
    return json.dumps([key for key in keys if isinstance(key, str)])
