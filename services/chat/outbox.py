"""The outbox: what must reach the stream, kept on this service's own disk until the stream has it.

A row is an event. While its generation runs it is the event to publish if this process dies now
(`interrupted`, `estimated`); once settled it is what really happened, and it never changes again.

It has room for so many events. Beyond it, and while the disk takes nothing, whatever is new is refused; what is under
way may always write.
"""

import asyncio
import fcntl
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO

import structlog

from services.chat.batching import Batching
from shared.errors import Misconfigured, PoisonMessage, Unavailable
from shared.events import GenerationCompleted, decode, encode

log = structlog.get_logger()

EVENTS_MAX = 20_000
RETRY_AFTER_S = 5

# With rowids: without them what a row has beyond 1,002 bytes, as most events do, goes onto a page of its own.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    event_id TEXT PRIMARY KEY,
    event    BLOB NOT NULL,
    settled  INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS probe (written INTEGER PRIMARY KEY);
"""
# A settled event is final: a late checkpoint must not undo it.
_WRITE = """
INSERT INTO outbox (event_id, event, settled) VALUES (?, ?, ?)
ON CONFLICT (event_id) DO UPDATE SET event = excluded.event, settled = excluded.settled WHERE NOT settled
"""
_DELETE = "DELETE FROM outbox WHERE event_id = ?"
_PROBE = "INSERT OR REPLACE INTO probe VALUES (1)"


@dataclass(frozen=True, slots=True)
class _Change:
    sql: str
    rows: Sequence[tuple[object, ...]]
    # A settlement is promised to the caller, so it survives a power cut; the rest need only survive this process.
    is_promise: bool


class Outbox:
    """One SQLite file, one writer thread, group commit. Raises sqlite3.Error when the disk refuses."""

    def __init__(self, path: Path, *, events_max: int = EVENTS_MAX) -> None:
        self._path, self._events_max = path, events_max
        self._lock = _locked(path)
        try:
            self._db = _opened(path)
        except sqlite3.Error as error:
            self._lock.close()
            raise Misconfigured(f"The outbox {path} cannot be used: {error}. Is there space on its disk?") from error
        self._synchronous = ""
        self._thread = ThreadPoolExecutor(1, "outbox")
        self._changes = Batching[_Change](self._commit)
        self._is_refused = False
        self._open: set[str] = set()
        # In order of settlement, each with its moment.
        self._settled: dict[str, float] = {}

    @property
    def events(self) -> int:
        return len(self._open) + len(self._settled)

    @property
    def oldest_s(self) -> float:
        """For how long the oldest settled event has waited for the stream."""
        now = monotonic()
        return now - next(iter(self._settled.values()), now)

    async def admit(self) -> None:
        """Raises Unavailable while there is no room for what is new."""
        if self.events >= self._events_max:
            raise Unavailable(
                f"This service has {self.events} events that the usage stream has not taken yet, and keeps no more.",
                retry_after_s=RETRY_AFTER_S,
            )
        if self._is_refused:
            try:
                await self._change(_Change(_PROBE, [()], is_promise=False))
            except sqlite3.Error as error:
                raise self.refuses() from error

    def refuses(self) -> Unavailable:
        return Unavailable(
            "This service cannot write to its disk; an operator must make room in its data folder.",
            retry_after_s=RETRY_AFTER_S,
        )

    def recover(self) -> list[GenerationCompleted]:
        """Settle what a process that died left open, as it stood. Returns all that the stream may not have.

        Raises Misconfigured when the disk refuses.
        """
        try:
            self._synchronise("FULL")
            self._db.execute("UPDATE outbox SET settled = 1 WHERE NOT settled")
            rows = self._db.execute("SELECT event_id, event FROM outbox ORDER BY event_id").fetchall()
        except sqlite3.Error as error:
            raise Misconfigured(
                f"The outbox {self._path} cannot be recovered: {error}. Is there space on its disk?"
            ) from error
        self._settled = {event_id: monotonic() for event_id, _ in rows}
        return [event for event_id, body in rows if (event := _read(event_id, body))]

    async def intend(self, event: GenerationCompleted) -> None:
        """Before Claude is asked; and again as the answer grows, so that little is lost with the process."""
        await self._change(_Change(_WRITE, [(event.id, encode(event), 0)], is_promise=False))

    async def settle(self, event: GenerationCompleted) -> None:
        """Returns once the event is on the disk: it will be on the stream, whatever happens to this process."""
        await self._change(_Change(_WRITE, [(event.id, encode(event), 1)], is_promise=True))

    async def forget(self, event_ids: Sequence[str]) -> None:
        """The stream has these."""
        rows = [(event_id,) for event_id in event_ids]
        await self._change(_Change(_DELETE, rows, is_promise=False))

    def close(self) -> None:
        self._thread.shutdown()
        self._db.close()
        self._lock.close()

    async def _change(self, change: _Change) -> None:
        if change.is_promise or not self._changes.is_idle:
            await self._changes.submit(change)
        else:
            # Nothing is waited for, and a task for it would take as long as the disk does.
            await self._commit([change])

    async def _commit(self, changes: Sequence[_Change]) -> None:
        try:
            if any(change.is_promise for change in changes):
                loop = asyncio.get_running_loop()
                has_written = await loop.run_in_executor(self._thread, self._apply, changes, "FULL")
            else:
                # Without an fsync it takes a fraction of what a thread and back would cost.
                has_written = self._apply(changes, "NORMAL")
        except sqlite3.Error:
            self._is_refused = True
            raise
        if has_written:
            self._is_refused = False
        for change in changes:
            self._note(change)

    def _note(self, change: _Change) -> None:
        """What the file has now."""
        if change.sql == _DELETE:
            for (event_id,) in change.rows:
                self._settled.pop(str(event_id), None)
                self._open.discard(str(event_id))
        elif change.sql == _WRITE:
            for event_id, _, is_settled in change.rows:
                if is_settled:
                    self._settled.setdefault(str(event_id), monotonic())
                    self._open.discard(str(event_id))
                elif event_id not in self._settled:
                    self._open.add(str(event_id))

    def _apply(self, changes: Sequence[_Change], level: str) -> bool:
        """Whether anything had to be written: to forget what is not there succeeds on a full disk, too."""
        before = self._db.total_changes
        self._synchronise(level)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                self._db.executemany(change.sql, change.rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return self._db.total_changes > before

    def _synchronise(self, level: str) -> None:
        """Said where it changes: each time, it would take a quarter as long as the write."""
        if level != self._synchronous:
            self._db.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def _read(event_id: str, body: bytes) -> GenerationCompleted | None:
    """None for a row that is none of ours: it stays where it is, and keeps nobody from starting."""
    try:
        event = decode(body)
    except PoisonMessage as problem:
        log.error("outbox_row_unreadable", event_id=event_id, reason=str(problem))
        return None
    return event if isinstance(event, GenerationCompleted) else None


def _locked(path: Path) -> IO[str]:
    """Two processes on one outbox would settle each other's open generations."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise Misconfigured(f"The data folder {path.parent} cannot be written: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise Misconfigured(f"Another chat service uses {path}; give this one a data folder of its own.") from error
    return file
