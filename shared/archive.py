"""The archive: what the stream had before a moment, in Parquet files that others can keep and read, too.

    usage-000000000001-000000020852.parquet   messages in their order
    usage-000000000001-000000020852.json      their manifest

A manifest is written once its file was read back from the disk and found right. A file without one is no part of the
archive, and neither is what has another name.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from shared.errors import Misconfigured
from shared.events import kind_of
from shared.recorded import Recorded
from shared.streams import GENERATION_COMPLETED, LEDGER_SEALED, STREAM, SUBSCRIPTION_CHANGED, USAGE_ADJUSTED

BATCH_SIZE = 1000
# What is gathered before it is compressed and written: some 16 MB.
ROW_GROUP_ROWS = 16 * BATCH_SIZE
COLUMNS = ("sequence", "subject", "headers", "body", "stored_at")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# Every seal has it, and hardly anything else.
_SEAL = LEDGER_SEALED.encode()
COUNTED = (GENERATION_COMPLETED, SUBSCRIPTION_CHANGED, USAGE_ADJUSTED)

Place = Annotated[int, Field(ge=1)]


class Manifest(BaseModel):
    """What a file has: all messages from `first` to `last` of the stream that was made at `stream_created`.

    `checkpoint` is the sealed head of the first `last` messages, signed where seals are. `signature` (Ed25519,
    base64) is of `to_sign`, by the key that `key_id` tells: of all of the file, which `sha256` stands for.
    """

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)

    format: Literal["chatrail-archive/1"] = "chatrail-archive/1"
    stream: str
    stream_created: AwareDatetime
    first: Place
    last: Place
    first_stored_at: AwareDatetime
    last_stored_at: AwareDatetime
    size_bytes: int
    sha256: str
    checkpoint: str
    key_id: str | None = None
    signature: str | None = None

    def to_sign(self) -> bytes:
        """All that it says but the signature itself."""
        return b"chatrail/archive\n" + self.model_dump_json(by_alias=True, exclude={"signature"}).encode()

    @property
    def name(self) -> str:
        return file_name(self.first, self.last)

    @property
    def messages(self) -> int:
        return self.last - self.first + 1


def file_name(first: int, last: int) -> str:
    return f"usage-{first:012}-{last:012}.parquet"


class Archive:
    """Files one behind the other, beginning with the stream's first message."""

    def __init__(self, folder: Path, manifests: Sequence[Manifest] = ()) -> None:
        self.folder, self.manifests = folder, tuple(manifests)
        self._checked: set[str] = set()

    @classmethod
    def at(cls, folder: Path) -> "Archive":
        """An empty one where there is none. Raises Misconfigured, naming it, where a file's manifest is missing."""
        manifests = sorted(map(_read_manifest, folder.glob("usage-*.json")), key=lambda manifest: manifest.first)
        archive = cls(folder, manifests)
        archive._check_order()
        return archive

    def _check_order(self) -> None:
        if self.manifests and self.manifests[0].first > 1:
            raise self._lacks(1, self.manifests[0].first - 1)
        for before, after in pairwise(self.manifests):
            if after.first > before.last + 1:
                raise self._lacks(before.last + 1, after.first - 1)
            if after.first <= before.last:
                raise Misconfigured(
                    f"The archive {self.folder} has messages twice, in {before.name} and in {after.name}."
                )
            if after.stream_created != before.stream_created:
                raise Misconfigured(f"The archive {self.folder} is of two streams: {before.name}, {after.name}.")

    def _lacks(self, first: int, last: int) -> Misconfigured:
        return Misconfigured(
            f"The archive {self.folder} lacks messages {first} to {last}: restore the files that have them, each "
            "with its manifest."
        )

    @property
    def last(self) -> int:
        """The sequence up to which all is archived; 0 where nothing is."""
        return self.manifests[-1].last if self.manifests else 0

    def path(self, manifest: Manifest) -> Path:
        return self.folder / manifest.name

    def check(self, manifest: Manifest) -> None:
        """Raises Misconfigured when the file is not what was archived. Reads all of it, once."""
        if manifest.name in self._checked:
            return
        path = self.path(manifest)
        try:
            size_bytes, sha256 = path.stat().st_size, sha256_of(path)
        except OSError as error:
            raise Misconfigured(
                f"The archive's file {path} cannot be read ({error.strerror}): restore it from a copy."
            ) from error
        if (size_bytes, sha256) != (manifest.size_bytes, manifest.sha256):
            self._check_name(manifest, sha256)
            raise Misconfigured(
                f"The archive's file {path} is not what was archived: it had {manifest.size_bytes:,} bytes with the "
                f"SHA-256 {manifest.sha256}, and has {size_bytes:,} with {sha256}. Restore it from a copy."
            )
        for name, told, is_so in unlike(manifest, contents(path)):
            raise Misconfigured(
                f"The archive's file {path} is not what its manifest says: {name} is {is_so}, and not {told}. "
                "Restore both from a copy."
            )
        self._checked.add(manifest.name)

    def check_name(self, manifest: Manifest) -> None:
        """Raises Misconfigured when its file is another one of this archive. Reads all of it."""
        with suppress(OSError):
            self._check_name(manifest, sha256_of(self.path(manifest)))

    def _check_name(self, manifest: Manifest, sha256: str) -> None:
        for other in self.manifests:
            if other is not manifest and other.sha256 == sha256:
                raise Misconfigured(
                    f"The archive's file {self.path(manifest)} is what {other.name} was: give each its own name "
                    "back, or restore it from a copy."
                )

    def read(self, *, first: int, last: int, is_doubted: bool = False) -> Iterator[list[Recorded]]:
        """As they came from the stream, in batches.

        Raises Misconfigured when a file is not what was archived; where that is doubted already, only when it cannot
        be read, and a message is what its body says, which is sealed, whatever its subject does.
        """
        for manifest in self.manifests:
            if manifest.first <= last and manifest.last >= first:
                if not is_doubted:
                    self.check(manifest)
                    yield from map(self._fitting, read_file(self.path(manifest), first=first, last=last))
                else:
                    for batch in read_file(self.path(manifest), first=first, last=last):
                        yield [message._replace(subject=fitting_subject(message)) for message in batch]

    def _fitting(self, batch: list[Recorded]) -> list[Recorded]:
        for message in batch:
            if fitting_subject(message) != message.subject:
                raise Misconfigured(
                    f"Message {message.sequence} in the archive {self.folder} is not what was archived: its subject "
                    f"is {message.subject}, and its content is not. Restore it from a copy; make audit names it."
                )
        return batch

    def find(self, sequences: Sequence[int]) -> dict[int, Recorded]:
        """Of these messages, those that are archived; only the parts that have them are read."""
        found: dict[int, Recorded] = {}
        for sequence in sequences:
            for batch in self.read(first=sequence, last=sequence):
                found |= {message.sequence: message for message in batch}
        return found


