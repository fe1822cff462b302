"""A quarantine, where an audit looks for messages that cannot be read, and for events that are in no table."""

import hashlib
from collections.abc import Iterator, Sequence

from services.ledger.findings import Difference
from services.ledger.snapshots import Snapshot
from shared.recorded import Recorded


class Quarantine:
    """What a service could not handle. It has acknowledged the stream up to its `floor`."""

    def __init__(self, service: str, snapshot: Snapshot, floor: int) -> None:
        self._service, self._snapshot, self._floor = service, snapshot, floor
        self._find = f"SELECT body_sha256 FROM quarantine WHERE {snapshot.listed('body_sha256')}"  # noqa: S608

    def among(self, messages: Sequence[Recorded]) -> set[str]:
        """The hashes of those that are in it."""
        if not messages:
            return set()
        return {row[0] for row in self._snapshot.find(self._find, [sha256_of(message) for message in messages])}

    def lacking(self, unreadable: Sequence[Recorded]) -> Iterator[Difference]:
        """Of messages that cannot be read, those that should be in it and are not."""
        due = [message for message in unreadable if message.sequence <= self._floor]
        kept = self.among(due)
        for message in due:
            if (sha256 := sha256_of(message)) not in kept:
                expected = {"sequence": message.sequence, "sha256": sha256}
                yield Difference(f"{self._service}.quarantine", "unreadable", None, None, expected, None)


def sha256_of(message: Recorded) -> str:
    return hashlib.sha256(message.body).hexdigest()
