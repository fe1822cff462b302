"""The log of operations: a line for everything that was asked, answered, broken, ended or started."""

import json
import time
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class OperationLog:
    """Appended to, line by line; `t` is in seconds since the epoch."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1, encoding="utf-8")

    def write(self, what: str, **fields: Any) -> None:
        self._file.write(json.dumps({"t": round(time.time(), 3), "what": what, **fields}) + "\n")

    def close(self) -> None:
        self._file.close()


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
