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
        self._explained = set[str]()
        ((self._rows,),) = snapshot.rows("SELECT count(*) FROM quarantine")
        self._find = f"SELECT body_sha256 FROM quarantine WHERE {snapshot.listed('body_sha256')}"  # noqa: S608

    def explained_by(self, messages: Sequence[Recorded]) -> None:
        """All messages of the stream, batch by batch: what else is in it was put there by somebody."""
        if self._rows:
            self._explained |= self.among(messages)

    def not_as_sent(self) -> Iterator[Difference]:
        """Bodies that are on the stream in no message, as it is known by then."""
        where = f"{self._service}.quarantine"
        for sha256, body in self._snapshot.rows("SELECT body_sha256, body FROM quarantine"):
            found = hashlib.sha256(body if isinstance(body, bytes) else str(body).encode()).hexdigest()
            if sha256 not in self._explained:
                yield Difference(where, "forged", None, None, None, {"sha256": sha256})
            elif found != sha256:
                yield Difference(where, "forged", None, None, {"sha256": sha256}, {"sha256": found})

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
