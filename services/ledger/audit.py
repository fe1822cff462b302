"""The audit: the stream is read once, and ledger and totals are compared with it, record by record, sum by sum.

It is right beside services that go on working. Both databases are read in one snapshot each, opened when the durables
have acknowledged the stream up to their `floor`: what is older must be there, what is younger may be. The stream is
then read up to its end at that moment, so that it explains all that a snapshot has.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial
from itertools import compress, groupby, islice
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from services.ledger import store
from services.ledger.archive import altered
from services.ledger.checkpoint import Keys
from services.ledger.findings import Difference, Read, Report
from services.ledger.scratch import CHANGES as CHANGED
from services.ledger.scratch import DAILY, EVENTS, SUMS, Change, Day, Scratch, Total
from services.ledger.seal_check import seal_check
from services.ledger.seal_findings import Result
from services.ledger.seals import Sealed, sealed_after
from services.ledger.snapshots import BATCH_SIZE, Copy, Layout, Row, Scope, Snapshot, as_sqlite_has_it, snapshot
from shared.archive import Archive
from shared.errors import Misconfigured, PoisonMessage, Unavailable
from shared.events import Event, GenerationCompleted, SubscriptionChanged, UsageAdjusted, decode
from shared.plans import COUNTS
from shared.record import Record, check_origin
from shared.recorded import Recorded, bounds
from shared.streams import LEDGER, LEDGER_SEALED, QUOTA, STREAM

# Beside services under load the durables are a fraction of a second behind; one that does not move is not waited for.
FLOOR_WITHIN_S = 5.0
FLOOR_STILL_S = 1.0
LOOK_EVERY_S = 0.1
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

USAGE = Layout(LEDGER, "usage", tuple(store.usage.c.keys()), "created_at")
CHANGES = Layout(LEDGER, "subscription_changes", tuple(store.subscription_changes.c.keys()), "changed_at")
SETTLEMENTS = Layout(QUOTA, "settlements", ("event_id", "user_id", "started_at", *SUMS, "model"), "started_at")
PLAN_CHANGES = Layout(QUOTA, "plan_changes", ("event_id", "user_id", "tier", "time_zone", "changed_at"), "changed_at")
SUBSCRIPTIONS = Layout(
    QUOTA,
    "subscriptions",
    ("user_id", "tier", "time_zone", "changed_at", "subscribed_at", "event_id"),
    "changed_at",
)
TOTALS, DAYS = "quota.usage_totals", "ledger.usage_daily"
ARCHIVE = "archive"
OTHERS = {LEDGER: ("usage_daily", "quarantine", "leaves", "seals"), QUOTA: ("quarantine", "usage_totals")}

Uses = GenerationCompleted | UsageAdjusted
Progress = Callable[[int, int], None]
Item = TypeVar("Item")


class Databases(NamedTuple):
    ledger_url: str
    quota_url: str


class Evidence(NamedTuple):
    """What signed seals are checked with, and where else seals are written down."""

    keys: Keys | None = None
    seals_file: Path | None = None


class Arrived(NamedTuple):
    """An event as it came, and how a table should have it."""

    message: Recorded
    event: Event
    record: Mapping[str, Any]


async def audit(
    nc: Client,
    databases: Databases,
    scope: Scope,
    scratch: Scratch,
    *,
    evidence: Evidence = Evidence(),  # noqa: B008 - frozen
    archive: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Raises Misconfigured, or Unavailable, when it cannot be done. `progress` hears how much of what is read."""
    begun = monotonic()
    floors = await _floors(nc)
    with ExitStack() as snapshots:

        def open_snapshot(service: str, url: str, layouts: Sequence[Layout]) -> Snapshot:
            tables = [*(layout.table for layout in layouts), *OTHERS[service]]
            return snapshots.enter_context(snapshot(service, url, tables))

        ledger = open_snapshot(LEDGER, databases.ledger_url, (USAGE, CHANGES))
        quota = open_snapshot(QUOTA, databases.quota_url, (SETTLEMENTS, PLAN_CHANGES, SUBSCRIPTIONS))
        sealed = seal_check(
            ledger.rows, known_up_to=floors[LEDGER], keys=evidence.keys, seals_file=evidence.seals_file
        )
        record = Record(nc, archive, is_doubted=True)
        first, last = await record.bounds()
        archived = await _check_archive(nc, archive, ledger, evidence.keys, scratch) if archive else 0
        comparing = _Comparison(ledger, quota, floors, scope, scratch)
        async for batch in record.read(first=first, last=last):
            sealed.take(batch)
            comparing.take(batch)
            progress(batch[-1].sequence - first + 1, last - first + 1)
        comparing.end()
        _tell_of_seals(sealed.end(), comparing.tally, scratch)
        if archived:
            comparing.tally.compared[ARCHIVE] = archived
    tally = comparing.tally
    waiting = {service: max(0, last - floor) for service, floor in floors.items()}
    read = Read(first, last, tally.messages, tally.unreadable, tally.repeated, waiting)
    return Report(read, tally.compared, scratch, monotonic() - begun)


