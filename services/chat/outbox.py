"""The outbox: what must reach the stream, kept on this service's own disk until the stream has it.

A row is an event. While its generation runs it is the event to publish if this process dies now
(`interrupted`, `estimated`); once settled it is what really happened, and it never changes again.
"""

import asyncio
import fcntl
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.batching import Batching
from shared.errors import Misconfigured
from shared.events import GenerationCompleted, encode

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    event_id TEXT PRIMARY KEY,
    event    BLOB NOT NULL,
    settled  INTEGER NOT NULL
) WITHOUT ROWID
"""
# A settled event is final: a late checkpoint must not undo it.
_WRITE = """
INSERT INTO outbox (event_id, event, settled) VALUES (?, ?, ?)
ON CONFLICT (event_id) DO UPDATE SET event = excluded.event, settled = excluded.settled WHERE NOT settled
"""
_DELETE = "DELETE FROM outbox WHERE event_id = ?"


@dataclass(frozen=True, slots=True)
class _Change:
    sql: str
    rows: Sequence[tuple[object, ...]]
    # A settlement is promised to the caller, so it survives a power cut; the rest need only survive this process.
    is_promise: bool


class Outbox:
    """One SQLite file, one writer thread, group commit. Raises sqlite3.Error when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self._lock = _locked(path)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(_SCHEMA)
        self._thread = ThreadPoolExecutor(1, "outbox")
        self._changes: Batching[_Change, None] = Batching(self._commit)

    def recover(self) -> list[GenerationCompleted]:
        """Settle what a process that died left open, as it stood. Returns all that the stream may not have."""
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("UPDATE outbox SET settled = 1 WHERE NOT settled")
        rows = self._db.execute("SELECT event FROM outbox ORDER BY event_id").fetchall()
        return [GenerationCompleted.model_validate_json(event) for (event,) in rows]

    async def intend(self, event: GenerationCompleted) -> None:
        """Before Claude is asked; and again as the answer grows, so that little is lost with the process."""
        await self._changes.submit(_Change(_WRITE, [(event.id, encode(event), 0)], is_promise=False))

    async def settle(self, event: GenerationCompleted) -> None:
        """Returns once the event is on the disk: it will be on the stream, whatever happens to this process."""
        await self._changes.submit(_Change(_WRITE, [(event.id, encode(event), 1)], is_promise=True))

    async def forget(self, event_ids: Sequence[str]) -> None:
        """The stream has these."""
        rows = [(event_id,) for event_id in event_ids]
        await self._changes.submit(_Change(_DELETE, rows, is_promise=False))

    def close(self) -> None:
        self._thread.shutdown()
        self._db.close()
        self._lock.close()

    async def _commit(self, changes: Sequence[_Change]) -> list[None]:
        if any(change.is_promise for change in changes):
            await asyncio.get_running_loop().run_in_executor(self._thread, self._apply, changes, "FULL")
        else:
            # Without an fsync it takes a fraction of what a thread and back would cost.
            self._apply(changes, "NORMAL")
        return [None] * len(changes)

    def _apply(self, changes: Sequence[_Change], level: str) -> None:
        self._db.execute(f"PRAGMA synchronous={level}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                self._db.executemany(change.sql, change.rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


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
