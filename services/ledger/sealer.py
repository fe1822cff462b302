"""Seals the record: a leaf for each message that the ledger has handled, now and then a head of the tree over them.

Nothing is sealed on top of a record that is not what was sealed before: that is for an audit to tell.
"""

import asyncio
import base64
import fcntl
import os
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import structlog
from nats.aio.client import Client
from nats.js.errors import APIError, NotFoundError
from prometheus_client import Counter, Gauge
from sqlalchemy import Connection, Row, func, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from services.ledger.checkpoint import Keys, Signature, checkpoint
from services.ledger.merkle import Frontier, Head, leaf_hash
from services.ledger.models import Leaf as LeafRow
from services.ledger.models import Seal as SealRow
from services.ledger.seals import Leaf, Sealed, end_of, event_id, newest_size, signature_of, split
from shared.broker import BROKER_GONE
from shared.database import Database, insert_new, is_sqlite, iso, now, table_of
from shared.errors import Misconfigured, PoisonMessage, Unavailable
from shared.events import CONTENT_TYPE, LedgerSealed, Seal, decode_seal, encode
from shared.record import Record
from shared.recorded import Recorded
from shared.streams import LEDGER, LEDGER_SEALED, STREAM, WRONG_LAST_SEQUENCE

log = structlog.get_logger()

leaves, seals = table_of(LeafRow), table_of(SealRow)

# A transaction of so many takes some hundredths of a second, which the ledger's own may have to wait.
LEAVES_AT_ONCE = 2_000
SEALS_AT_ONCE = 500
START_AFTER_S = 3.0

COVERED = Gauge("chatrail_ledger_sealed_messages", "Messages that the newest seal covers")
NOT_SEALED = Counter("chatrail_ledger_not_sealed", "Rounds in which nothing could be sealed")


class Damaged(Exception):
    """The record is not what was sealed."""


class Rewritten(Damaged):
    """The record is not what the seals on the stream say, whatever the ledger has of it."""


class _Base(NamedTuple):
    """Where to go on: the tree over all leaves, the hash of the last of them, and the newest seal."""

    frontier: Frontier
    last: bytes | None
    newest: Sealed | None
    # Of the newest seal.
    age_s: float

    @property
    def sealed(self) -> int:
        return self.newest.head.size if self.newest else 0


class Lost(NamedTuple):
    """How many leaves and seals, and up to which message they are made anew."""

    leaves: int
    seals: int
    up_to: int


