"""Leaves and seals as the ledger's database has them: where to go on, and what is added to them."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection, Row, func, select
from sqlalchemy.exc import DataError

from services.ledger.checkpoint import Signature
from services.ledger.merkle import Frontier, Head
from services.ledger.seals import Leaf, Sealed, signature_of, split
from services.ledger.store import leaves, seals
from shared.database import insert_new, is_sqlite, iso, now
from shared.events import LedgerSealed

log = structlog.get_logger()

# A transaction of so many takes some hundredths of a second, which the ledger's own may have to wait.
LEAVES_AT_ONCE = 2_000
SEALS_AT_ONCE = 500


class Damaged(Exception):
    """The record is not what was sealed."""


class Base(NamedTuple):
    """Where to go on: the tree over all leaves, the hash of the last of them, and the newest seal."""

    frontier: Frontier
    last: bytes | None
    newest: Sealed | None
    # Of the newest seal.
    age_s: float

    @property
    def sealed(self) -> int:
        return self.newest.head.size if self.newest else 0


def base(db: Connection) -> Base:
    """Raises Damaged."""
    newest = newest_seal(db)
    with _as_written("the newest seal"):
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
    return Base(frontier, last, newest, age_s)


def leaves_from(db: Connection, first: int) -> Generator[tuple[int, bytes], None, None]:
    """Sequence and hash of each, in order. Raises Damaged."""
    statement = (
        select(leaves.c.stream_sequence, leaves.c.leaf_hash)
        .where(leaves.c.stream_sequence >= first)
        .order_by(leaves.c.stream_sequence)
    )
    with _as_written("a leaf"), db.execute(statement, execution_options={"yield_per": LEAVES_AT_ONCE}) as found:
        for sequence, digest in found:
            if not isinstance(digest, bytes):
                raise Damaged(f"leaf {sequence} is no hash")
            yield sequence, digest


def newest_seal(db: Connection) -> Sealed | None:
    """What covers most. Raises Damaged."""
    with _as_written("the newest seal"):
        row = db.execute(select(seals).order_by(seals.c.tree_size.desc()).limit(1)).one_or_none()
        return _sealed(row) if row else None


@contextmanager
def _as_written(what: str) -> Iterator[None]:
    """Raises Damaged where somebody made of it what cannot be read: SQLite keeps any text in any column, and
    PostgreSQL has times that Python has no word for."""
    try:
        yield
    except (ValueError, TypeError, DataError) as error:
        raise Damaged(f"{what} is none that could be read") from error


def newest_sealed(db: Connection) -> int:
    return int(db.execute(select(func.coalesce(func.max(seals.c.tree_size), 0))).scalar_one())


def seals_after(db: Connection, size: int) -> list[Sealed]:
    """The next seals in their order. Raises Damaged."""
    statement = select(seals).where(seals.c.tree_size > size).order_by(seals.c.tree_size).limit(SEALS_AT_ONCE)
    with _as_written("a seal"):
        return [_sealed(row) for row in db.execute(statement)]


def _sealed(row: Row[Any]) -> Sealed:
    signature = Signature(row.key_id, row.signature) if row.signature is not None else None
    return Sealed(Head(row.tree_size, row.root_hash), split(row.subtrees), iso(row.sealed_at), signature)


def add_leaves(db: Connection, new: Sequence[Leaf]) -> bool:
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


def add_seal(db: Connection, head: Head, subtrees: Sequence[bytes], signature: Signature | None) -> bool:
    """Whether it is the newest now."""
    if newest_sealed(db) >= head.size:
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


def restore(db: Connection, newest: Sealed | None, told: Iterable[LedgerSealed]) -> None:
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
