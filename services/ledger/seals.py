"""Kept so that a change of the record is found: a leaf for each message, and sealed heads of the tree over them.

Leaf i of the tree (RFC 9162) is the body of the message with stream sequence i + 1. An audit hands the record, as it
reads it from its beginning, to a `SealCheck`, and is told what is not as it was sealed:

    check = seal_check(snapshot.rows, known_up_to=floors[LEDGER], keys=load_keys(path), seals_file=path)
    first, last = await record.bounds()
    async for batch in record.read(first=first, last=last):
        check.take(batch)
    result = check.end()
"""

import base64
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from services.ledger.checkpoint import Keys, Signature
from services.ledger.merkle import Frontier, Head, leaf_hash
from services.ledger.verify_record import Checkpoint, notes_in, read_checkpoint
from shared.database import iso
from shared.errors import Misconfigured, PoisonMessage
from shared.events import Seal, decode_seal
from shared.recorded import Recorded
from shared.streams import LEDGER_SEALED

# Messages that do not fit are held against so many leaves before they are told to be others.
LOOKAHEAD = 2_000
# Of one kind each; what is beyond is counted.
DIFFERENCES_MAX = 10_000
PAGE_SIZE = 5_000
HASH_BYTES = 32
ID_CHARS_MAX = 128

# What a statement finds, in the driver's own terms; a `?` in it stands for a value.
Rows = Callable[..., Iterator[tuple[Any, ...]]]


class Kind(StrEnum):
    """What can be wrong, and with what."""

    EDITED = "message edited"
    DELETED = "message deleted"
    INSERTED = "message inserted"
    MOVED = "message moved"
    CUT = "message cut off the end"
    REWRITTEN = "messages changed together with their leaves"
    LEAF_EDITED = "leaf edited"
    LEAF_DELETED = "leaf deleted"
    SEAL_EDITED = "seal that does not fit the leaves"
    SEAL_UNKNOWN = "seal on the stream that the ledger does not have"
    SEAL_OTHER = "seal on the stream that differs from the ledger's"
    SEAL_UNANNOUNCED = "seal that was taken off the stream"
    OUTSIDE = "seal of the file outside that does not fit"
    SIGNATURE = "seal whose signature is not right"


class Difference(NamedTuple):
    """One thing that is not as it was sealed. `sequence` is the stream's; of a seal, the last that it covers."""

    kind: Kind
    sequence: int
    event_id: str | None
    expected: str
    found: str


class Result(NamedTuple):
    """What was compared: leaves, seals, those with a right signature, heads of the file outside.

    Beyond the differences that are listed there are `more`.
    """

    leaves: int
    seals: int
    signed: int
    outside: int
    differences: list[Difference]
    more: int


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


def seal_check(
    rows: Rows, *, known_up_to: int, keys: Keys | None = None, seals_file: Path | None = None
) -> "SealCheck":
    """Of a ledger's database. Raises Misconfigured when the file outside cannot be read.

    `known_up_to` is a sequence that the stream had before the database was read: seals on it up to there are known.
    To where the stream is read is to be asked after that: all that has a leaf is on it by then.
    """
    ((leaves,),) = rows("SELECT coalesce(max(stream_sequence), 0) FROM leaves")
    ((sealed,),) = rows("SELECT coalesce(max(tree_size), 0) FROM seals")
    return SealCheck(
        leaves=_leaves(rows, max(leaves, sealed)),
        seals=sealed_after(rows, 0),
        outside=read_outside(seals_file) if seals_file else (),
        keys=keys,
        known_up_to=known_up_to,
    )


def _leaves(rows: Rows, last: int) -> Iterator[Leaf]:
    statement = (
        "SELECT stream_sequence, event_id, leaf_hash FROM leaves WHERE stream_sequence > ?"
        " ORDER BY stream_sequence LIMIT ?"
    )
    return with_holes((Leaf(*row) for row in paged(rows, statement)), last)


