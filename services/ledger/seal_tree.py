"""The tree over the leaves, held against its seals: the ledger's, the stream's, and those of the file outside."""

import sys
from collections import deque
from collections.abc import Iterator

from services.ledger.checkpoint import Keys, Signature, checkpoint
from services.ledger.merkle import Frontier, Head
from services.ledger.seal_findings import Findings, Kind, in_hex
from services.ledger.seal_ways import Accused, Way
from services.ledger.seals import Sealed, event_id, signature_of
from services.ledger.seals_file import Torn
from services.ledger.verify_record import Checkpoint
from shared.database import iso
from shared.errors import PoisonMessage
from shared.events import decode_seal
from shared.recorded import Recorded

# How many heads may be between one of the file outside and its repetition: replicas that shared it wrote both.
AGAIN_WITHIN = 100
# Seals that are taken for changed together with their leaves, until one that is told of on the stream is not.
RIVAL_SEALS_MAX = 1_000
# How many places leaves and messages may be apart, and what is in whose place is still known.
APART_MAX = 10_000


class SealTree:
    """The tree over the leaves, held against the seals as it grows past them.

    Where they differ, it grows in several ways at once: with the leaves, with the messages in place of those leaves,
    and from the seal itself. The next seal tells which of them was right, or before that the event that tells of the
    seal, where it is what its leaf says.
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
        self._seals, self._upcoming = seals, deque[Sealed]()
        # Seals that the stream has not told of yet.
        self.unannounced: dict[int, Sealed] = {}
        # The end of the file outside, until a seal is met whose beginning it is.
        self._torn: str | None = None
        self.is_outside_torn = False
        self._outside = outside
        self._next_outside = self._following_outside()
        self._keys, self._found = keys, found
        # The first is believed as long as no other fits better. Where they are one tree, it is the trunk.
        self._ways = [Way(Frontier())]
        self._trunk = self._ways[0].leaves
        self._is_lost = False
        # The size of the seal of which the ways say different things; what was told of seals that are not met yet.
        self._doubted = 0
        self._told: dict[int, tuple[bytes, bool | None]] = {}
        self._fitting = self.sealed_up_to = self.outside_up_to = 0
        self._last_signature: Signature | None = None
        self._misfits_outside = 0
        self._outside_up_to, self._last_outside = outside_up_to, 0
        # Seals that the file outside should have and does not.
        self._lacking: list[Head] = []
        self._fitted_outside = deque[tuple[int, bytes]](maxlen=AGAIN_WITHIN)
        self._next = self._following_seal()

    def grow(self, leaf: bytes | None, message: bytes | None) -> None:
        """`message` is what the stream has in the leaf's place: the same, another, or None where it has nothing."""
        if leaf and leaf == message and self._trunk:
            self._trunk.append(leaf)
        else:
            for way in self._ways:
                way.grow(leaf, message)
            self._find_trunk()
        self.size += 1
        met = self._next if self._next and self._next.head.size == self.size else None
        if not met and self._next_outside is None:
            return
        roots = self._roots() if met or self._reaches_outside() else []
        if met:
            self._meet(met)
            self._next = self._following_seal()
            roots += self._roots()
        if self._next_outside is not None:
            self._meet_outside(roots)
        if met and self.size <= self._outside_up_to and self._last_outside != self.size:
            self._lacking.append(met.head)

    def lose(self) -> None:
        """Leaves and messages are too far apart to say what is in whose place: no seal is held against them."""
        self._is_lost = True
        self._found.undecided.append(range(self._fitting + 1, sys.maxsize))
        self._go_on([Way(None)])

    def announced(self, size: int, *, sequence: int) -> Sealed | None:
        """The seal of so many messages that the ledger has, once it is told of in this place."""
        while size <= sequence + APART_MAX and (not self._upcoming or self._upcoming[-1].head.size < size):
            if not self._read_seal():
                break
        return self.unannounced.pop(size, None)

    def tell(self, size: int, root: bytes, *, is_believed: bool | None) -> None:
        """What the stream says of a seal. It is believed where it is as its leaf, or rightly signed, and None where
        it has no leaf yet."""
        if size > self.size:
            self._told[size] = (root, is_believed)
        elif size == self._doubted and is_believed is not False:
            self._decide(root, has_leaf=bool(is_believed))

    def _decide(self, root: bytes, *, has_leaf: bool) -> None:
        first, rival = self._ways[0], next((way for way in self._ways if way.root_before == root), None)
        if rival is None or (rival is not first and rival.is_lost):
            return
        if rival is not first and not has_leaf and not first.accused:
            # Leaves and seal say this, the messages and the seal's event that.
            rival.is_undecided = True
            return
        self._believe(rival)
        self._go_on([rival])

    def _roots(self) -> list[bytes]:
        return [root for way in self._ways for root in way.roots()]

    def _go_on(self, ways: list[Way], *, doubted: int = 0) -> None:
        if len(ways) == 1:
            ways[0].settle()
        self._ways, self._doubted = ways, doubted
        self._find_trunk()

    def _find_trunk(self) -> None:
        first = self._ways[0]
        self._trunk = first.leaves if len(self._ways) == 1 and first.messages is None else None

    def _following_seal(self) -> Sealed | None:
        if not self._upcoming and not self._read_seal():
            return None
        return self._upcoming.popleft()

    def _read_seal(self) -> bool:
        if seal := next(self._seals, None):
            self._upcoming.append(seal)
            self.unannounced[seal.head.size] = seal
        return seal is not None

    def _meet(self, seal: Sealed) -> None:
        self.seals += 1
        is_signed = self._check_signature(seal)
        if self._torn and checkpoint(seal.head, seal.signature).startswith(self._torn.rstrip("\ufffd")):
            self._torn, self.is_outside_torn = None, True
        if not self._is_lost:
            self._judge(seal, is_signed=is_signed)
        self.sealed_up_to = seal.head.size
        if told := self._told.pop(seal.head.size, None):
            self.tell(seal.head.size, told[0], is_believed=told[1])

    def _judge(self, seal: Sealed, *, is_signed: bool) -> None:
        root = seal.head.root
        way = next((way for way in self._ways if root in way.roots()), None)
        if way is None:
            self._doubt(seal)
            return
        self._believe(way)
        self._fitting = seal.head.size
        leaves, messages = way.leaves, way.messages
        if messages and messages.root == root:
            self._found.leaves_changed(way.differing)
            self._compare_subtrees(seal, messages)
            self._go_on([Way(messages)])
            return
        if leaves:
            self._compare_subtrees(seal, leaves)
        ways = [Way(leaves, root_before=root)]
        is_confirmed = is_signed or self._root_outside() == root
        if not is_confirmed and (rival := self._rival(way, self._accused(Kind.SEAL_EDITED, seal))):
            ways.append(rival)
        self._go_on(ways, doubted=self.size)
        if len(ways) > 1 and (outside := self._root_outside()):
            self._decide(outside, has_leaf=True)

    def _rival(self, believed: Way, edited: Accused) -> Way | None:
        """That the leaves were changed, and this seal with them; perhaps those before it, too."""
        others = [way for way in self._ways if way is not believed and way.changed_leaves]
        way = others[0] if others and len(others[0].accused) < RIVAL_SEALS_MAX else believed
        messages = way.messages or (way.leaves if way is not believed else None)
        if messages is None:
            return None
        accused = [each for each in way.accused if each not in believed.accused]
        since = way.differing.start if way is believed else way.changed_leaves.start
        changed = range(since, self.size + 1)
        return Way(messages, root_before=messages.root, accused=[*accused, edited], changed_leaves=changed)

    def _compare_subtrees(self, seal: Sealed, tree: Frontier) -> None:
        if list(seal.subtrees) != tree.subtrees:
            expected, found = (b"".join(subtrees) for subtrees in (tree.subtrees, seal.subtrees))
            self._found.add(Kind.SEAL_SUBTREES, self.size, None, in_hex(expected), in_hex(found))

    def _doubt(self, seal: Sealed) -> None:
        """Either the seal was changed, or what is below it."""
        first = self._ways[0]
        self._believe(first)
        edited = self._accused(Kind.SEAL_EDITED, seal)
        rewritten = self._accused(Kind.REWRITTEN, seal)
        ways = [Way(seal.frontier, root_before=seal.head.root, accused=[rewritten] if first.leaves else ())]
        if rival := self._rival(first, edited):
            # Where a leaf is missing, that was told already: the seal is believed, for the time being.
            ways.insert(0 if first.leaves else 1, rival)
        if first.leaves:
            ways.insert(0, Way(first.leaves, root_before=first.leaves.root, accused=[edited]))
        self._go_on(ways, doubted=self.size)
        if outside := self._root_outside():
            self._decide(outside, has_leaf=True)

    def _believe(self, way: Way) -> None:
        for kind, size, expected in way.accused:
            self._found.add(kind, size, None, expected, "others")
        self._found.leaves_changed(way.changed_leaves)

    def _accused(self, kind: Kind, seal: Sealed) -> Accused:
        below = f"messages {self._fitting + 1} to {seal.head.size}"
        return Accused(kind, seal.head.size, f"{below} as sealed, {in_hex(seal.head.root)}")

    def _check_signature(self, seal: Sealed) -> bool:
        """Whether it is rightly signed, by a key that is believed."""
        signature, signed = seal.signature, self.signed
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
        return self.signed > signed

    def _bad_signature(self, head: Head, found: str) -> None:
        self._found.add(Kind.SIGNATURE, head.size, None, "a signature by a key that is believed", found)

    def _following_outside(self) -> Checkpoint | str | None:
        following = next(self._outside, None)
        if isinstance(following, Torn):
            self._torn, following = following, None
        return following

    def _reaches_outside(self) -> bool:
        head = self._next_outside
        return isinstance(head, Checkpoint) and head.tree_size == self.size

    def _root_outside(self) -> bytes | None:
        """What the file outside says of a tree of this size."""
        head = self._next_outside
        return head.root_hash if isinstance(head, Checkpoint) and head.tree_size == self.size else None

    def _meet_outside(self, roots: list[bytes]) -> None:
        while (head := self._next_outside) is not None and (isinstance(head, str) or head.tree_size <= self.size):
            self.outside += 1
            if isinstance(head, str):
                self._no_head_outside()
            else:
                self._compare_outside(head, roots)
            self._next_outside = self._following_outside()

    def _no_head_outside(self) -> None:
        self._found.add(Kind.OUTSIDE, self.size, None, "a checkpoint", "something else")

    def _compare_outside(self, head: Checkpoint, roots: list[bytes]) -> None:
        self._last_outside = max(self._last_outside, head.tree_size)
        if not any(way.leaves or way.messages for way in self._ways):
            return
        told = (head.tree_size, head.root_hash)
        if head.tree_size == self.size and head.root_hash in roots:
            self._fitted_outside.append(told)
            self.outside_up_to = head.tree_size
        elif told not in self._fitted_outside:  # else it was written down a second time
            self._misfit_outside(head, in_hex(roots[0]) if head.tree_size == self.size else "a later place")
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
        self._believe(self._ways[0])
        for way in self._ways:
            if way.is_undecided:
                self._found.undecided.append(way.changed_leaves)
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

    def __init__(self, tree: SealTree, keys: Keys, known_up_to: int, found: Findings) -> None:
        self._tree, self._keys, self._known_up_to, self._found = tree, keys, known_up_to, found

    def take(self, message: Recorded, *, has_leaf: bool | None) -> None:
        """`has_leaf`: whether its leaf is its own; None where it has none yet."""
        try:
            told = decode_seal(message.body)
        except PoisonMessage:
            self._found.add(Kind.SEAL_UNKNOWN, message.sequence, event_id(message.body), "a seal", "something else")
            return
        seal = told.data
        kept = self._tree.announced(seal.tree_size, sequence=message.sequence)
        # They are published in order.
        before = seal.tree_size if kept else min(seal.tree_size, self._tree.size + 1)
        for size in [size for size in self._tree.unannounced if size < before]:
            passed_over = self._tree.unannounced.pop(size)
            self._found.add(Kind.SEAL_UNANNOUNCED, size, None, in_hex(passed_over.head.root), "-")
        found = f"sealed at {iso(seal.sealed_at)}, {seal.root_hash}"
        if kept is None:
            if message.sequence <= self._known_up_to:
                self._found.add(Kind.SEAL_UNKNOWN, seal.tree_size, told.id, "-", found)
            return
        head, signature = Head(seal.tree_size, bytes.fromhex(seal.root_hash)), signature_of(seal)
        if head != kept.head and signature and self._keys and self._keys.is_right(head, signature):
            has_leaf = True
        self._tree.tell(head.size, head.root, is_believed=has_leaf)
        expected = f"sealed at {kept.sealed_at}, {in_hex(kept.head.root)}"
        if (expected, kept.signature) != (found, signature):
            self._found.add(Kind.SEAL_OTHER, seal.tree_size, told.id, expected, found)
