"""How a command ends that cannot do what it was asked, or cannot tell what it found."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from shared.errors import Misconfigured
from shared.server import one_sentence, without_standard_output


class _StandardOutput:
    """As it is; where a disk is full, or nobody reads on, it raises Misconfigured, from then on for good."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, text: str) -> int:
        with self._told():
            return int(self._out.write(text))

    def flush(self) -> None:
        with self._told():
            self._out.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            # Who looks first whether it can be written to, as typer does, keeps what that raises to itself.
            if self.failure:
                raise self.failure
            yield
        except OSError as error:
            self.failure = error
            raise Misconfigured(f"What was found cannot be written: {error.strerror}.") from error


@contextmanager
def command() -> Iterator[None]:
    """One sentence and status 1 for what an operator can put right; for standard output that takes no more, too."""
    with one_sentence():
        if sys.stdout is None:  # it was closed before we began
            yield
            return
        out = _StandardOutput(sys.stdout)
        try:
            with redirect_stdout(out):
                yield
                out.flush()
        finally:
            if out.failure:
                without_standard_output()
