"""The tree over the leaves, held against its seals: the ledger's, the stream's, and those of the file outside."""

from collections import deque
from collections.abc import Iterator

from services.ledger.checkpoint import Keys, Signature, checkpoint
from services.ledger.merkle import Frontier, Head
from services.ledger.seal_findings import Findings, Kind, in_hex
from services.ledger.seals import Sealed, event_id, signature_of
from services.ledger.seals_file import Torn
from services.ledger.verify_record import Checkpoint
from shared.database import iso
from shared.errors import PoisonMessage
from shared.events import decode_seal
from shared.recorded import Recorded

# How many heads may be between one of the file outside and its repetition: replicas that shared it wrote both.
AGAIN_WITHIN = 100


class SealTree:
    """The tree over the leaves, held against the seals as it grows past them.

    Where they differ, it grows in several ways at once: with the leaves, with the messages in place of those leaves,
    and from the seal itself. The next seal tells which of them was right.
    """

    def __init__(
        self,
        seals: Iterator[Sealed],
        outside: Iterator[Checkpoint | str],
        keys: Keys,
        found: Findings,
        *,
        outside_up_to: int = 0,
    ) -> None:
        """Each seal of so many messages, or of fewer, must be `outside`."""
        self.size = self.seals = self.signed = self.outside = 0
        self._seals, self._next = seals, next(seals, None)
        # The end of the file outside, until a seal is met whose beginning it is.
        self._torn: str | None = None
        self.is_outside_torn = False
        self._outside = outside
        self._next_outside = self._following_outside()
        self._keys, self._found = keys, found
        self._as_leaves: Frontier | None = Frontier()
        self._as_messages: Frontier | None = None
        self._as_sealed: Frontier | None = None
        self._fitting = self.sealed_up_to = self.outside_up_to = 0
        # A seal that does not fit, until it is known whether it or what is below it was changed.
        self._doubted: Sealed | None = None
        self._last_signature: Signature | None = None
        self._misfits_outside = 0
        self._outside_up_to, self._last_outside = outside_up_to, 0
        # Seals that the file outside should have and does not.
        self._lacking: list[Head] = []
        self._fitted_outside = deque[tuple[int, bytes]](maxlen=AGAIN_WITHIN)
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
        met = self._next if self._next and self._next.head.size == self.size else None
        if met:
            self._meet(met)
            self._next = next(self._seals, None)
        if self._next_outside is not None:
            self._meet_outside()
        if met and self.size <= self._outside_up_to and self._last_outside != self.size:
            self._lacking.append(met.head)

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
        if self._torn and checkpoint(seal.head, seal.signature).startswith(self._torn.rstrip("\ufffd")):
            self._torn, self.is_outside_torn = None, True
        root = seal.head.root
        below = range(self.sealed_up_to + 1, seal.head.size + 1)
        is_known = self._as_leaves is not None
        if self._as_leaves and self._as_leaves.root == root:
            self._resolve(Kind.SEAL_EDITED)
            if list(seal.subtrees) != self._as_leaves.subtrees:
                expected, found = (b"".join(subtrees) for subtrees in (self._as_leaves.subtrees, seal.subtrees))
                self._found.add(Kind.SEAL_SUBTREES, self.size, None, in_hex(expected), in_hex(found))
        elif self._as_messages and self._as_messages.size == seal.head.size and self._as_messages.root == root:
            self._found.changed_leaves.append(below)
            self._as_leaves = self._as_messages
        elif self._as_sealed and self._as_sealed.root == root:
            self._resolve(Kind.REWRITTEN)
            self._as_leaves = self._as_sealed
        else:
            self._doubt(seal, is_known=is_known)
            self.sealed_up_to = seal.head.size
            self._as_messages = None
            return
        self._as_messages = self._as_sealed = None
        self._fitting = self.sealed_up_to = seal.head.size

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
            self._found.add(kind, seal.head.size, None, f"{below} as sealed, {in_hex(seal.head.root)}", "others")
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

    def _following_outside(self) -> Checkpoint | str | None:
        following = next(self._outside, None)
        if isinstance(following, Torn):
            self._torn, following = following, None
        return following

    def _meet_outside(self) -> None:
        while (head := self._next_outside) is not None and (isinstance(head, str) or head.tree_size <= self.size):
            self.outside += 1
            if isinstance(head, str):
                self._no_head_outside()
            else:
                self._compare_outside(head)
            self._next_outside = self._following_outside()

    def _no_head_outside(self) -> None:
        self._found.add(Kind.OUTSIDE, self.size, None, "a checkpoint", "something else")

    def _compare_outside(self, head: Checkpoint) -> None:
        self._last_outside = max(self._last_outside, head.tree_size)
        ways = [way for way in (self._as_leaves, self._as_messages, self._as_sealed) if way]
        if not ways:
            return
        told = (head.tree_size, head.root_hash)
        if head.tree_size == self.size and any(way.root == head.root_hash for way in ways):
            self._fitted_outside.append(told)
            self.outside_up_to = head.tree_size
        elif told not in self._fitted_outside:  # else it was written down a second time
            self._misfit_outside(head, in_hex(ways[0].root) if head.tree_size == self.size else "a later place")
        for key_id, made in head.signatures:
            signature = Signature(key_id, made)
            if self._keys and not self._keys.is_right(Head(head.tree_size, head.root_hash), signature):
                self._bad_signature(Head(head.tree_size, head.root_hash), f"one of key {key_id}, in the file outside")

    def _misfit_outside(self, head: Checkpoint, found: str) -> None:
        """After the first that does not fit, none does: the others are counted."""
        if not self._misfits_outside:
            self._found.add(Kind.OUTSIDE, head.tree_size, None, in_hex(head.root_hash), found)
        self._misfits_outside += 1

    def end(self) -> None:
        self._resolve(Kind.SEAL_EDITED)
        if self._keys and self.seals and self._last_signature is None:
            self._found.add(Kind.UNSIGNED, self.sealed_up_to, None, "a signature by a key that is believed", "none")
        while (head := self._next_outside) is not None:
            self.outside += 1
            if isinstance(head, str):
                self._no_head_outside()
            else:
                self._misfit_outside(head, f"only {self.size} leaves")
            self._next_outside = self._following_outside()
        if self._torn:
            self._no_head_outside()
        for lacking in self._lacking if not self._misfits_outside else []:
            self._found.add(Kind.OUTSIDE_LACKS, lacking.size, None, in_hex(lacking.root), "-")


class Announced:
    """The seals that the stream tells of, held against those that the ledger keeps."""

    def __init__(self, tree: SealTree, known_up_to: int, found: Findings) -> None:
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
            self._found.add(Kind.SEAL_UNANNOUNCED, size, None, in_hex(passed_over.head.root), "-")
        found = f"sealed at {iso(seal.sealed_at)}, {seal.root_hash}"
        if kept is None:
            if message.sequence <= self._known_up_to:
                self._found.add(Kind.SEAL_UNKNOWN, seal.tree_size, told.id, "-", found)
            return
        expected = f"sealed at {kept.sealed_at}, {in_hex(kept.head.root)}"
        if (expected, kept.signature) != (found, signature_of(seal)):
            self._found.add(Kind.SEAL_OTHER, seal.tree_size, told.id, expected, found)
