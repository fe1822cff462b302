"""The check of the record: each message of the stream beside its leaf, and the tree over the leaves below its seals.

An audit hands the record, as it reads it from its beginning, to a `SealCheck`, and is told what is not as it was
sealed:

    check = seal_check(snapshot.rows, known_up_to=floors[LEDGER], keys=load_keys(path), seals_file=path)
    first, last = await record.bounds()
    async for batch in record.read(first=first, last=last):
        check.take(batch)
    result = check.end()
"""

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from services.ledger.checkpoint import Keys
from services.ledger.merkle import leaf_hash
from services.ledger.seal_findings import Findings, Kind, Result, in_hex
from services.ledger.seal_tree import APART_MAX, Announced, SealTree
from services.ledger.seals import Leaf, Rows, Sealed, event_id, in_order, kept_leaves, sealed_after
from services.ledger.seals_file import read_outside
from services.ledger.verify_record import Checkpoint
from shared.recorded import Recorded
from shared.streams import LEDGER_SEALED

# Messages that do not fit are held against so many leaves before they are told to be others.
LOOKAHEAD = 2_000


def seal_check(
    rows: Rows,
    *,
    known_up_to: int,
    keys: Keys | None = None,
    seals_file: Path | None = None,
    seals_file_bytes: int | None = None,
    seals_file_up_to: int = 0,
) -> "SealCheck":
    """Of a ledger's database. Raises Misconfigured when the file outside cannot be read.

    `known_up_to` is a sequence that the stream had before the database was read: seals on it up to there are known.
    So much of the file is read as it had before that, too, and each seal of up to so many messages must be in it. To
    where the stream is read is to be asked after that: all that has a leaf is on it by then.
    """
    ((sealed,),) = rows("SELECT coalesce(max(tree_size), 0) FROM seals")
    return SealCheck(
        leaves=kept_leaves(rows),
        sealed_up_to=sealed,
        seals=sealed_after(rows, 0),
        outside=read_outside(seals_file, up_to=seals_file_bytes) if seals_file else (),
        outside_up_to=seals_file_up_to,
        keys=keys,
        known_up_to=known_up_to,
    )


class _Message(NamedTuple):
    hash: bytes
    message: Recorded


class _Places:
    """Leaves and messages by their place, whichever of them belong together: as the tree is to have them.

    Where some were inserted or left out, those are kept that are ahead, up to APART_MAX.
    """

    def __init__(self, tree: SealTree) -> None:
        self._tree = tree
        self._leaves = deque[bytes | None]()
        self._messages = deque[tuple[int, bytes]]()
        # The stream has told what it has up to there.
        self._told_up_to = 0
        self._is_lost = False

    def take_both(self, sequence: int, digest: bytes, *, leaf_at: int) -> None:
        """A message and its leaf, which may be in another place."""
        if sequence == leaf_at and not self._leaves and not self._messages:
            self._told_up_to = sequence
            self._tree.grow(digest, digest)
        else:
            self._leaves.append(digest)
            self.take_message(sequence, digest)

    def take_leaf(self, digest: bytes | None) -> None:
        self._leaves.append(digest)
        self._grow()

    def take_message(self, sequence: int, digest: bytes) -> None:
        self._told_up_to = sequence
        if not self._is_lost:
            self._messages.append((sequence, digest))
        self._grow()

    def take_late(self, sequence: int, digest: bytes) -> None:
        """After all leaves: it counts where one of them is in its place."""
        if self._leaves:
            self.take_message(sequence, digest)

    def pass_over(self, sequence: int) -> None:
        """The stream leaves out what is before that."""
        self._told_up_to = sequence - 1
        self._grow()

    def end(self) -> None:
        """No more messages."""
        self._told_up_to = sys.maxsize
        self._grow()

    def _grow(self) -> None:
        leaves, messages, tree = self._leaves, self._messages, self._tree
        while leaves:
            place = tree.size + 1
            if messages and messages[0][0] == place:
                message = messages.popleft()[1]
            elif place <= self._told_up_to or self._is_lost:
                message = None
            else:
                break
            tree.grow(leaves.popleft(), message)
        if max(len(leaves), len(messages)) > APART_MAX:
            self._is_lost = True
            tree.lose()
            messages.clear()