async def _check_archive(nc: Client, folder: Path, ledger: Snapshot, keys: Keys | None, scratch: Scratch) -> int:
    """How many messages it has. What is not as it was sealed is a difference, also while the stream still has it."""
    archive = await asyncio.to_thread(Archive.at, folder)
    check_origin(archive, (await nc.jetstream().stream_info(STREAM)).created)
    before: Sealed | None = None
    for manifest in archive.manifests:
        path = archive.path(manifest)
        for found in await altered(path, manifest, ledger.rows, before=before, keys=keys):
            expected = {"sequence": found.sequence, "was": found.expected}
            where = f"{ARCHIVE} {manifest.name}"
            scratch.add(Difference(where, "archive", found.event_id, None, expected, {"is": found.found}))
        before = next(sealed_after(ledger.rows, manifest.last - 1), None)
    return archive.last


def _tell_of_seals(result: Result, tally: "Tally", scratch: Scratch) -> None:
    tally.compared |= {"ledger.leaves": result.leaves, "ledger.seals": result.seals}
    for found in result.differences:
        where, expected = f"evidence, {found.kind}", {"sequence": found.sequence, "was": found.expected}
        scratch.add(Difference(where, "broken", found.event_id, None, expected, {"is": found.found}))
    if result.more:
        scratch.add(Difference("evidence", "broken", None, None, {"and more": result.more}, None))


async def _floors(nc: Client) -> dict[str, int]:
    """Up to where each durable has acknowledged all of the stream: all of it as it is now, if that is soon to be."""
    _, last = await bounds(nc)
    floors, begun = await _acknowledged(nc), monotonic()
    moved = begun
    while min(floors.values()) < last and (now := monotonic()) < min(begun + FLOOR_WITHIN_S, moved + FLOOR_STILL_S):
        await asyncio.sleep(LOOK_EVERY_S)
        if (found := await _acknowledged(nc)) != floors:
            floors, moved = found, now
    return floors


async def _acknowledged(nc: Client) -> dict[str, int]:
    floors = {}
    for durable in (LEDGER, QUOTA):
        try:
            floor = (await nc.jetstream().consumer_info(STREAM, durable)).ack_floor
        except NotFoundError as error:
            raise Misconfigured(f"The stream has no consumer {durable}. Start ChatRail: it makes one.") from error
        except (NatsError, OSError) as error:
            raise Unavailable("The broker cannot be asked right now.") from error
        floors[durable] = floor.stream_seq if floor else 0
    return floors


@dataclass(slots=True)
class Tally:
    messages: int = 0
    unreadable: int = 0
    repeated: int = 0
    compared: dict[str, int] = field(default_factory=dict)


