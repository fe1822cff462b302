"""What the ledger keeps so that a change of the record is found: a leaf for each message, sealed heads of the tree.

Leaf i of the tree (RFC 9162) is the body of the message with stream sequence i + 1.
"""

import base64
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from pydantic_core import from_json

from services.ledger.checkpoint import Signature
from services.ledger.merkle import Frontier, Head
from shared.database import iso
from shared.events import Seal

PAGE_SIZE = 5_000
HASH_BYTES = 32
SEQUENCE_MIN = -(2**63)
ID_CHARS_MAX = 128

# What a statement finds, in the driver's own terms; a `?` in it stands for a value.
Rows = Callable[..., Iterator[tuple[Any, ...]]]


class Leaf(NamedTuple):
    """Of a message of the stream. The hash is None where the ledger should have it and does not."""

    sequence: int
    event_id: str | None
    hash: bytes | None


class Sealed(NamedTuple):
    """A seal as the ledger keeps it."""

    head: Head
    subtrees: tuple[bytes, ...]
    sealed_at: str
    signature: Signature | None

    @property
    def frontier(self) -> Frontier | None:
        """To go on from here; None where head and subtrees contradict each other."""
        frontier = Frontier(self.head.size, self.subtrees)
        fits = len(self.subtrees) == self.head.size.bit_count() and frontier.root == self.head.root
        return frontier if fits else None


def event_id(body: bytes) -> str | None:
    """What the body says; None when it is no event, or the id is none that a database would take."""
    try:
        told = from_json(body)["id"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    is_one = isinstance(told, str) and len(told) <= ID_CHARS_MAX and "\0" not in told
    return told if is_one else None


def kept_leaves(rows: Rows) -> Iterator[Leaf]:
    """As the database has them. What is no hash in it is none of any message."""
    statement = (
        "SELECT stream_sequence, event_id, leaf_hash FROM leaves WHERE stream_sequence > ?"
        " ORDER BY stream_sequence LIMIT ?"
    )
    for sequence, event_id, digest in paged(rows, statement, SEQUENCE_MIN):
        yield Leaf(sequence, event_id, _as_bytes(digest))


def in_order(leaves: Iterable[Leaf], strays: list[Leaf], *, sealed_up_to: int, known_up_to: int) -> Iterator[Leaf]:
    """All that are sealed, or before one that is there; those that are not there without a hash.

    Behind what is `known`, leaves follow each other without a gap. Others are `strays`, once they have been passed.
    """
    expected = 1
    for leaf in leaves:
        if leaf.sequence < 1 or leaf.sequence > max(expected, sealed_up_to + 1, known_up_to + 1):
            strays.append(leaf)
            continue
        for sequence in range(expected, leaf.sequence):
            yield Leaf(sequence, None, None)
        yield leaf
        expected = leaf.sequence + 1
    for sequence in range(expected, sealed_up_to + 1):
        yield Leaf(sequence, None, None)


def sealed_after(rows: Rows, size: int) -> Iterator[Sealed]:
    """Those that cover more, in their order."""
    # PostgreSQL has times that Python has no word for.
    at = "CASE WHEN sealed_at BETWEEN '0001-01-02' AND '9999-12-31' THEN sealed_at END"
    statement = (
        f"SELECT tree_size, root_hash, subtrees, {at}, signature, key_id FROM seals WHERE tree_size > ?"  # noqa: S608
        " ORDER BY tree_size LIMIT ?"
    )
    for tree_size, root, subtrees, at, signature, key_id in paged(rows, statement, size):
        yield Sealed(
            Head(tree_size, _as_bytes(root)),
            split(_as_bytes(subtrees)),
            iso(at) if isinstance(at, datetime) else str(at),
            None if signature is None and key_id is None else Signature(str(key_id), _as_bytes(signature)),
        )


def _as_bytes(found: Any) -> bytes:
    return found if isinstance(found, bytes) else str(found).encode()


def paged(rows: Rows, statement: str, after: int = 0) -> Iterator[tuple[Any, ...]]:
    """What a statement finds behind a key, page by page; its values are the key and the size of a page."""
    while page := list(rows(statement, after, PAGE_SIZE)):
        yield from page
        after = page[-1][0]


def split(subtrees: bytes) -> tuple[bytes, ...]:
    """As the table `seals` keeps the roots of a tree's full subtrees."""
    return tuple(subtrees[start : start + HASH_BYTES] for start in range(0, len(subtrees), HASH_BYTES))


def signature_of(seal: Seal) -> Signature | None:
    if seal.signature is None or seal.key_id is None:
        return None
    return Signature(seal.key_id, base64.b64decode(seal.signature))