def with_holes(leaves: Iterable[Leaf], last: int) -> Iterator[Leaf]:
    """All up to `last`; those that are not there without a hash."""
    expected = 1
    for leaf in leaves:
        for sequence in range(expected, leaf.sequence):
            yield Leaf(sequence, None, None)
        yield leaf
        expected = leaf.sequence + 1
    for sequence in range(expected, last + 1):
        yield Leaf(sequence, None, None)


def sealed_after(rows: Rows, size: int) -> Iterator[Sealed]:
    """Those that cover more, in their order."""
    statement = (
        "SELECT tree_size, root_hash, subtrees, sealed_at, signature, key_id FROM seals WHERE tree_size > ?"
        " ORDER BY tree_size LIMIT ?"
    )
    for tree_size, root, subtrees, at, signature, key_id in paged(rows, statement, size):
        yield Sealed(
            Head(tree_size, root),
            split(subtrees),
            iso(at) if isinstance(at, datetime) else at,
            Signature(key_id, signature) if signature is not None and key_id is not None else None,
        )


def paged(rows: Rows, statement: str, after: int = 0) -> Iterator[tuple[Any, ...]]:
    """What a statement finds behind a key, page by page; its values are the key and the size of a page."""
    while page := list(rows(statement, after, PAGE_SIZE)):
        yield from page
        after = page[-1][0]


def split(subtrees: bytes) -> tuple[bytes, ...]:
    """As the table `seals` keeps the roots of a tree's full subtrees."""
    return tuple(subtrees[start : start + HASH_BYTES] for start in range(0, len(subtrees), HASH_BYTES))


def read_outside(seals_file: Path) -> Iterator[Checkpoint | str]:
    """The file's heads in order, or the text that is none. What a crash cut off, and what follows whole, is one."""
    try:
        with seals_file.open(encoding="utf-8", errors="replace") as file:
            for note, following in pairwise(chain(notes_in(file), [""])):
                if note != following and following.startswith(note.rstrip("\n\ufffd")):
                    continue
                try:
                    yield read_checkpoint(note)
                except ValueError:
                    yield note
    except OSError as error:
        raise Misconfigured(f"CHATRAIL_SEALS_FILE {seals_file} cannot be read: {error.strerror}.") from error


class _Message(NamedTuple):
    hash: bytes
    message: Recorded