def fitting_subject(message: Recorded) -> str:
    """Its own, unless it says that a seal is none, or what is none a seal: readers pass seals over."""
    if _SEAL in message.body and (kind := kind_of(message.body)) == LEDGER_SEALED:
        return kind
    if message.subject == LEDGER_SEALED and (kind := kind_of(message.body)) in COUNTED:
        return kind
    return message.subject


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise Misconfigured(f"The archive's manifest {path} cannot be read: restore it from a copy.") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Contents(NamedTuple):
    """What a file itself has: which messages, whether they follow each other, when their ends were stored."""

    first: int
    last: int
    is_whole: bool
    first_stored_at: datetime
    last_stored_at: datetime


def contents(path: Path) -> Contents:
    """Reads no body. Raises Misconfigured when the file cannot be read, or has no message."""
    pyarrow, parquet = _pyarrow()
    ends, expected, is_whole = list[tuple[int, int]](), None, True
    with _reading(path, pyarrow), parquet.ParquetFile(path, memory_map=False) as file:
        for batch in file.iter_batches(ROW_GROUP_ROWS, columns=["sequence", "stored_at"]):
            sequences = batch.column("sequence").to_pylist()
            moments = batch.column("stored_at").cast(pyarrow.int64())
            first = sequences[0] if expected is None else expected
            expected = first + len(sequences)
            is_whole = is_whole and sequences == list(range(first, expected))
            ends += [(sequences[0], moments[0].as_py()), (sequences[-1], moments[-1].as_py())]
            del ends[1:-1]
        (first, first_stored_at), (last, last_stored_at) = ends
    return Contents(first, last, is_whole, _moment(first_stored_at), _moment(last_stored_at))


