"""Accounts of the tree that cannot all be true, of which the next seal tells the right one."""

from collections.abc import Sequence
from typing import NamedTuple

from services.ledger.merkle import Frontier
from services.ledger.seal_findings import Kind


class Accused(NamedTuple):
    """A seal, if an account is the right one."""

    kind: Kind
    size: int
    expected: str


class Way:
    """One account: where it begins, and from there on the tree of the leaves and the tree of the messages.

    As long as they are the same, there is one tree. `root_before` is what the account says of the last seal that is
    in doubt, `accused` and `changed_leaves` what is wrong if it is right.
    """

    def __init__(
        self,
        start: Frontier | None,
        *,
        root_before: bytes | None = None,
        accused: Sequence[Accused] = (),
        changed_leaves: range = range(0),
    ) -> None:
        self.leaves = start
        # None while they are as the leaves, and where one is missing.
        self.messages: Frontier | None = None
        self.root_before, self.accused, self.changed_leaves = root_before, accused, changed_leaves
        # Whether as much speaks for it as against it.
        self.is_undecided = False
        self._split_at = 0

    @property
    def is_lost(self) -> bool:
        return self.leaves is None and self.messages is None

    def settle(self) -> None:
        """It is believed, and what it says was told."""
        self.root_before, self.accused, self.changed_leaves = None, (), range(0)

    def grow(self, leaf: bytes | None, message: bytes | None) -> None:
        if message is None:
            self.messages = None
        elif self.messages:
            self.messages.append(message)
        elif leaf != message and self.leaves:
            self._split_at = self.leaves.size
            self.messages = Frontier(self.leaves.size, self.leaves.subtrees)
            self.messages.append(message)
        if leaf is None:
            self.leaves = None
        elif self.leaves:
            self.leaves.append(leaf)

    def roots(self) -> list[bytes]:
        return [tree.root for tree in (self.leaves, self.messages) if tree]

    @property
    def differing(self) -> range:
        """The sequences since leaves and messages are not the same."""
        return range(self._split_at + 1, self.messages.size + 1) if self.messages else range(0)