class SealCheck:
    """Messages beside leaves, leaves below seals. Memory grows with what differs, and with nothing else."""

    def __init__(
        self,
        *,
        leaves: Iterator[Leaf],
        seals: Iterable[Sealed],
        outside: Iterable[Checkpoint | str] = (),
        keys: Keys | None = None,
        known_up_to: int,
    ) -> None:
        self._found = _Found()
        self._tree = _Tree(iter(seals), iter(outside), keys or Keys(None, {}), self._found)
        self._announced = _Announced(self._tree, known_up_to, self._found)
        self._leaves, self._ahead = leaves, deque[Leaf]()
        self._waiting = deque[_Message]()
        # How far a message is behind its own leaf, where others were inserted or left out before it.
        self._shift = 0
        self._last_leaf = self._last_message = self._last_taken = 0

    def take(self, batch: Sequence[Recorded]) -> None:
        """The next messages of the stream, beginning with its first."""
        for message in batch:
            if message.sequence != self._last_taken + 1 and not self._waiting:
                self._pass_over(message.sequence)
            self._last_taken = message.sequence
            arrived = _Message(leaf_hash(message.body), message)
            if self._waiting or not self._fits(arrived):
                self._waiting.append(arrived)
                if len(self._waiting) >= LOOKAHEAD:
                    self._realign()

    def end(self) -> Result:
        """To be called once, after the last message."""
        while self._waiting:
            self._realign()
        last_leaf = self._last_leaf
        while rest := self._look_ahead():
            self._take_apart([], rest)
        self._tree.end()
        return self._found.result(self._tree, cut_after=last_leaf)

    def _pass_over(self, sequence: int) -> None:
        """The leaves of the numbers that the stream leaves out before this one."""
        while (ahead := self._look_ahead()) and ahead[0].sequence + self._shift < sequence:
            self._take_apart([], [leaf for leaf in ahead if leaf.sequence + self._shift < sequence])

    def _fits(self, arrived: _Message) -> bool:
        """Whether it is the next leaf's, or comes after all leaves."""
        sequence = arrived.message.sequence
        leaf = self._ahead.popleft() if self._ahead else next(self._leaves, None)
        if leaf is None:
            if self._found.is_alone(arrived.hash):
                self._found.no_leaf(arrived)
            elif self._last_message:
                self._found.gap(range(self._last_message + 1, sequence))
            self._consumed(arrived)
            return True
        if leaf.hash == arrived.hash:
            self._shift = sequence - leaf.sequence
        elif leaf.hash is None and sequence - self._shift == leaf.sequence:
            self._found.add(
                Kind.LEAF_DELETED, leaf.sequence, event_id(arrived.message.body), _told(arrived.hash), "-"
            )
        else:
            self._ahead.appendleft(leaf)
            return False
        self._tree.grow(arrived.hash, arrived.hash)
        self._last_leaf = leaf.sequence
        self._consumed(arrived)
        return True

    def _consumed(self, arrived: _Message) -> None:
        self._last_message = arrived.message.sequence
        if arrived.message.subject == LEDGER_SEALED:
            self._announced.take(arrived.message)

    def _look_ahead(self) -> list[Leaf]:
        self._ahead.extend(islice(self._leaves, LOOKAHEAD - len(self._ahead)))
        return list(self._ahead)

    def _realign(self) -> None:
        """Find the nearest place from which on messages and leaves are the same again, and go on from there."""
        leaves = self._look_ahead()
        messages, missing = _nearest(self._waiting, leaves) or self._no_place(leaves)
        self._take_apart([self._waiting.popleft() for _ in range(messages)], leaves[:missing])
        while self._waiting and self._fits(self._waiting[0]):
            self._waiting.popleft()

    def _no_place(self, leaves: list[Leaf]) -> tuple[int, int]:
        if len(leaves) == LOOKAHEAD:
            return len(self._waiting), len(leaves)
        # The last leaves are among them: what came after those is not sealed yet.
        last = leaves[-1].sequence if leaves else 0
        return sum(waiting.message.sequence - self._shift <= last for waiting in self._waiting), len(leaves)

    def _take_apart(self, messages: list[_Message], leaves: list[Leaf]) -> None:
        """These messages have no such leaves, and these leaves no such messages."""
        for _ in leaves:
            self._ahead.popleft()
        beside = messages if len(messages) == len(leaves) else [None] * len(leaves)
        for leaf, message in zip(leaves, beside, strict=True):
            self._found.no_message(leaf)
            self._tree.grow(leaf.hash, message.hash if message else None)
        for message in messages:
            self._found.no_leaf(message)
            self._consumed(message)
        if leaves:
            self._last_message = max(self._last_message, leaves[-1].sequence + self._shift)


def _nearest(messages: Iterable[_Message], leaves: Sequence[Leaf]) -> tuple[int, int] | None:
    """How many messages and leaves to leave out, as few as possible, so that the next of both are the same."""
    places: dict[bytes | None, int] = {}
    for place, leaf in enumerate(leaves):
        places.setdefault(leaf.hash, place)
    best: tuple[int, int] | None = None
    for number, message in enumerate(messages):
        if best and number >= sum(best):
            break
        beside = places.get(message.hash)
        if beside is not None and (best is None or number + beside < sum(best)):
            best = (number, beside)
    return best


