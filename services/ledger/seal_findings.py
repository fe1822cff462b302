"""What a check of the seals finds: each difference, and messages and leaves without each other told apart."""

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from services.ledger.seals import Leaf, event_id
from shared.recorded import Recorded

# Of one kind each; what is beyond is counted.
DIFFERENCES_MAX = 10_000


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
    LEAF_INSERTED = "leaf inserted"
    LEAF_MOVED = "leaf moved"
    UNDECIDED = "leaf and message that differ, and nothing tells which is right"
    LEAF_STRAY = "leaf of no message that there was"
    SEAL_EDITED = "seal that does not fit the leaves"
    SEAL_SUBTREES = "seal whose subtrees are not those of its tree"
    SEAL_UNKNOWN = "seal on the stream that the ledger does not have"
    SEAL_OTHER = "seal on the stream that differs from the ledger's"
    SEAL_UNANNOUNCED = "seal that was taken off the stream"
    OUTSIDE = "seal of the file outside that does not fit"
    OUTSIDE_LACKS = "seal that the file outside lacks"
    SIGNATURE = "seal whose signature is not right"
    UNSIGNED = "seals of which none is signed"


class Difference(NamedTuple):
    """One thing that is not as it was sealed. `sequence` is the stream's; of a seal, the last that it covers."""

    kind: Kind
    sequence: int
    event_id: str | None
    expected: str
    found: str


class Result(NamedTuple):
    """What was compared: leaves, seals, those with a right signature, heads of the file outside.

    So many messages are sealed, and by what is `outside` up to its newest head; its end may be torn, as a crash
    leaves it. Beyond the differences that are listed there are `more`.
    """

    leaves: int
    seals: int
    signed: int
    outside: int
    sealed_up_to: int
    outside_up_to: int
    is_outside_torn: bool
    differences: list[Difference]
    more: int


