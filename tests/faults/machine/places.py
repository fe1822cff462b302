"""Where the checker finds what it reads: written by the machine, for a process that knows nothing else of the run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "places.json"


@dataclass(frozen=True, slots=True)
class Places:
    """The log, the stand-in's count, chat's outbox, the broker and the databases. Nothing of it is behind a proxy."""

    log: str
    given: str
    outbox: str
    nats_url: str
    ledger_url: str
    quota_url: str

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)))


def load_places(folder: Path) -> Places:
    return Places(**json.loads((folder / FILE).read_text()))