class _Comparison:
    """Takes the stream batch by batch; what must wait for its end is kept on disk."""

    def __init__(
        self, ledger: Snapshot, quota: Snapshot, floors: Mapping[str, int], scope: Scope, scratch: Scratch
    ) -> None:
        self._scope, self._scratch, self._ledger, self._quota = scope, scratch, ledger, quota
        self.tally = Tally()
        quarantines = {LEDGER: _Quarantine(ledger), QUOTA: _Quarantine(quota)}

        def check(layout: Layout) -> _Check:
            service = layout.service
            copy = Copy(ledger if service == LEDGER else quota, layout)
            return _Check(copy, floors[service], quarantines[service], scope, scratch)

        self._usage, self._settlements = check(USAGE), check(SETTLEMENTS)
        self._changes, self._plan_changes = check(CHANGES), check(PLAN_CHANGES)
        self._subscriptions = check(SUBSCRIPTIONS)
        self._quarantines = [(name, quarantine, floors[name]) for name, quarantine in quarantines.items()]

    def take(self, batch: Sequence[Recorded]) -> None:
        uses: list[tuple[Recorded, Uses]] = []
        changes: list[tuple[Recorded, SubscriptionChanged]] = []
        unreadable = []
        for message in batch:
            if message.subject == LEDGER_SEALED:
                continue  # the tamper evidence is about these
            try:
                event = decode(message.body)
            except PoisonMessage:
                unreadable.append(message)
                continue
            if self._scope.user_id is not None and event.subject != self._scope.user_id:
                continue
            if isinstance(event, SubscriptionChanged):
                changes.append((message, event))
            elif isinstance(event, GenerationCompleted | UsageAdjusted):
                uses.append((message, event))
        self.tally.messages += len(batch)
        self._look_for_in_quarantine(unreadable)
        self._take_uses(uses)
        self._take_changes(changes)

    def _take_uses(self, uses: list[tuple[Recorded, Uses]]) -> None:
        recorded_as = [Arrived(message, event, store.usage_row(event)) for message, event in uses]
        settled_as = [Arrived(message, event, _settlement(event)) for message, event in uses]
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

    def _look_at_seconds(self, is_first: list[bool], *tables: tuple["_Check", list[Arrived]]) -> None:
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
        for service, quarantine, floor in self._quarantines:
            due = [message for message in unreadable if message.sequence <= floor]
            kept = quarantine.among(due)
            for message in due:
                if (sha256 := _sha256(message)) not in kept:
                    expected = {"sequence": message.sequence, "sha256": sha256}
                    self._scratch.add(Difference(f"{service}.quarantine", "unreadable", None, None, expected, None))

    def end(self) -> None:
        for check in (self._usage, self._changes, self._settlements, self._plan_changes):
            known = EVENTS if check in (self._usage, self._settlements) else CHANGED
            check.look_for_unexplained(partial(self._scratch.known, known))
            self.tally.compared[check.copy.layout.name] = check.matched
        self._compare_days()
        self._compare_subscriptions()
        self._compare_totals()

    def _compare_days(self) -> None:
        first = (self._scope.first or EARLIEST).astimezone(UTC).date()
        last = (self._scope.last or LATEST).astimezone(UTC).date()
        found = _days(self._ledger, self._scope.user_id, first, last)
        kept = self._scratch.keep_days(found, first=first.isoformat(), last=last.isoformat())
        self.tally.compared[DAYS] = kept
        for day in self._scratch.differing_days():
            self._scratch.add(_differing_day(day))

    def _compare_subscriptions(self) -> None:
        check = self._subscriptions
        for users in _in_batches(_subscribed(self._scratch.changes()), BATCH_SIZE):
            check.take_all(users)
        check.look_for_unexplained(self._scratch.subscribed)
        self.tally.compared[check.copy.layout.name] = check.matched

    def _compare_totals(self) -> None:
        self._scratch.keep_totals(_totals(self._quota, self._scope))
        self.tally.compared[TOTALS] = 0
        for total in self._scratch.totals():
            self.tally.compared[TOTALS] += 1
            if difference := _differing(total):
                self._scratch.add(difference)
        first, last = self._scope.first or EARLIEST, self._scope.last or LATEST
        for user_id, start, end, *sums in self._scratch.uncovered(_text(first), _text(last)):
            expected = {"from": start, "to": end} | dict(zip(SUMS, sums, strict=True))
            self._scratch.add(Difference(TOTALS, "uncovered", None, user_id, expected, None))


