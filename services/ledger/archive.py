"""Archiving: what the stream had before a moment is written down, read back, and held against leaves and seals.

A file ends where a seal does, so that one root hash stands for all that is archived up to its end.
"""

import asyncio
import base64
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from nats.aio.client import Client
from nats.js.errors import NotFoundError

from services.ledger.checkpoint import Keys, Signature, checkpoint
from services.ledger.merkle import Frontier, Head, leaf_hash
from services.ledger.seals import Rows, Sealed, event_id, paged, sealed_after
from services.ledger.verify_record import read_checkpoint
from shared.archive import (
    Archive,
    Manifest,
    contents,
    file_name,
    fitting_subject,
    put_in_place,
    read_file,
    sha256_of,
    unlike,
    writing,
)
from shared.errors import Misconfigured
from shared.record import check_origin
from shared.recorded import Recorded, recorded
from shared.streams import LEDGER, QUOTA, STREAM

# As many as seals allow. Each file is read whole before a message of it is believed.
FILE_MESSAGES_MAX = 1_000_000
TOLD_MAX = 20
Progress = Callable[[int], None]


class Reach(NamedTuple):
    """How far the stream can be archived: each is a sequence, and the least of them decides."""

    stored_before: int
    handled: int
    sealed: int


class Altered(NamedTuple):
    """One thing in a file that is not as it was sealed; without a sequence, the file itself."""

    sequence: int | None
    event_id: str | None
    expected: str
    found: str


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Of those that write there, or trim. Raises Misconfigured when somebody else is at it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise Misconfigured(f"Somebody else works on the archive {folder} just now.") from None
    except OSError as error:
        raise Misconfigured(f"The archive {folder} cannot be written: {error.strerror or error}.") from error


async def acknowledged(nc: Client) -> dict[str, int]:
    """Up to where each durable has acknowledged all of the stream. Raises Misconfigured where one is not there."""
    floors = {}
    for durable in (LEDGER, QUOTA):
        try:
            floor = (await nc.jetstream().consumer_info(STREAM, durable)).ack_floor
        except NotFoundError as error:
            raise Misconfigured(
                f"The stream has no consumer {durable}, which ChatRail makes when it starts. Start it, or try again "
                "in a moment where it is starting."
            ) from error
        floors[durable] = floor.stream_seq if floor else 0
    return floors


async def stored_before(nc: Client, moment: datetime, *, first: int, last: int) -> int:
    """The last message from `first` to `last` that was stored before the moment; `first` - 1 where none was."""
    js = nc.jetstream()
    while first <= last:
        middle = (first + last) // 2
        stored_at = (await js.get_msg(STREAM, middle)).time
        if stored_at is not None and stored_at < moment:
            first = middle + 1
        else:
            last = middle - 1
    return last


async def archive(
    nc: Client, rows: Rows, folder: Path, *, before: datetime, keys: Keys | None = None, advance: Progress
) -> tuple[list[Manifest], Reach]:
    """What was written, file by file, and how far it could go. `rows` asks the ledger's database.

    To be called by one at a time (`alone_in`). Raises Misconfigured when the stream is not what was sealed, or an
    earlier file is not what its manifest says; that both were made anew only an audit finds, and a trim.
    """
    info = await nc.jetstream().stream_info(STREAM)
    assert info.created  # noqa: S101 - every stream was
    _take_away_drafts(folder)
    kept = await asyncio.to_thread(Archive.at, folder)
    check_origin(kept, info.created)
    begins = max(1, info.state.first_seq)
    if begins > kept.last + 1:
        raise Misconfigured(
            f"Messages {kept.last + 1} to {begins - 1} are neither on the stream nor in the archive {folder}: "
            "name the folder that has them."
        )
    for manifest in kept.manifests:
        await asyncio.to_thread(kept.check, manifest)
    known = await stored_before(nc, before, first=max(begins, kept.last + 1), last=info.state.last_seq)
    handled, so_far = min((await acknowledged(nc)).values()), sealed_at(rows, kept.last)
    seals = {seal.head.size: seal for seal in sealed_after(rows, kept.last) if seal.head.size <= min(known, handled)}
    writer, written = _Writer(nc, rows, folder, info.created, keys, advance), []
    for first, last in files(kept.last, list(seals)):
        written.append(await writer.write(first, seals[last], so_far))
        so_far = seals[last]
    sealed = max((seal.head.size for seal in sealed_after(rows, kept.last)), default=kept.last)
    return written, Reach(known, handled, sealed)


