"""What a check of the seals finds: each difference, and messages and leaves without each other told apart."""

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
        # Where the leaves were changed, and not the messages.
        self.changed_leaves: list[range] = []

    def add(self, kind: Kind, sequence: int, event_id: str | None, expected: str, found: str) -> None:
        self._keep(self._differences, Difference(kind, sequence, event_id, expected, found))

    def no_message(self, leaf: Leaf) -> None:
        self._keep(self._alone, leaf)

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

    def differences(self, *, cut_after: int) -> list[Difference]:
        told = [*self._differences, *self._told_apart(cut_after)]
        return sorted(told, key=lambda difference: difference.sequence)

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
            yield Difference(kind, leaf.sequence, leaf.event_id, in_hex(leaf.hash), "-")
        for message in strange:
            yield Difference(Kind.INSERTED, message.sequence, message.event_id, "-", in_hex(message.hash))

    def _edited(self, leaf: Leaf, message: Leaf) -> Difference:
        expected, found, kind = leaf.hash, message.hash, Kind.EDITED
        if leaf.hash is None:
            kind = Kind.LEAF_DELETED
        elif any(leaf.sequence in leaves for leaves in self.changed_leaves):
            expected, found, kind = message.hash, leaf.hash, Kind.LEAF_EDITED
        return Difference(kind, leaf.sequence, leaf.event_id or message.event_id, in_hex(expected), in_hex(found))


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
