"""The truth to hold a ledger against: every generation that was begun, and the tokens really given to it."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic_core import from_json, to_json

Outcome: TypeAlias = Literal["completed", "failed", "disconnected"]
OUTCOMES: tuple[Outcome, ...] = ("completed", "failed", "disconnected")
SUMMED = (
    "inputTokens",
    "outputTokens",
    "cacheCreationInputTokens",
    "cacheReadInputTokens",
    "tokens",
)


class Given:
    """Append-only. Records outlive the process when they have a file; the two counts of requests do not."""

    def __init__(self, file: Path | None = None) -> None:
        self.message_requests = 0
        self.count_tokens_calls = 0
        # Kept as they are written: a bench leaves millions, and they are read back as a whole or not at all.
        self._lines: list[bytes] = []
        self._sums = {outcome: dict.fromkeys(("generations", *SUMMED), 0) for outcome in OUTCOMES}
        self._file = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a+b", buffering=0)
            self._file.seek(0)
            for line in self._file.read().splitlines():
                self._add(from_json(line), line)

    def record(self, outcome: Outcome, counts: dict[str, int], **about: str) -> None:
        record = {**about, "outcome": outcome, **counts, "tokens": sum(counts.values())}
        line = to_json(record)
        self._add(record, line)
        if self._file is not None:
            self._file.write(line + b"\n")

    def _add(self, record: dict[str, Any], line: bytes) -> None:
        self._lines.append(line)
        sums = self._sums[record["outcome"]]
        sums["generations"] += 1
        for count in SUMMED:
            sums[count] += record[count]

    def totals(self) -> dict[str, Any]:
        return {
            "messageRequests": self.message_requests,
            "countTokensCalls": self.count_tokens_calls,
            **{name: sum(sums[name] for sums in self._sums.values()) for name in ("generations", *SUMMED)},
            "byOutcome": self._sums,
        }

    def records(self) -> bytes:
        """A JSON array, oldest first."""
        return b"[" + b",".join(self._lines) + b"]"