class _Found:
    """What differs. Messages and leaves without each other are told apart in the end, when all are known."""

    def __init__(self) -> None:
        self._differences: list[Difference] = []
        self._alone: list[Leaf] = []
        self._strange: list[Leaf] = []
        self._more = 0
        # Where the leaves were changed, and not the messages.
        self.changed_leaves: list[range] = []

    def add(self, kind: Kind, sequence: int, event_id: str | None, expected: str, found: str) -> None:
        self._keep(self._differences, Difference(kind, sequence, event_id, expected, found))

    def no_message(self, leaf: Leaf) -> None:
        self._keep(self._alone, leaf)

    def is_alone(self, digest: bytes) -> bool:
        """Whether a leaf has it that was passed over."""
        return any(leaf.hash == digest for leaf in self._alone)

    def no_leaf(self, arrived: _Message) -> None:
        message = arrived.message
        self._keep(self._strange, Leaf(message.sequence, event_id(message.body), arrived.hash))

    def gap(self, sequences: range) -> None:
        for sequence in sequences[:DIFFERENCES_MAX]:
            self.add(Kind.DELETED, sequence, None, "a message", "-")
        self._more += max(0, len(sequences) - DIFFERENCES_MAX)

    def _keep(self, where: list[Any], what: Any) -> None:
        if len(where) < DIFFERENCES_MAX:
            where.append(what)
        else:
            self._more += 1

    def result(self, tree: "_Tree", *, cut_after: int) -> Result:
        told = [*self._differences, *self._told_apart(cut_after)]
        told.sort(key=lambda difference: difference.sequence)
        return Result(tree.size, tree.seals, tree.signed, tree.outside, told, self._more)

    def _told_apart(self, cut_after: int) -> Iterator[Difference]:
        alone, strange = self._alone, self._strange
        moved, alone, strange = _pair(alone, strange, lambda leaf: leaf.hash)
        for leaf, message in moved:
            yield Difference(
                Kind.MOVED, leaf.sequence, leaf.event_id, f"at {leaf.sequence}", f"at {message.sequence}"
            )
        same_id, alone, strange = _pair(alone, strange, lambda leaf: leaf.event_id)
        same_place, alone, strange = _pair(alone, strange, lambda leaf: leaf.sequence)
        for leaf, message in [*same_id, *same_place]:
            yield self._edited(leaf, message)
        for leaf in alone:
            kind = Kind.CUT if leaf.sequence > cut_after else Kind.DELETED
            yield Difference(kind, leaf.sequence, leaf.event_id, _told(leaf.hash), "-")
        for message in strange:
            yield Difference(Kind.INSERTED, message.sequence, message.event_id, "-", _told(message.hash))

    def _edited(self, leaf: Leaf, message: Leaf) -> Difference:
        expected, found, kind = leaf.hash, message.hash, Kind.EDITED
        if leaf.hash is None:
            kind = Kind.LEAF_DELETED
        elif any(leaf.sequence in leaves for leaves in self.changed_leaves):
            expected, found, kind = message.hash, leaf.hash, Kind.LEAF_EDITED
        return Difference(kind, leaf.sequence, leaf.event_id or message.event_id, _told(expected), _told(found))


def _pair(
    alone: list[Leaf], strange: list[Leaf], key: Callable[[Leaf], Any]
) -> tuple[list[tuple[Leaf, Leaf]], list[Leaf], list[Leaf]]:
    """Those that have the key in common, and what is left of both."""
    by_key: defaultdict[Any, deque[Leaf]] = defaultdict(deque)
    for message in strange:
        if key(message) is not None:
            by_key[key(message)].append(message)
    pairs, left = [], []
    for leaf in alone:
        if key(leaf) is not None and (same := by_key.get(key(leaf))):
            pairs.append((leaf, same.popleft()))
        else:
            left.append(leaf)
    paired = {id(message) for _, message in pairs}
    return pairs, left, [message for message in strange if id(message) not in paired]