class SealCheck:
    """Messages beside leaves, leaves below seals. Memory grows with what differs, and with nothing else."""

    def __init__(
        self,
        *,
        leaves: Iterable[Leaf],
        sealed_up_to: int,
        seals: Iterable[Sealed],
        outside: Iterable[Checkpoint | str] = (),
        outside_up_to: int = 0,
        keys: Keys | None = None,
        known_up_to: int,
    ) -> None:
        self._found, keys = Findings(), keys or Keys(None, {})
        self._tree = SealTree(iter(seals), iter(outside), keys, self._found, outside_up_to=outside_up_to)
        self._announced = Announced(self._tree, keys, known_up_to, self._found)
        self._places = _Places(self._tree)
        self._strays: list[Leaf] = []
        self._leaves = in_order(leaves, self._strays, sealed_up_to=sealed_up_to, known_up_to=known_up_to)
        self._ahead = deque[Leaf]()
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
        self._places.end()
        tree, found = self._tree, self._found
        for stray in self._strays:
            found.add(Kind.LEAF_STRAY, stray.sequence, stray.event_id, "-", in_hex(stray.hash))
        tree.end()
        differences = found.differences(cut_after=last_leaf, leaves=tree.size)
        return Result(
            leaves=tree.size,
            seals=tree.seals,
            signed=tree.signed,
            outside=tree.outside,
            sealed_up_to=tree.sealed_up_to,
            outside_up_to=tree.outside_up_to,
            is_outside_torn=tree.is_outside_torn,
            differences=differences,
            more=found.more,
        )

    def _pass_over(self, sequence: int) -> None:
        """The leaves of the numbers that the stream leaves out before this one."""
        self._places.pass_over(sequence)
        while (ahead := self._look_ahead()) and ahead[0].sequence + self._shift < sequence:
            self._take_apart([], [leaf for leaf in ahead if leaf.sequence + self._shift < sequence])

    def _fits(self, arrived: _Message) -> bool:
        """Whether it is the next leaf's, or comes after all leaves."""
        sequence = arrived.message.sequence
        leaf = self._ahead.popleft() if self._ahead else next(self._leaves, None)
        if leaf is None:
            if self._found.is_alone(arrived.hash):
                self._found.no_leaf(arrived.message, arrived.hash)
            elif self._last_message:
                self._found.gap(range(self._last_message + 1, sequence))
            self._places.take_late(sequence, arrived.hash)
            self._consumed(arrived, has_leaf=None)
            return True
        if leaf.hash == arrived.hash:
            self._shift = sequence - leaf.sequence
            self._compare_ids(leaf, arrived.message)
        elif leaf.hash is None and sequence - self._shift == leaf.sequence:
            self._found.lacks(leaf.sequence, arrived.message, arrived.hash)
        else:
            self._ahead.appendleft(leaf)
            return False
        self._places.take_both(sequence, arrived.hash, leaf_at=leaf.sequence)
        self._last_leaf = leaf.sequence
        self._consumed(arrived, has_leaf=leaf.hash is not None)
        return True

    def _compare_ids(self, leaf: Leaf, message: Recorded) -> None:
        # As our services write it, it can be seen without a parser.
        if isinstance(leaf.event_id, str) and f'"id":"{leaf.event_id}"'.encode() in message.body:
            return
        if (expected := event_id(message.body)) != leaf.event_id:
            self._found.add(Kind.LEAF_EDITED, leaf.sequence, expected, f"of {expected}", f"of {leaf.event_id}")

    def _consumed(self, arrived: _Message, *, has_leaf: bool | None) -> None:
        self._last_message = arrived.message.sequence
        if arrived.message.subject == LEDGER_SEALED:
            self._announced.take(arrived.message, has_leaf=has_leaf)

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
        for leaf in leaves:
            self._found.no_message(leaf)
            self._places.take_leaf(leaf.hash)
        for arrived in messages:
            self._found.no_leaf(arrived.message, arrived.hash)
            self._places.take_message(arrived.message.sequence, arrived.hash)
            is_seal = arrived.message.subject == LEDGER_SEALED
            self._consumed(arrived, has_leaf=is_seal and self._found.is_alone(arrived.hash))
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
