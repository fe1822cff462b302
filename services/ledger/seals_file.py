"""The file outside, `CHATRAIL_SEALS_FILE`: each sealed head once, in order, as a signed note.

It is best on a disk that others look after: what it says stands against whoever can rewrite broker and database.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO

from services.ledger.checkpoint import checkpoint
from services.ledger.seals import Sealed
from services.ledger.verify_record import Checkpoint, notes_in, read_checkpoint
from shared.errors import Misconfigured

END_BYTES = 4096


class Torn(str):
    """The end of the file outside, where it is no head: what a process leaves that dies while it writes one."""


class SealsFile:
    """For whoever seals: a head is on disk before the next round. Replicas may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.last_size()
        except OSError as error:
            raise Misconfigured(f"CHATRAIL_SEALS_FILE {path} cannot be written: {error.strerror}.") from error

    def last_size(self) -> int:
        with self._locked() as file:
            return newest_size(end_of(file))

    def append(self, found: Sequence[Sealed]) -> None:
        with self._locked() as file:
            tail = end_of(file)
            size = newest_size(tail)
            notes = "".join(f"{checkpoint(seal.head, seal.signature)}\n" for seal in found if seal.head.size > size)
            # What a crash cut off stays, on its own.
            is_cut = not f"\n\n{tail}".endswith("\n\n")
            file.write(("\n\n" * is_cut + notes).encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def read_outside(seals_file: Path, *, up_to: int | None = None) -> Iterator[Checkpoint | str]:
    """The file's heads in order, or the text that is none. What a crash cut off, and what follows whole, is one.
    Where nothing follows it is Torn.

    What is behind so many bytes came later.
    """
    try:
        with seals_file.open("rb") as file:
            for note, following in pairwise(chain(notes_in(_lines(file, up_to)), [""])):
                if note != following and following.startswith(note.rstrip("\n\ufffd")):
                    continue
                try:
                    yield read_checkpoint(note)
                except ValueError:
                    yield note if following else Torn(note)
    except OSError as error:
        raise Misconfigured(f"CHATRAIL_SEALS_FILE {seals_file} cannot be read: {error.strerror}.") from error


def end_of(seals_file: BinaryIO) -> str:
    """Enough of it for its last heads."""
    seals_file.seek(max(0, os.fstat(seals_file.fileno()).st_size - END_BYTES))
    return seals_file.read().decode(errors="replace")


def newest_size(text: str) -> int:
    """Of the largest tree that it has a head of; 0 without one."""
    return max((_size_of(note) for note in notes_in(text.splitlines(keepends=True))), default=0)


def _size_of(note: str) -> int:
    try:
        return read_checkpoint(note).tree_size
    except ValueError:
        return 0


def _lines(file: BinaryIO, up_to: int | None) -> Iterator[str]:
    for line in file:
        if up_to is not None and file.tell() > up_to:
            return
        yield line.decode(errors="replace")