def files(after: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last message of each file, behind what is archived; `sizes` are those that are sealed, in order."""
    for nth, size in enumerate(sizes):
        is_last = nth + 1 == len(sizes)
        if is_last or sizes[nth + 1] - after > FILE_MESSAGES_MAX:
            yield after + 1, size
            after = size


def sealed_at(rows: Rows, size: int) -> Sealed | None:
    """None for nothing. Raises Misconfigured when there is no such seal."""
    if size == 0:
        return None
    seal = next(sealed_after(rows, size - 1), None)
    if seal is None or seal.head.size != size or seal.frontier is None:
        raise Misconfigured(f"The ledger has no right seal of {size} messages: make audit tells what was changed.")
    return seal


@dataclass(frozen=True, slots=True)
class _Writer:
    nc: Client
    rows: Rows
    folder: Path
    stream_created: datetime
    keys: Keys | None
    advance: Progress

    async def write(self, first: int, seal: Sealed, before: Sealed | None) -> Manifest:
        """One file, and once it was read back and found right, its manifest."""
        last = seal.head.size
        if seal.signature and not (self.keys and self.keys.signing):
            raise Misconfigured(
                "Seals are signed, and manifests are to be, too: name the key that signs with CHATRAIL_SEAL_KEY_FILE."
            )
        path = self.folder / file_name(first, last)
        with _draft_of(path) as draft:
            digest, first_stored_at, last_stored_at = await self._copy(draft, first, last)
            manifest = Manifest(
                stream=STREAM,
                stream_created=self.stream_created,
                first=first,
                last=last,
                first_stored_at=first_stored_at,
                last_stored_at=last_stored_at,
                size_bytes=draft.stat().st_size,
                sha256=await asyncio.to_thread(sha256_of, draft),
                checkpoint=checkpoint(seal.head, seal.signature),
            )
            manifest = _signed(manifest, self.keys)
            if await asyncio.to_thread(_digest_of_file, draft) != digest:
                raise Misconfigured(f"What was written to {draft} cannot be read back. Is its disk all right?")
            for found in await altered(draft, manifest, self.rows, before=before, keys=self.keys):
                raise Misconfigured(
                    f"Message {found.sequence or last} of the stream is not what was sealed, and nothing behind "
                    f"{first - 1} was archived. make audit tells what was changed."
                )
            put_in_place(draft, path)
        with _draft_of(path.with_suffix(".json")) as draft:
            _write_down(draft, f"{manifest.model_dump_json(by_alias=True, indent=1)}\n".encode())
            put_in_place(draft, path.with_suffix(".json"))
        _take_away_leftovers(self.folder, manifest)
        return manifest

    async def _copy(self, draft: Path, first: int, last: int) -> tuple[str, datetime, datetime]:
        """From the stream to the disk: a digest of all, and when the first and the last were stored."""
        digest, expected, times = _Digest(), first, list[datetime]()
        with draft.open("xb") as out:
            with writing(out) as add:
                async for batch in recorded(self.nc, first=first, last=last):
                    if batch[0].sequence != expected or len(batch) != batch[-1].sequence - expected + 1:
                        break
                    expected = batch[-1].sequence + 1
                    add(batch)
                    digest.update(batch)
                    times += [batch[0].stored_at, batch[-1].stored_at]
                    del times[1:-1]
                    self.advance(len(batch))
            out.flush()
            os.fsync(out.fileno())
        if expected != last + 1:
            raise Misconfigured(f"The stream lacks messages behind {expected - 1}: make audit tells which.")
        return digest.hex(), times[0], times[-1]


def _signed(manifest: Manifest, keys: Keys | None) -> Manifest:
    """Where there is a key that signs."""
    if keys is None or keys.key_id is None:
        return manifest
    manifest = manifest.model_copy(update={"key_id": keys.key_id})
    made = keys.sign_bytes(manifest.to_sign())
    return manifest.model_copy(update={"signature": base64.b64encode(made.signature).decode()}) if made else manifest


def is_signed(manifest: Manifest, keys: Keys) -> bool:
    """Whether a believed key signed all that it says, and so all that the file has."""
    try:
        made = base64.b64decode(manifest.signature or "", validate=True)
    except ValueError:
        return False
    return keys.is_right_of(manifest.to_sign(), Signature(manifest.key_id or "", made))


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """A name under which nothing counts. What is not put in place is taken away."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _take_away_drafts(folder: Path) -> None:
    for draft in folder.glob(".usage-*.draft"):
        draft.unlink()


def _take_away_leftovers(folder: Path, manifest: Manifest) -> None:
    """Files of this file's messages to which a dead process could not write a manifest any more."""
    for path in folder.glob("usage-*.parquet"):
        first, _, last = path.stem.removeprefix("usage-").partition("-")
        if not path.with_suffix(".json").exists() and manifest.first <= int(first) <= int(last) <= manifest.last:
            path.unlink()


def _write_down(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class _Digest:
    """Of messages with all that is kept of them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, messages: Sequence[Recorded]) -> None:
        for each in messages:
            told = (each.sequence, each.subject, sorted((each.headers or {}).items()), each.stored_at.isoformat())
            self._hash.update(repr(told).encode())
            self._hash.update(each.body)

    def hex(self) -> str:
        return self._hash.hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = _Digest()
    for batch in read_file(path):
        digest.update(batch)
    return digest.hex()


async def altered(
    path: Path, manifest: Manifest, rows: Rows, *, before: Sealed | None, keys: Keys | None = None
) -> list[Altered]:
    """What in the file is not as the ledger has sealed it, the first of it; `before` is the seal that ends before it.

    Bodies are held against the leaves, and their root against the seal and the manifest.
    """
    found = list[Altered]()
    try:
        found += await asyncio.to_thread(_of_the_file, path, manifest)
        root = await _compare(path, manifest, rows, before, found)
    except (Misconfigured, OSError) as problem:
        return [*found, Altered(None, None, "messages", f"cannot be read: {problem}")]
    found += _of_the_head(manifest, rows, root, keys)
    return found[:TOLD_MAX]


def _of_the_file(path: Path, manifest: Manifest) -> list[Altered]:
    """Where it is not what its manifest says."""
    said = {"SHA-256": (manifest.sha256, sha256_of(path)), "sizeBytes": (manifest.size_bytes, path.stat().st_size)}
    differing = [(name, told, is_so) for name, (told, is_so) in said.items() if told != is_so]
    differing += unlike(manifest, contents(path))
    return [Altered(None, None, f"{name} {told}", f"{is_so}") for name, told, is_so in differing]


async def _compare(path: Path, manifest: Manifest, rows: Rows, before: Sealed | None, found: list[Altered]) -> bytes:
    """The root over what is there."""
    frontier = (before.frontier if before else None) or Frontier()
    leaves, expected = _leaves(rows, manifest.first - 1), manifest.first
    async for batch in _batches(path):
        for message in batch:
            digest, leaf = leaf_hash(message.body), next(leaves, None)
            frontier.append(digest)
            if message.sequence != expected:
                found.append(Altered(expected, event_id(message.body), f"message {expected}", f"{message.sequence}"))
            elif leaf is None or leaf != (expected, digest):
                told = leaf[1].hex() if leaf and leaf[0] == expected else "no leaf"
                found.append(Altered(expected, event_id(message.body), told, digest.hex()))
            elif (subject := fitting_subject(message)) != message.subject:
                found.append(Altered(expected, event_id(message.body), f"subject {subject}", message.subject))
            expected += 1
        del found[TOLD_MAX:]
    if expected != manifest.last + 1:
        found.append(Altered(None, None, f"{manifest.messages} messages", f"{expected - manifest.first}"))
    return frontier.root


async def _batches(path: Path) -> AsyncIterator[list[Recorded]]:
    batches = read_file(path)
    while batch := await asyncio.to_thread(next, batches, None):
        yield batch


def _leaves(rows: Rows, after: int) -> Iterator[tuple[int, bytes]]:
    statement = (
        "SELECT stream_sequence, leaf_hash FROM leaves WHERE stream_sequence > ? ORDER BY stream_sequence LIMIT ?"
    )
    return ((sequence, bytes(digest)) for sequence, digest in paged(rows, statement, after))


def _of_the_head(manifest: Manifest, rows: Rows, root: bytes, keys: Keys | None) -> Iterator[Altered]:
    try:
        told = read_checkpoint(manifest.checkpoint)
    except ValueError:
        yield Altered(None, None, "a checkpoint", "something else")
        return
    seal = next(sealed_after(rows, manifest.last - 1), None)
    sealed = seal.head if seal and seal.head.size == manifest.last else None
    if told.tree_size != manifest.last or told.root_hash != root:
        yield Altered(None, None, f"messages as sealed, {told.root_hash.hex()}", root.hex())
    if sealed is None or sealed.root != told.root_hash:
        yield Altered(None, None, f"a seal of the ledger with the root {told.root_hash.hex()}", _root(sealed))
    head = Head(told.tree_size, told.root_hash)
    wrong = [key_id for key_id, made in told.signatures if keys and not keys.is_right(head, Signature(key_id, made))]
    if wrong or (seal and bool(seal.signature) != bool(told.signatures)):
        yield Altered(None, None, "a signature by a key that is believed", ", ".join(wrong) or "another")
    # Where seals are signed, a manifest without a signature is one from which it was taken.
    if keys and (manifest.signature or told.signatures) and not is_signed(manifest, keys):
        yield Altered(None, None, "a manifest signed by a key that is believed", manifest.key_id or "unsigned")


def _root(head: Head | None) -> str:
    return head.root.hex() if head else "none"
