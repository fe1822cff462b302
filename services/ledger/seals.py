"""Kept so that a change of the record is found: a leaf for each message, and sealed heads of the tree over them.

Leaf i of the tree (RFC 9162) is the body of the message with stream sequence i + 1. An audit that reads the stream in
order hands what it reads to `Seals` and gets what differs:

    seals = await Seals.begin(database, known_up_to=last, keys=keys, seals_file=settings.seals_file)
    async for batch in recorded(nc, first=1, last=max(last, seals.last_sequence)):
        await seals.add(batch)
    result = await seals.end()
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from shared.database import Database
from shared.recorded import Recorded


class Kind(StrEnum):
    """What can be wrong, and with what."""

    EDITED = "message edited"
    DELETED = "message deleted"
    INSERTED = "message inserted"
    REORDERED = "message moved"
    CUT = "messages cut off at the end"
    LEAF_EDITED = "leaf edited"
    LEAF_DELETED = "leaf deleted"
    LEAVES_CUT = "leaves cut off at the end"
    SEAL_EDITED = "seal differs from the leaves"
    SEAL_UNKNOWN = "seal on the stream that the ledger does not have"
    SEAL_OTHER = "seal on the stream that differs from the ledger's"
    SEAL_UNANNOUNCED = "seal that the stream does not have"
    OUTSIDE = "seal of the file outside that does not fit"
    SIGNATURE = "seal with a signature that is not right"


class Difference(NamedTuple):
    """One thing that is not as it was sealed. `sequence` is the stream's; of a seal, the last that it covers."""

    kind: Kind
    sequence: int
    event_id: str | None
    expected: str
    found: str


class Result(NamedTuple):
    """`more` differences were found beyond those that are listed."""

    leaves: int
    seals: int
    signed: int
    outside: int
    differences: list[Difference]
    more: int


class Seals:
    """The tamper evidence, compared with a stream that is read once, in order. Memory does not grow with either."""

    # Read at least so far: the ledger has leaves up to here.
    last_sequence: int

    @classmethod
    async def begin(
        cls,
        database: Database,
        *,
        known_up_to: int,
        keys: Sequence[Any] = (),
        seals_file: Path | None = None,
    ) -> "Seals":
        """`known_up_to` is the stream's last sequence, asked for before this is called."""
        raise NotImplementedError

    async def add(self, batch: Sequence[Recorded]) -> None:
        """The next messages of the stream, beginning with its first."""
        raise NotImplementedError

    async def end(self) -> Result:
        """To be called once, after the last message."""
        raise NotImplementedError
