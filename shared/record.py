"""The record from its first message on: what was archived, and behind it the stream, read as one.

For whoever needs all that ever happened. Of the archive, what the stream does not have any more is read.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from nats.aio.client import Client

from shared.archive import Archive
from shared.errors import Misconfigured
from shared.recorded import Recorded, recorded
from shared.streams import STREAM


@dataclass(frozen=True, slots=True)
class Record:
    """`archive` is a folder, which need not be there while the stream has all.

    Whoever checks what is archived reads it as it is (`is_doubted`); for others a file that was changed is none.
    """

    nc: Client
    archive: Path | None = None
    is_doubted: bool = False

    async def bounds(self) -> tuple[int, int]:
        """The sequences of the first and the last message; of an empty record the last is smaller than the first.

        Raises Misconfigured when what is before the stream's first message is not in the archive.
        """
        begins, last = await self._stream()
        await self._archived_up_to(begins - 1)
        return 1, last

    async def read(self, *, first: int, last: int) -> AsyncGenerator[list[Recorded]]:
        """All messages with sequences from `first` to `last`, in order, in batches.

        As `recorded` does, it waits for a broker that is away. Raises Misconfigured where something is missing.
        """
        while first <= last:
            begins, _ = await self._stream()
            if first < begins:
                async for batch in self._archived(first, min(last, begins - 1)):
                    yield batch
                first = begins
            async with aclosing(recorded(self.nc, first=first, last=last)) as batches:
                async for batch in batches:
                    if batch and batch[0].sequence > first and (await self._stream())[0] > first:
                        break  # trimmed meanwhile: the archive has it
                    yield batch
                    first = batch[-1].sequence + 1 if batch else first
                else:
                    return

    async def _stream(self) -> tuple[int, int]:
        state = (await self.nc.jetstream().stream_info(STREAM)).state
        return max(1, state.first_seq), state.last_seq

    async def _archived(self, first: int, last: int) -> AsyncGenerator[list[Recorded]]:
        archive = await self._archived_up_to(last)
        batches = archive.read(first=first, last=last, is_doubted=self.is_doubted)
        while batch := await asyncio.to_thread(next, batches, None):
            yield batch

    async def _archived_up_to(self, last: int) -> Archive:
        """Raises Misconfigured when it does not go so far, or has another stream's messages."""
        if last < 1:
            return Archive(Path())
        archive = await asyncio.to_thread(Archive.at, self.archive) if self.archive else Archive(Path())
        info = await self.nc.jetstream().stream_info(STREAM)
        # Another stack's may be shorter, too: that it is another's says what to do.
        check_origin(archive, info.created)
        if archive.last < last:
            raise Misconfigured(
                f"Messages {archive.last + 1} to {last} are neither on the stream nor in "
                + (f"the archive {self.archive}. " if self.archive else "an archive. ")
                + "Put the archive's files there, or name their folder with CHATRAIL_ARCHIVE."
            )
        joint = max(1, info.state.first_seq)
        if not self.is_doubted and joint <= min(archive.last, info.state.last_seq):
            await self._check_joint(archive, joint)
        return archive

    async def _check_joint(self, archive: Archive, joint: int) -> None:
        """Whether both are of one stream: the first message of the stream that the archive has, too, is the same."""
        kept = await asyncio.to_thread(archive.find, [joint])
        there = await self.nc.jetstream().get_msg(STREAM, joint)
        if (there.subject, there.data or b"") != (kept[joint].subject, kept[joint].body):
            raise Misconfigured(
                f"Message {joint} is one thing on the stream and another in the archive {self.archive}. "
                "make audit tells which of them was changed."
            )


def check_origin(archive: Archive, created: object) -> None:
    """Raises Misconfigured when the archive is of another stream than that which was made then."""
    if archive.manifests and archive.manifests[-1].stream_created != created:
        raise Misconfigured(
            f"The archive {archive.folder} is of another stream, made {archive.manifests[-1].stream_created}: name "
            "that of this one with CHATRAIL_ARCHIVE."
        )