def unlike(manifest: Manifest, found: Contents) -> Iterator[tuple[str, str, str]]:
    """Of what the manifest says, what is not so: its name, what is said, and what is so."""
    said = {
        "stream": (manifest.stream, STREAM),
        "messages": (f"{manifest.first} to {manifest.last}", f"{found.first} to {found.last}"),
        "firstStoredAt": (manifest.first_stored_at.isoformat(), found.first_stored_at.isoformat()),
        "lastStoredAt": (manifest.last_stored_at.isoformat(), found.last_stored_at.isoformat()),
    }
    yield from ((name, told, is_so) for name, (told, is_so) in said.items() if told != is_so)
    if not found.is_whole:
        yield "messages", "one behind the other", "in another order, or not all"


def read_file(path: Path, *, first: int = 1, last: int = sys.maxsize) -> Iterator[list[Recorded]]:
    """Messages from `first` to `last`, in batches, in the order of the file.

    Raises Misconfigured when it cannot be read.
    """
    pyarrow, parquet = _pyarrow()
    with _reading(path, pyarrow), parquet.ParquetFile(path, memory_map=False) as file:
        groups = [nth for nth, (low, high) in enumerate(_ranges(file)) if low <= last and high >= first]
        for batch in file.iter_batches(BATCH_SIZE, row_groups=groups, columns=list(COLUMNS)):
            if messages := [each for each in _messages(batch, pyarrow) if first <= each.sequence <= last]:
                yield messages


@contextmanager
def _reading(path: Path, pyarrow: Any) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, AttributeError) as error:
        raise Misconfigured(f"The archive's file {path} cannot be read: restore it from a copy.") from error


def _ranges(file: Any) -> Iterator[tuple[int, int]]:
    """The sequences of each row group."""
    for nth in range(file.metadata.num_row_groups):
        told = file.metadata.row_group(nth).column(0).statistics
        yield told.min, told.max


def _messages(batch: Any, pyarrow: Any) -> Iterator[Recorded]:
    columns = [batch.column(name) for name in COLUMNS]
    columns[-1] = columns[-1].cast(pyarrow.int64())
    for sequence, subject, headers, body, stored in zip(*(column.to_pylist() for column in columns), strict=True):
        told = None if headers is None else json.loads(headers)
        yield Recorded(sequence, subject, body, _moment(stored), told)


def _moment(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND


@contextmanager
def writing(out: BinaryIO) -> Iterator[Callable[[Sequence[Recorded]], None]]:
    """Hand it the messages in their order; the file is whole with the end of the context."""
    pyarrow, parquet = _pyarrow()
    types = (pyarrow.int64(), pyarrow.string(), pyarrow.string(), pyarrow.binary(), pyarrow.timestamp("us", "UTC"))
    nullable = ("headers",)
    schema = pyarrow.schema(
        [pyarrow.field(name, kind, nullable=name in nullable) for name, kind in zip(COLUMNS, types, strict=True)]
    )
    waiting: list[Any] = []

    def write(at_least: int) -> None:
        if waiting and sum(batch.num_rows for batch in waiting) >= at_least:
            file.write_table(pyarrow.Table.from_batches(waiting))
            waiting.clear()

    def add(messages: Sequence[Recorded]) -> None:
        rows = [(each.sequence, each.subject, _json(each), each.body, each.stored_at) for each in messages]
        arrays = [pyarrow.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]
        waiting.append(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))
        write(ROW_GROUP_ROWS)

    with parquet.ParquetWriter(out, schema, compression="zstd", write_page_checksum=True) as file:
        yield add
        write(1)


def _json(message: Recorded) -> str | None:
    return json.dumps(dict(message.headers), ensure_ascii=False) if message.headers else None


def put_in_place(draft: Path, path: Path) -> None:
    """The draft, which is on disk, under the name by which it counts; both are on disk afterwards."""
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _pyarrow() -> tuple[Any, Any]:
    # Nobody else should wait for it to load, nor keep it in memory.
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise Misconfigured("Archives are Parquet files, for which this installation lacks pyarrow.") from error
    return pyarrow, parquet