class Sealer:
    """One a replica. Of several that are at it at once the tables' keys let one go on."""

    def __init__(
        self,
        nc: Client,
        database: Database,
        *,
        keys: Keys,
        seals_file: Path | None = None,
        every_s: float,
        archive: Path | None = None,
    ) -> None:
        self._nc, self._database, self._keys, self._every_s = nc, database, keys, every_s
        self._record = Record(nc, archive)
        self._file = _Outside(seals_file) if seals_file else None

    async def run(self) -> None:
        pause_s = min(START_AFTER_S, self._every_s)
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._every_s
            try:
                pause_s = await self.seal()
            except Damaged as damage:
                NOT_SEALED.inc()
                log.error("not_sealed", reason=str(damage), to_do="make audit tells what was changed")
            except Misconfigured as problem:
                NOT_SEALED.inc()
                log.error("not_sealed", reason=str(problem))
            except (Unavailable, SQLAlchemyError, *BROKER_GONE) as error:
                NOT_SEALED.inc()
                log.warning("not_sealed_yet", error=repr(error))

    async def seal(self) -> float:
        """One round: seal what is new, if it is time, and tell of all seals. The seconds to the next round.

        Seals alone are not sealed, so that an idle stream comes to rest; but a new key is heard of at once. Raises
        Damaged.
        """
        handled, last = await self._reached()
        base = await self._database.read(_base)
        if last < base.frontier.size:
            raise Damaged(f"the stream ends at {last}, and had {base.frontier.size} messages")
        has_new_key = base.newest is not None and self._keys.key_id not in (None, _key_of(base.newest))
        if base.newest and base.age_s < self._every_s and not has_new_key:
            await self._tell()
            return self._every_s - max(0.0, base.age_s)
        _, told = await self._last_told()
        is_grown = await self._grow(base, handled, is_due=has_new_key or base.frontier.size > base.sealed)
        # What the stream has a seal of that this database lacks is sealed: it comes with what is handled next.
        if is_grown and base.frontier.size > told:
            head = Head(base.frontier.size, base.frontier.root)
            if await self._database.write(_add_seal, head, base.frontier.subtrees, self._keys.sign(head)):
                log.info("sealed", messages=head.size, root_hash=head.root.hex(), signed_by=self._keys.key_id)
        await self._tell()
        return self._every_s

    async def lost(self) -> "Lost":
        """What this database lacks of the leaves and seals that the stream tells of. Raises Rewritten where the
        record is not what those seals say, and Damaged where the database itself was changed."""
        return (await self._look_for_lost())[0]

    async def restore(self) -> "Lost":
        """Make leaves and seals anew that this database has lost, once all of the record fits the stream's seals.

        Returns what it lacked. Raises as `lost`, and Unavailable where another is at it. What is there stays.
        """
        lost, told, base = await self._look_for_lost()
        if lost.seals:
            await self._grow(base, lost.up_to, is_due=True)
            await self._database.write(_restore, base.newest, told)
        return lost

    async def _look_for_lost(self) -> tuple["Lost", list[LedgerSealed], _Base]:
        sequence, size = await self._last_told()
        base = await self._database.read(_base)
        if size <= base.sealed:
            return Lost(0, 0, 0), [], base
        read = partial(self._record.read, first=base.sealed + 1, last=sequence)
        # A seal comes after what it covers: only a second reading knows at which sizes to look at the tree.
        told = [seal async for batch in read() for seal in _seals_in(batch, above=base.sealed)]
        roots, sealed = {seal.data.tree_size: seal.data.root_hash for seal in told}, base.sealed
        frontier = (base.newest.frontier if base.newest else None) or Frontier()
        async for batch in read():
            for message in batch:
                if message.sequence != frontier.size + 1:
                    raise Rewritten(f"the stream lacks messages behind {frontier.size}")
                frontier.append(leaf_hash(message.body))
                if (root := roots.get(frontier.size)) not in (None, frontier.root.hex()):
                    raise Rewritten(f"messages {sealed + 1} to {frontier.size} of the stream are not what was sealed")
                sealed = sealed if root is None else frontier.size
        async with aclosing(self._since(base, sequence)) as behind:
            await anext(behind, None)  # the last leaf must be its message's
        return Lost(max(0, sequence - base.frontier.size), len(roots), sequence), told, base

    async def _reached(self) -> tuple[int, int]:
        """Up to where the ledger has handled all of the stream, and where the stream ends."""
        js = self._nc.jetstream()
        floor = (await js.consumer_info(STREAM, LEDGER)).ack_floor
        last = (await js.stream_info(STREAM)).state.last_seq
        return min(floor.stream_seq, last) if floor else 0, last

    async def _grow(self, base: _Base, handled: int, *, is_due: bool) -> bool:
        """Add the leaves of what is handled, if it is due or more than seals. Whether the tree is to be sealed.

        A database that is older than the stream's own seals, or new, gets them back.
        """
        told, waiting = await self._told_before(base), list[Recorded]()
        async for batch in self._since(base, handled):
            waiting += batch
            told += _seals_in(batch, above=base.sealed)
            is_due = is_due or any(message.subject != LEDGER_SEALED for message in batch)
            if is_due and len(waiting) >= LEAVES_AT_ONCE:
                await self._append(base.frontier, waiting)
                waiting = []
        if is_due and waiting:
            await self._append(base.frontier, waiting)
        if is_due and told:
            await self._database.write(_restore, base.newest, told)
        return is_due and base.sealed < base.frontier.size <= handled

    async def _told_before(self, base: _Base) -> list[LedgerSealed]:
        """Seals among the messages of leaves that no seal of ours covers: whoever made those leaves anew has died, or
        gave way to us, before it came to the seals."""
        told = list[LedgerSealed]()
        if base.sealed < base.frontier.size:
            async for batch in self._record.read(first=base.sealed + 1, last=base.frontier.size):
                told += _seals_in(batch, above=base.sealed)
        return told

    async def _since(self, base: _Base, handled: int) -> AsyncGenerator[list[Recorded]]:
        """What comes behind the last leaf, whose message must still be what it was."""
        joint = base.frontier.size
        if handled < joint or handled == joint == base.sealed:
            return
        async for batch in self._record.read(first=max(1, joint), last=handled):
            if joint:
                before, *batch = batch  # noqa: PLW2901 - the rest of it
                if before.sequence != joint or leaf_hash(before.body) != base.last:
                    raise Damaged(f"message {joint} of the stream is not what it was")
                joint = 0
            if batch:
                yield batch

    async def _append(self, frontier: Frontier, messages: list[Recorded]) -> None:
        new = [Leaf(message.sequence, event_id(message.body), leaf_hash(message.body)) for message in messages]
        if new[0].sequence != frontier.size + 1 or new[-1].sequence != frontier.size + len(new):
            raise Damaged(f"the stream lacks messages behind {frontier.size}")
        try:
            is_ours = await self._database.write(_add_leaves, new)
        except IntegrityError:
            is_ours = False
        if not is_ours:
            raise Unavailable("Another replica is sealing.")
        for leaf in new:
            frontier.append(leaf.hash or b"")

    async def _tell(self) -> None:
        """Publish the seals that the stream does not have, in their order, and write down those that the file lacks.

        Each is published once, by whoever does: the stream takes it only behind the one before.
        """
        COVERED.set(await self._database.read(_newest_size))
        js = self._nc.jetstream()
        sequence, size = await self._last_told()
        while found := await self._database.read(_after, size):
            for seal in found:
                headers = {
                    "Content-Type": CONTENT_TYPE,
                    "Nats-Expected-Last-Subject-Sequence": str(sequence),
                }
                try:
                    told = await js.publish(LEDGER_SEALED, encode(_event(seal)), stream=STREAM, headers=headers)
                except APIError as error:
                    if error.err_code == WRONG_LAST_SEQUENCE:
                        return
                    raise
                sequence, size = told.seq, seal.head.size
        if self._file:
            await self._write_down(self._file)

    async def _last_told(self) -> tuple[int, int]:
        """Where the stream has its last seal, and what that one covers."""
        try:
            message = await self._nc.jetstream().get_last_msg(STREAM, LEDGER_SEALED)
        except NotFoundError:
            return 0, 0
        try:
            return message.seq or 0, decode_seal(message.data or b"").data.tree_size
        except PoisonMessage:
            # Somebody else's. Of our own, only the newest can be new.
            size = await self._database.read(_newest_size)
            return message.seq or 0, size - 1

    async def _write_down(self, file: "_Outside") -> None:
        while found := await self._database.read(_after, await asyncio.to_thread(file.last_size)):
            await asyncio.to_thread(file.append, found)