class Findings:
    """What differs. Messages and leaves without each other are told apart in the end, when all are known."""

    def __init__(self) -> None:
        self._differences: list[Difference] = []
        self._alone: list[Leaf] = []
        self._strange: list[Leaf] = []
        # Beyond those that are kept.
        self.more = 0
        # Where the leaves were changed, and not the messages; each begins behind the one before.
        self._changed_leaves: list[range] = []
        # Where nothing tells which of them were.
        self.undecided: list[range] = []
        # Messages in whose place, as the others are shifted, a leaf is missing: its own is not the same place.
        self._lacking: list[tuple[int, Leaf]] = []

    def add(self, kind: Kind, sequence: int, event_id: str | None, expected: str, found: str) -> None:
        self._keep(self._differences, Difference(kind, sequence, event_id, expected, found))

    def no_message(self, leaf: Leaf) -> None:
        self._keep(self._alone, leaf)

    def lacks(self, sequence: int, message: Recorded, digest: bytes) -> None:
        """A leaf that is not there, and the message that would be its own."""
        self._keep(self._lacking, (sequence, Leaf(message.sequence, event_id(message.body), digest)))

    def leaves_changed(self, where: range) -> None:
        """The messages there are as they were sealed, and the leaves are not."""
        if not where:
            return
        while self._changed_leaves and self._changed_leaves[-1].stop >= where.start:
            before = self._changed_leaves.pop()
            where = range(min(before.start, where.start), max(before.stop, where.stop))
        self._changed_leaves.append(where)

    def _is_leaf_changed(self, sequence: int) -> bool:
        place = bisect_right(self._changed_leaves, sequence, key=lambda each: each.start)
        return place > 0 and sequence in self._changed_leaves[place - 1]

    def _is_undecided(self, sequence: int) -> bool:
        return any(sequence in where for where in self.undecided)

    def is_alone(self, digest: bytes) -> bool:
        """Whether a leaf has it that was passed over."""
        return any(leaf.hash == digest for leaf in self._alone)

    def no_leaf(self, message: Recorded, digest: bytes) -> None:
        self._keep(self._strange, Leaf(message.sequence, event_id(message.body), digest))

    def gap(self, sequences: range) -> None:
        for sequence in sequences[:DIFFERENCES_MAX]:
            self.add(Kind.DELETED, sequence, None, "a message", "-")
        self.more += max(0, len(sequences) - DIFFERENCES_MAX)

    def _keep(self, where: list[Any], what: Any) -> None:
        if len(where) < DIFFERENCES_MAX:
            where.append(what)
        else:
            self.more += 1

    def differences(self, *, cut_after: int, leaves: int) -> list[Difference]:
        """`leaves` is how many there are."""
        if self._is_leaf_changed(leaves):
            # Those behind the last leaf came too late for one.
            self._strange = [message for message in self._strange if message.sequence <= leaves]
        told = [*self._differences, *self._told_apart(cut_after)]
        return sorted(told, key=lambda difference: difference.sequence)

    def _told_apart(self, cut_after: int) -> Iterator[Difference]:
        alone, strange = self._alone, self._strange
        moved, alone, strange = _pair(alone, strange, lambda leaf: leaf.hash)
        for leaf, message in moved:
            yield self._moved(leaf, message)
        same_id, alone, strange = _pair(alone, strange, lambda leaf: leaf.event_id)
        same_place, alone, strange = _pair(alone, strange, lambda leaf: leaf.sequence)
        for leaf, message in [*same_id, *same_place]:
            yield self._edited(leaf, message)
        for leaf in alone:
            kind = Kind.CUT if leaf.sequence > cut_after else Kind.DELETED
            if leaf.hash is None and (self._is_leaf_changed(leaf.sequence) or self._is_undecided(leaf.sequence)):
                continue  # it is a message that lacks one, and is told
            if not self._is_leaf_changed(leaf.sequence):
                yield self._of_message(kind, leaf, in_hex(leaf.hash), "-")
            else:
                yield Difference(Kind.LEAF_INSERTED, leaf.sequence, leaf.event_id, "-", in_hex(leaf.hash))
        for message in strange:
            if self._is_leaf_changed(message.sequence):
                yield Difference(Kind.LEAF_DELETED, message.sequence, message.event_id, in_hex(message.hash), "-")
            else:
                yield self._of_message(Kind.INSERTED, message, "-", in_hex(message.hash))
        for sequence, message in self._lacking:
            is_shifted = self._is_leaf_changed(sequence)
            if not is_shifted or self._is_leaf_changed(message.sequence):
                place = message.sequence if is_shifted else sequence
                yield Difference(Kind.LEAF_DELETED, place, message.event_id, in_hex(message.hash), "-")

    def _of_message(self, kind: Kind, leaf: Leaf, expected: str, found: str) -> Difference:
        kind = Kind.UNDECIDED if self._is_undecided(leaf.sequence) else kind
        return Difference(kind, leaf.sequence, leaf.event_id, expected, found)

    def _moved(self, leaf: Leaf, message: Leaf) -> Difference:
        at_leaf, at_message = f"at {leaf.sequence}", f"at {message.sequence}"
        if self._is_leaf_changed(leaf.sequence) or self._is_leaf_changed(message.sequence):
            return Difference(Kind.LEAF_MOVED, message.sequence, message.event_id, at_message, at_leaf)
        return self._of_message(Kind.MOVED, leaf, at_leaf, at_message)

    def _edited(self, leaf: Leaf, message: Leaf) -> Difference:
        told = leaf._replace(event_id=leaf.event_id or message.event_id)
        by_leaf, by_message = in_hex(leaf.hash), in_hex(message.hash)
        if leaf.hash is None:
            return Difference(Kind.LEAF_DELETED, leaf.sequence, told.event_id, by_message, "-")
        if self._is_leaf_changed(message.sequence):
            return Difference(Kind.LEAF_EDITED, message.sequence, told.event_id, by_message, by_leaf)
        return self._of_message(Kind.EDITED, told, by_leaf, by_message)


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


def in_hex(digest: bytes | None) -> str:
    """As people read it; a dash where there is none."""
    return digest.hex() if digest else "-"