class _Tree:
    """The tree over the leaves, held against the seals as it grows past them.

    Where they differ, it grows in several ways at once: with the leaves, with the messages in place of those leaves,
    and from the seal itself. The next seal tells which of them was right.
    """

    def __init__(
        self, seals: Iterator[Sealed], outside: Iterator[Checkpoint | str], keys: Keys, found: _Found
    ) -> None:
        self.size = self.seals = self.signed = self.outside = 0
        self._seals, self._next = seals, next(seals, None)
        self._outside, self._next_outside = outside, next(outside, None)
        self._keys, self._found = keys, found
        self._as_leaves: Frontier | None = Frontier()
        self._as_messages: Frontier | None = None
        self._as_sealed: Frontier | None = None
        self._fitting = self._last_sealed = 0
        # A seal that does not fit, until it is known whether it or what is below it was changed.
        self._doubted: Sealed | None = None
        self._last_signature: Signature | None = None
        self._misfits_outside = 0
        # Seals that the stream has not told of yet.
        self.unannounced: dict[int, Sealed] = {}

    def grow(self, leaf: bytes | None, message: bytes | None) -> None:
        """`message` is what the stream has in place of the leaf: the same, another, or None where nobody knows."""
        if leaf != message or self._as_messages:
            self._grow_as_messages(message)
        if leaf is None:
            self._as_leaves = self._as_sealed = None
        else:
            if self._as_leaves:
                self._as_leaves.append(leaf)
            if self._as_sealed:
                self._as_sealed.append(leaf)
        self.size += 1
        if self._next and self._next.head.size == self.size:
            self._meet(self._next)
            self._next = next(self._seals, None)
        if self._next_outside is not None:
            self._meet_outside()

    def _grow_as_messages(self, message: bytes | None) -> None:
        if self._as_messages is None and self._as_leaves and self._as_leaves.size == self.size:
            self._as_messages = Frontier(self.size, self._as_leaves.subtrees)
        if message is None:
            # Another number of messages than of leaves: they cannot stand in their place.
            self._as_messages = None
        elif self._as_messages and self._as_messages.size == self.size:
            self._as_messages.append(message)

    def _meet(self, seal: Sealed) -> None:
        self.seals += 1
        self.unannounced[seal.head.size] = seal
        self._check_signature(seal)
        root = seal.head.root
        below = range(self._last_sealed + 1, seal.head.size + 1)
        is_known = self._as_leaves is not None
        if self._as_leaves and self._as_leaves.root == root:
            self._resolve(Kind.SEAL_EDITED)
        elif self._as_messages and self._as_messages.size == seal.head.size and self._as_messages.root == root:
            self._found.changed_leaves.append(below)
            self._as_leaves = self._as_messages
        elif self._as_sealed and self._as_sealed.root == root:
            self._resolve(Kind.REWRITTEN)
            self._as_leaves = self._as_sealed
        else:
            self._doubt(seal, is_known=is_known)
            self._last_sealed = seal.head.size
            self._as_messages = None
            return
        self._as_messages = self._as_sealed = None
        self._fitting = self._last_sealed = seal.head.size

    def _doubt(self, seal: Sealed, *, is_known: bool) -> None:
        if not is_known:
            # A leaf is missing, as was told already: go on from here.
            self._as_leaves = seal.frontier
            return
        self._resolve(Kind.SEAL_EDITED)
        self._doubted = seal
        self._as_sealed = seal.frontier

    def _resolve(self, kind: Kind) -> None:
        if seal := self._doubted:
            below = f"messages {self._fitting + 1} to {seal.head.size}"
            self._found.add(kind, seal.head.size, None, f"{below} as sealed, {_told(seal.head.root)}", "others")
            self._doubted = None

    def _check_signature(self, seal: Sealed) -> None:
        signature = seal.signature
        if signature is None:
            if self._last_signature:
                self._bad_signature(seal.head, "no signature")
        elif not self._keys:
            pass
        elif self._keys.is_right(seal.head, signature):
            self.signed += 1
        else:
            self._bad_signature(seal.head, f"one of key {signature.key_id}")
        self._last_signature = signature or self._last_signature

    def _bad_signature(self, head: Head, found: str) -> None:
        self._found.add(Kind.SIGNATURE, head.size, None, "a signature by a key that is believed", found)

    def _meet_outside(self) -> None:
        while (head := self._next_outside) is not None and (isinstance(head, str) or head.tree_size <= self.size):
            self.outside += 1
            if isinstance(head, str):
                self._found.add(Kind.OUTSIDE, self.size, None, "a checkpoint", "something else")
            else:
                self._compare_outside(head)
            self._next_outside = next(self._outside, None)

    def _compare_outside(self, head: Checkpoint) -> None:
        ways = [way for way in (self._as_leaves, self._as_messages, self._as_sealed) if way]
        if not ways:
            return
        if head.tree_size != self.size or all(way.root != head.root_hash for way in ways):
            self._misfit_outside(head, _told(ways[0].root) if head.tree_size == self.size else "a later place")
        for key_id, made in head.signatures:
            signature = Signature(key_id, made)
            if self._keys and not self._keys.is_right(Head(head.tree_size, head.root_hash), signature):
                self._bad_signature(Head(head.tree_size, head.root_hash), f"one of key {key_id}, in the file outside")

    def _misfit_outside(self, head: Checkpoint, found: str) -> None:
        """After the first that does not fit, none does: the others are counted."""
        if not self._misfits_outside:
            self._found.add(Kind.OUTSIDE, head.tree_size, None, _told(head.root_hash), found)
        self._misfits_outside += 1

    def end(self) -> None:
        self._resolve(Kind.SEAL_EDITED)
        if self._keys and self.seals and self._last_signature is None:
            self._found.add(Kind.SIGNATURE, self._last_sealed, None, "a signature by a key that is believed", "none")
        while (head := self._next_outside) is not None:
            self.outside += 1
            if not isinstance(head, str):
                self._misfit_outside(head, f"only {self.size} leaves")
            self._next_outside = next(self._outside, None)