class _Outside:
    """The file outside: each head once, in order, on disk before the next round. Replicas may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.last_size()
        except OSError as error:
            raise Misconfigured(f"CHATRAIL_SEALS_FILE {path} cannot be written: {error.strerror}.") from error

    def last_size(self) -> int:
        with self._locked() as file:
            return newest_size(end_of(file))

    def append(self, found: Sequence[Sealed]) -> None:
        with self._locked() as file:
            tail = end_of(file)
            size = newest_size(tail)
            notes = "".join(f"{checkpoint(seal.head, seal.signature)}\n" for seal in found if seal.head.size > size)
            # What a crash cut off stays, on its own.
            is_cut = not f"\n\n{tail}".endswith("\n\n")
            file.write(("\n\n" * is_cut + notes).encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _seal_in(message: Recorded) -> LedgerSealed | None:
    if message.subject != LEDGER_SEALED:
        return None
    try:
        return decode_seal(message.body)
    except PoisonMessage:
        return None


def _seals_in(messages: Iterable[Recorded], *, above: int) -> list[LedgerSealed]:
    """Of more messages than `above`."""
    return [seal for message in messages if (seal := _seal_in(message)) and seal.data.tree_size > above]


def _event(seal: Sealed) -> LedgerSealed:
    signature = seal.signature
    return LedgerSealed(
        data=Seal(
            tree_size=seal.head.size,
            root_hash=seal.head.root.hex(),
            sealed_at=datetime.fromisoformat(seal.sealed_at),
            signature=base64.b64encode(signature.signature).decode() if signature else None,
            key_id=signature.key_id if signature else None,
        )
    )


def _key_of(seal: Sealed) -> str | None:
    return seal.signature.key_id if seal.signature else None


def _base(db: Connection) -> _Base:
    """Raises Damaged."""
    newest = newest_seal(db)
    frontier = newest.frontier if newest else Frontier()
    if frontier is None:
        raise Damaged("the newest seal contradicts itself")
    sealed, last = frontier.size, None
    with closing(leaves_from(db, max(1, sealed))) as kept:
        for sequence, digest in kept:
            if sequence > sealed:
                if sequence != frontier.size + 1:
                    raise Damaged(f"leaf {frontier.size + 1} is missing")
                frontier.append(digest)
            last = digest
    if sealed and last is None:
        raise Damaged("the leaves end before the newest seal")
    age_s = (now(db) - datetime.fromisoformat(newest.sealed_at)).total_seconds() if newest else 0.0
    return _Base(frontier, last, newest, age_s)


def leaves_from(db: Connection, first: int) -> Generator[tuple[int, bytes], None, None]:
    """Sequence and hash of each, in order."""
    statement = (
        select(leaves.c.stream_sequence, leaves.c.leaf_hash)
        .where(leaves.c.stream_sequence >= first)
        .order_by(leaves.c.stream_sequence)
    )
    with db.execute(statement, execution_options={"yield_per": LEAVES_AT_ONCE}) as found:
        yield from ((row.stream_sequence, row.leaf_hash) for row in found)


def newest_seal(db: Connection) -> Sealed | None:
    """What covers most."""
    row = db.execute(select(seals).order_by(seals.c.tree_size.desc()).limit(1)).one_or_none()
    return _sealed(row) if row else None


def _newest_size(db: Connection) -> int:
    return int(db.execute(select(func.coalesce(func.max(seals.c.tree_size), 0))).scalar_one())


def _after(db: Connection, size: int) -> list[Sealed]:
    """The next seals in their order."""
    statement = select(seals).where(seals.c.tree_size > size).order_by(seals.c.tree_size).limit(SEALS_AT_ONCE)
    return [_sealed(row) for row in db.execute(statement)]


def _sealed(row: Row[Any]) -> Sealed:
    signature = Signature(row.key_id, row.signature) if row.signature is not None else None
    return Sealed(Head(row.tree_size, row.root_hash), split(row.subtrees), iso(row.sealed_at), signature)


def _add_leaves(db: Connection, new: Sequence[Leaf]) -> bool:
    """Whether these are the next ones."""
    last = db.execute(select(func.coalesce(func.max(leaves.c.stream_sequence), 0))).scalar_one()
    if last != new[0].sequence - 1:
        return False
    # In the driver's own terms: bound by name they would cost three times as much.
    if is_sqlite(db):
        db.exec_driver_sql("INSERT INTO leaves (stream_sequence, event_id, leaf_hash) VALUES (?, ?, ?)", list(new))
    else:
        db.exec_driver_sql(
            "INSERT INTO leaves (stream_sequence, event_id, leaf_hash)"
            " SELECT * FROM unnest(CAST(%s AS bigint[]), CAST(%s AS text[]), CAST(%s AS bytea[]))",
            tuple(map(list, zip(*new, strict=True))),
        )
    return True


def _add_seal(db: Connection, head: Head, subtrees: Sequence[bytes], signature: Signature | None) -> bool:
    """Whether it is the newest now."""
    if _newest_size(db) >= head.size:
        return False
    # Another replica may be between its look and its insert.
    row = _row(Sealed(head, tuple(subtrees), iso(now(db)), signature))
    return bool(insert_new(db, seals, [row], returning="tree_size"))


def _row(seal: Sealed) -> dict[str, Any]:
    return {
        "tree_size": seal.head.size,
        "root_hash": seal.head.root,
        "subtrees": b"".join(seal.subtrees),
        "sealed_at": datetime.fromisoformat(seal.sealed_at),
        "signature": seal.signature.signature if seal.signature else None,
        "key_id": seal.signature.key_id if seal.signature else None,
    }


def _restore(db: Connection, newest: Sealed | None, told: Iterable[LedgerSealed]) -> None:
    """Seals that the stream tells of and this database does not have, as far as they fit its leaves."""
    wanted = {seal.data.tree_size: seal.data for seal in told}
    known = set(
        db.execute(select(seals.c.tree_size).where(seals.c.tree_size > (newest.head.size if newest else 0))).scalars()
    )
    frontier = (newest.frontier if newest else None) or Frontier()
    rows = []
    for sequence, digest in leaves_from(db, frontier.size + 1):
        frontier.append(digest)
        seal = wanted.get(sequence)
        if seal is None or sequence in known:
            continue
        if seal.root_hash == frontier.root.hex():
            head = Head(sequence, frontier.root)
            rows.append(_row(Sealed(head, tuple(frontier.subtrees), iso(seal.sealed_at), signature_of(seal))))
        else:
            log.error("seal_not_restored", messages=sequence, to_do="make audit tells what was changed")
    # Another may restore them just now.
    if rows and (restored := insert_new(db, seals, rows, returning="tree_size")):
        log.info("seals_restored", seals=len(restored))
