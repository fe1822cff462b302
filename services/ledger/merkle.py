"""The Merkle tree of RFC 9162, section 2.1, with SHA-256: one hash that stands for all entries and their order.

A proof is a list of the roots of subtrees. Which ones, as ranges of leaves, is told here (`inclusion`,
`consistency`); their roots are computed from the leaves, wherever those are kept (`roots_of`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

from services.ledger.verify_record import leaf_hash, node_hash, verify_inclusion

__all__ = ["Frontier", "consistency", "inclusion", "leaf_hash", "roots_of", "verify_consistency", "verify_inclusion"]

_NONE: frozenset[range] = frozenset()
_OF_NOTHING = hashlib.sha256(b"").digest()


class Frontier:
    """A tree that grows to the right: the roots of its full subtrees, largest first, are all that appending needs."""

    def __init__(self, size: int = 0, subtrees: Iterable[bytes] = ()) -> None:
        self.size, self.subtrees = size, list(subtrees)

    def append(self, leaf: bytes) -> None:
        """`leaf` is a leaf's hash."""
        self.size += 1
        size, joined = self.size, leaf
        while size % 2 == 0:
            joined = node_hash(self.subtrees.pop(), joined)
            size //= 2
        self.subtrees.append(joined)

    @property
    def root(self) -> bytes:
        if not self.subtrees:
            return _OF_NOTHING
        *larger, root = self.subtrees
        for subtree in reversed(larger):
            root = node_hash(subtree, root)
        return root


def inclusion(index: int, size: int) -> list[range]:
    """PATH (2.1.3.1): the subtrees that prove leaf `index` to be in the tree of `size` leaves, bottom up."""
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    path: list[range] = []
    leaves = range(size)
    while len(leaves) > 1:
        left, right = _split(leaves)
        leaves, beside = (left, right) if index in left else (right, left)
        path.append(beside)
    return path[::-1]


def consistency(older: int, newer: int) -> list[range]:
    """PROOF (2.1.4.1): the subtrees that prove the tree of `older` leaves to be the beginning of that of `newer`."""
    if not 0 < older <= newer:
        raise ValueError(f"a tree of {older} leaves is not the beginning of one of {newer}")
    path: list[range] = []
    leaves, is_known = range(newer), True
    while leaves.stop != older:
        left, right = _split(leaves)
        if older <= left.stop:
            leaves, beside = left, right
        else:
            leaves, beside, is_known = right, left, False
        path.append(beside)
    return ([] if is_known else [leaves]) + path[::-1]


def roots_of(subtrees: Sequence[range], leaves: Iterable[bytes]) -> list[bytes]:
    """The root of each subtree, in one pass over all leaves' hashes: of one path, or of many at once."""
    due: defaultdict[int, set[range]] = defaultdict(set)
    for subtree in subtrees:
        due[subtree.stop].add(subtree)
    roots: dict[range, bytes] = {}
    # The full subtrees so far, largest first: where each begins, and its root.
    full: list[tuple[int, bytes]] = []
    for index, leaf in enumerate(leaves):
        if not due:
            break
        ending = due.pop(index + 1, _NONE)
        start, root, size = index, leaf, index + 1
        while size % 2 == 0:
            if ending and range(start, index + 1) in ending:
                roots[range(start, index + 1)] = root
            start, left = full.pop()
            root, size = node_hash(left, root), size // 2
        full.append((start, root))
        if ending:
            roots |= _ending(full, index + 1, ending)
    if due:
        raise ValueError(f"there are no leaves up to {max(due)}")
    return [roots[subtree] for subtree in subtrees]


def _ending(full: list[tuple[int, bytes]], stop: int, subtrees: Set[range]) -> dict[range, bytes]:
    """Of the subtrees that end here, those that begin where one of the full ones does: the right edge of a tree."""
    found: dict[range, bytes] = {}
    root = None
    for start, left in reversed(full):
        root = left if root is None else node_hash(left, root)
        if range(start, stop) in subtrees:
            found[range(start, stop)] = root
    return found


class Head(NamedTuple):
    """A tree, told in a few bytes."""

    size: int
    root: bytes


def verify_consistency(older: Head, newer: Head, path: Sequence[bytes]) -> bool:
    """Whether the newer tree begins with all that the older one had (2.1.4.2)."""
    if older.size == newer.size:
        return not path and older.root == newer.root
    if not 0 < older.size < newer.size or not path:
        return False
    steps = list(path) if older.size & (older.size - 1) else [older.root, *path]
    fn, sn = older.size - 1, newer.size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = steps[0]
    for step in steps[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            fr, sr = node_hash(step, fr), node_hash(step, sr)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            sr = node_hash(sr, step)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and fr == older.root and sr == newer.root


def _split(leaves: range) -> tuple[range, range]:
    """At the largest power of two that leaves something on the right."""
    middle = leaves.start + (1 << (len(leaves) - 1).bit_length() - 1)
    return range(leaves.start, middle), range(middle, leaves.stop)