class _Announced:
    """The seals that the stream tells of, held against those that the ledger keeps."""

    def __init__(self, tree: _Tree, known_up_to: int, found: _Found) -> None:
        self._tree, self._known_up_to, self._found = tree, known_up_to, found

    def take(self, message: Recorded) -> None:
        try:
            told = decode_seal(message.body)
        except PoisonMessage:
            self._found.add(Kind.SEAL_UNKNOWN, message.sequence, event_id(message.body), "a seal", "something else")
            return
        seal = told.data
        kept = self._tree.unannounced.pop(seal.tree_size, None)
        # They are published in order.
        for size in [size for size in self._tree.unannounced if size < seal.tree_size]:
            passed_over = self._tree.unannounced.pop(size)
            self._found.add(Kind.SEAL_UNANNOUNCED, size, None, _told(passed_over.head.root), "-")
        found = f"{seal.root_hash}, sealed at {iso(seal.sealed_at)}"
        if kept is None:
            if message.sequence <= self._known_up_to:
                self._found.add(Kind.SEAL_UNKNOWN, seal.tree_size, told.id, "-", found)
            return
        expected = f"{_told(kept.head.root)}, sealed at {kept.sealed_at}"
        if (expected, kept.signature) != (found, signature_of(seal)):
            self._found.add(Kind.SEAL_OTHER, seal.tree_size, told.id, expected, found)


def signature_of(seal: Seal) -> Signature | None:
    if seal.signature is None or seal.key_id is None:
        return None
    return Signature(seal.key_id, base64.b64decode(seal.signature))


def _told(digest: bytes | None) -> str:
    return digest.hex() if digest else "-"