class _Check:
    """One table, compared with what the stream says that it should be."""

    def __init__(self, copy: Copy, floor: int, quarantine: "_Quarantine", scope: Scope, scratch: Scratch) -> None:
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
        return counted | self._look_for_absent(absent)

    def _look_for_absent(self, absent: Sequence[tuple[Recorded, Event, Mapping[str, Any], Row]]) -> set[str]:
        kept = self._quarantine.among([message for message, *_ in absent])
        due = set()
        for message, event, record, expected in absent:
            is_kept = _sha256(message) in kept
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
            for row in rows:
                if row[0] not in explained:
                    self._add("unexplained", row, None, self.copy.told(row))

    def _add(self, kind: str, row: Row, expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> None:
        user_id = row[self.copy.layout.columns.index("user_id")]
        self._scratch.add(Difference(self.copy.layout.name, kind, row[0], user_id, expected, found))


class _Quarantine:
    """What a service could not handle."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._find = f"SELECT body_sha256 FROM quarantine WHERE {snapshot.listed('body_sha256')}"  # noqa: S608

    def among(self, messages: Sequence[Recorded]) -> set[str]:
        """The hashes of those that are in it."""
        if not messages:
            return set()
        return {row[0] for row in self._snapshot.find(self._find, [_sha256(message) for message in messages])}


def _sha256(message: Recorded) -> str:
    return hashlib.sha256(message.body).hexdigest()


def _only(items: Sequence[Item], wanted: Sequence[bool]) -> list[Item]:
    return list(compress(items, wanted))


def _in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _settlement(event: Uses) -> dict[str, Any]:
    """What quota should have counted, said here once more: an audit does not ask those whom it audits."""
    record: dict[str, Any] = dict.fromkeys(SUMS, 0) | {"event_id": event.id, "user_id": event.subject}
    if isinstance(event, GenerationCompleted):
        data = event.data
        counts = {name: getattr(data, name) or 0 for name in COUNTS}
        return record | counts | {"started_at": data.started_at, "model": data.model}
    adjustment = event.data
    topped_up = "lasting_top_up_tokens" if adjustment.outlives_period else "top_up_tokens"
    counts = {"tokens_used": adjustment.tokens_used, topped_up: adjustment.top_up_tokens}
    return record | counts | {"started_at": adjustment.effective_at, "model": None}


def _folded(event: Event, settlement: Mapping[str, Any]) -> Row:
    sums = [settlement[name] for name in SUMS]
    moment, is_generation = as_sqlite_has_it(settlement["started_at"]), isinstance(event, GenerationCompleted)
    return (settlement["event_id"], settlement["user_id"], moment, *sums, is_generation, settlement["model"])


def _subscribed(changes: Iterable[Change]) -> Iterator[dict[str, Any]]:
    """What a user's changes come to, user by user, oldest first: the newest, and since when it has its tier."""
    for user_id, told in groupby(changes, key=lambda change: change.user_id):
        newest: Change | None = None
        since = ""
        for change in told:
            if newest is None or newest.tier != change.tier:
                since = change.changed_at
            newest = change
        assert newest is not None  # noqa: S101 - a group has at least one
        yield {
            "user_id": user_id,
            "tier": newest.tier,
            "time_zone": newest.time_zone,
            "changed_at": datetime.fromisoformat(newest.changed_at),
            "subscribed_at": datetime.fromisoformat(since),
            "event_id": newest.event_id,
        }


def _days(ledger: Snapshot, user_id: str | None, first: date, last: date) -> Iterator[Row]:
    """Whole days, those at the ends of what is looked at included."""
    of_user, values = ("", ()) if user_id is None else ("user_id = ? AND ", (user_id,))
    within = f"{of_user}usage_date >= ? AND usage_date <= ?"
    columns = ", ".join(("user_id", "usage_date", "model", *DAILY))
    statement = f"SELECT {columns} FROM usage_daily WHERE {within}"  # noqa: S608
    for found, day, *counts in ledger.rows(statement, *values, ledger.day(first), ledger.day(last)):
        yield (found, str(day), *counts)


def _differing_day(day: Day) -> Difference:
    """What is expected of it names the day; of a row that should not be there, what was found."""
    which = {"usage_date": day.usage_date, "model": day.model}
    expected, found = (dict(zip(DAILY, sums, strict=True)) if sums else None for sums in (day.expected, day.found))
    if expected and found:
        names = [name for name in DAILY if expected[name] != found[name]]
        parts = (which | {name: expected[name] for name in names}, {name: found[name] for name in names})
        return Difference(DAYS, "differs", None, day.user_id, *parts)
    if expected:
        return Difference(DAYS, "missing", None, day.user_id, which | expected, None)
    return Difference(DAYS, "unexplained", None, day.user_id, None, which | (found or {}))


def _totals(quota: Snapshot, scope: Scope) -> Iterator[Row]:
    """Totals whose periods have something of what is looked at."""
    conditions = {
        "user_id = ?": scope.user_id,
        "period_end > ?": scope.first and quota.time(scope.first),
        "period_start <= ?": scope.last and quota.time(scope.last),
    }
    asked = {condition: value for condition, value in conditions.items() if value is not None}
    where = f" WHERE {' AND '.join(asked)}" if asked else ""
    columns = ", ".join(("user_id", "period_start", "period_end", *SUMS, "models"))
    for user_id, start, end, *counts in quota.rows(f"SELECT {columns} FROM usage_totals{where}", *asked.values()):  # noqa: S608
        yield (user_id, _text(start), _text(end), *counts)


def _text(moment: Any) -> str:
    return moment if isinstance(moment, str) else as_sqlite_has_it(moment)


def _differing(total: Total) -> Difference | None:
    """The total and the sum of its user's events in its period, where they are not the same."""
    expected = dict(zip(SUMS, total.sums, strict=True)) | _by_model(total.models)
    found = dict(zip(SUMS, total.found, strict=True)) | _by_model(_read_models(total.found_models))
    names = [name for name in expected | found if expected.get(name, 0) != found.get(name, 0)]
    if not names:
        return None
    period = {"period_start": total.period_start, "period_end": total.period_end}
    return Difference(
        TOTALS,
        "differs",
        None,
        total.user_id,
        period | {name: expected.get(name, 0) for name in names},
        {name: found.get(name, 0) for name in names},
    )


def _by_model(models: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """One that used nothing may be named or not."""
    return {f"models.{model}": list(counts) for model, counts in models.items() if any(counts)}


def _read_models(text: str) -> dict[str, Any]:
    try:
        return {model: [int(count) for count in counts] for model, counts in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return {"": [text]}
