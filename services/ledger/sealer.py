"""Seals the record: a leaf for each message that the ledger has handled, now and then a head of the tree over them.

Nothing is sealed on top of a record that is not what was sealed before: that is for an audit to tell.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
from nats.aio.client import Client
from nats.js.errors import APIError, NotFoundError
from prometheus_client import Counter, Gauge
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from services.ledger import seal_store
from services.ledger.checkpoint import Keys
from services.ledger.merkle import Frontier, Head, leaf_hash
from services.ledger.seal_store import LEAVES_AT_ONCE, Base, Damaged
from services.ledger.seals import Leaf, Sealed, event_id
from services.ledger.seals_file import SealsFile
from shared import streams
from shared.broker import BROKER_GONE
from shared.database import Database
from shared.errors import Misconfigured, PoisonMessage, Unavailable
from shared.events import CONTENT_TYPE, LedgerSealed, Seal, decode_seal, encode
from shared.record import Record
from shared.recorded import Recorded
from shared.streams import LEDGER, LEDGER_SEALED, STREAM, WRONG_LAST_SEQUENCE

log = structlog.get_logger()

START_AFTER_S = 3.0

COVERED = Gauge("chatrail_ledger_sealed_messages", "Messages that the newest seal covers")
NOT_SEALED = Counter("chatrail_ledger_not_sealed", "Rounds in which nothing could be sealed")


class Rewritten(Damaged):
    """The record is not what the seals on the stream say, whatever the ledger has of it."""


class Lost(NamedTuple):
    """How many leaves and seals, and up to which message they are made anew."""

    leaves: int
    seals: int
    up_to: int


class Sealer:
    """One a replica. Of several that are at it at once the tables' keys let one go on."""

    def __init__(
        self,
        nc: Client,
        database: Database,
        *,
        keys: Keys,
        seals_file: Path | None = None,
        every_s: float,
        archive: Path | None = None,
    ) -> None:
        self._nc, self._database, self._keys, self._every_s = nc, database, keys, every_s
        self._record = Record(nc, archive)
        self._file = SealsFile(seals_file) if seals_file else None

    async def run(self) -> None:
        pause_s = min(START_AFTER_S, self._every_s)
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._every_s
            try:
                pause_s = await self.seal()
            except Damaged as damage:
                NOT_SEALED.inc()
                log.error("not_sealed", reason=str(damage), to_do="make audit tells what was changed")
            except Misconfigured as problem:
                NOT_SEALED.inc()
                log.error("not_sealed", reason=str(problem))
            except (Unavailable, SQLAlchemyError, *BROKER_GONE) as error:
                NOT_SEALED.inc()
                log.warning("not_sealed_yet", error=repr(error))

    async def seal(self) -> float:
        """One round: seal what is new, if it is time, and tell of all seals. The seconds to the next round.

        Seals alone are not sealed, so that an idle stream comes to rest; but a new key is heard of at once. Raises
        Damaged.
        """
        # In this order: another replica may be quicker, with messages that came after a question to the stream.
        base = await self._database.read(seal_store.base)
        reached = await streams.reached(self._nc, LEDGER)
        if reached.ends < base.frontier.size:
            raise Damaged(f"the stream ends at {reached.ends}, and had {base.frontier.size} messages")
        has_new_key = base.newest is not None and self._keys.key_id not in (None, _key_of(base.newest))
        if base.newest and base.age_s < self._every_s and not has_new_key:
            await self._tell()
            return self._every_s - max(0.0, base.age_s)
        _, told = await self._last_told()
        is_due = has_new_key or base.frontier.size > base.sealed
        is_grown = await self._grow(base, reached.acknowledged, is_due=is_due)
        # What the stream has a seal of that this database lacks is sealed: it comes with what is handled next.
        if is_grown and base.frontier.size > told:
            head = Head(base.frontier.size, base.frontier.root)
            if await self._database.write(seal_store.add_seal, head, base.frontier.subtrees, self._keys.sign(head)):
                log.info("sealed", messages=head.size, root_hash=head.root.hex(), signed_by=self._keys.key_id)
        await self._tell()
        return self._every_s

    async def lost(self) -> Lost:
        """What this database lacks of the leaves and seals that the stream tells of. Raises Rewritten where the
        record is not what those seals say, and Damaged where the database itself was changed."""
        return (await self._look_for_lost())[0]

    async def restore(self) -> Lost:
        """Make leaves and seals anew that this database has lost, once all of the record fits the stream's seals.

        Returns what it lacked. Raises as `lost`, and Unavailable where another is at it. What is there stays.
        """
        lost, told, base = await self._look_for_lost()
        if lost.seals:
            await self._grow(base, lost.up_to, is_due=True)
            await self._database.write(seal_store.restore, base.newest, told)
        return lost

    async def _look_for_lost(self) -> tuple[Lost, list[LedgerSealed], Base]:
        sequence, size = await self._last_told()
        base = await self._database.read(seal_store.base)
        if size <= base.sealed:
            return Lost(0, 0, 0), [], base
        read = partial(self._record.read, first=base.sealed + 1, last=sequence)
        # A seal comes after what it covers: only a second reading knows at which sizes to look at the tree.
        told = [seal async for batch in read() for seal in _seals_in(batch, above=base.sealed)]
        roots, sealed = {seal.data.tree_size: seal.data.root_hash for seal in told}, base.sealed
        frontier = (base.newest.frontier if base.newest else None) or Frontier()
        async for batch in read():
            for message in batch:
                if message.sequence != frontier.size + 1:
                    raise Rewritten(f"the stream lacks messages behind {frontier.size}")
                frontier.append(leaf_hash(message.body))
                if (root := roots.get(frontier.size)) not in (None, frontier.root.hex()):
                    raise Rewritten(f"messages {sealed + 1} to {frontier.size} of the stream are not what was sealed")
                sealed = sealed if root is None else frontier.size
        async with aclosing(self._since(base, sequence)) as behind:
            await anext(behind, None)  # the last leaf must be its message's
        return Lost(max(0, sequence - base.frontier.size), len(roots), sequence), told, base

    async def _grow(self, base: Base, handled: int, *, is_due: bool) -> bool:
        """Add the leaves of what is handled, if it is due or more than seals. Whether the tree is to be sealed.

        A database that is older than the stream's own seals, or new, gets them back.
        """
        told, waiting = await self._told_before(base), list[Recorded]()
        async for batch in self._since(base, handled):
            waiting += batch
            told += _seals_in(batch, above=base.sealed)
            is_due = is_due or any(message.subject != LEDGER_SEALED for message in batch)
            if is_due and len(waiting) >= LEAVES_AT_ONCE:
                await self._append(base.frontier, waiting)
                waiting = []
        if is_due and waiting:
            await self._append(base.frontier, waiting)
        if is_due and told:
            await self._database.write(seal_store.restore, base.newest, told)
        return is_due and base.sealed < base.frontier.size <= handled

    async def _told_before(self, base: Base) -> list[LedgerSealed]:
        """Seals among the messages of leaves that no seal of ours covers: whoever made those leaves anew has died, or
        gave way to us, before it came to the seals."""
        told = list[LedgerSealed]()
        if base.sealed < base.frontier.size:
            async for batch in self._record.read(first=base.sealed + 1, last=base.frontier.size):
                told += _seals_in(batch, above=base.sealed)
        return told

    async def _since(self, base: Base, handled: int) -> AsyncGenerator[list[Recorded]]:
        """What comes behind the last leaf, whose message must still be what it was."""
        joint = base.frontier.size
        if handled < joint or handled == joint == base.sealed:
            return
        async for batch in self._record.read(first=max(1, joint), last=handled):
            if joint:
                before, *batch = batch  # noqa: PLW2901 - the rest of it
                if before.sequence != joint or leaf_hash(before.body) != base.last:
                    raise Damaged(f"message {joint} of the stream is not what it was")
                joint = 0
            if batch:
                yield batch

    async def _append(self, frontier: Frontier, messages: list[Recorded]) -> None:
        new = [Leaf(message.sequence, event_id(message.body), leaf_hash(message.body)) for message in messages]
        if new[0].sequence != frontier.size + 1 or new[-1].sequence != frontier.size + len(new):
            raise Damaged(f"the stream lacks messages behind {frontier.size}")
        try:
            is_ours = await self._database.write(seal_store.add_leaves, new)
        except IntegrityError:
            is_ours = False
        if not is_ours:
            raise Unavailable("Another replica is sealing.")
        for leaf in new:
            frontier.append(leaf.hash or b"")

    async def _tell(self) -> None:
        """Publish the seals that the stream does not have, in their order, and write down those that the file lacks.

        Each is published once, by whoever does: the stream takes it only behind the one before.
        """
        COVERED.set(await self._database.read(seal_store.newest_sealed))
        js = self._nc.jetstream()
        sequence, size = await self._last_told()
        while found := await self._database.read(seal_store.seals_after, size):
            for seal in found:
                headers = {
                    "Content-Type": CONTENT_TYPE,
                    "Nats-Expected-Last-Subject-Sequence": str(sequence),
                }
                try:
                    told = await js.publish(LEDGER_SEALED, encode(_event(seal)), stream=STREAM, headers=headers)
                except APIError as error:
                    if error.err_code == WRONG_LAST_SEQUENCE:
                        return
                    raise
                sequence, size = told.seq, seal.head.size
        if self._file:
            await self._write_down(self._file)

    async def _last_told(self) -> tuple[int, int]:
        """Where the stream has its last seal, and what that one covers."""
        try:
            message = await self._nc.jetstream().get_last_msg(STREAM, LEDGER_SEALED)
        except NotFoundError:
            return 0, 0
        try:
            return message.seq or 0, decode_seal(message.data or b"").data.tree_size
        except PoisonMessage:
            # Somebody else's. Of our own, only the newest can be new.
            size = await self._database.read(seal_store.newest_sealed)
            return message.seq or 0, size - 1

    async def _write_down(self, file: SealsFile) -> None:
        while found := await self._database.read(seal_store.seals_after, await asyncio.to_thread(file.last_size)):
            await asyncio.to_thread(file.append, found)


def _seal_in(message: Recorded) -> LedgerSealed | None:
    if message.subject != LEDGER_SEALED:
        return None
    try:
        return decode_seal(message.body)
    except PoisonMessage:
        return None


def _seals_in(messages: Iterable[Recorded], *, above: int) -> list[LedgerSealed]:
    """Of more messages than `above`."""
    return [seal for message in messages if (seal := _seal_in(message)) and seal.data.tree_size > above]


def _event(seal: Sealed) -> LedgerSealed:
    signature = seal.signature
    return LedgerSealed(
        data=Seal(
            tree_size=seal.head.size,
            root_hash=seal.head.root.hex(),
            sealed_at=datetime.fromisoformat(seal.sealed_at),
            signature=base64.b64encode(signature.signature).decode() if signature else None,
            key_id=signature.key_id if signature else None,
        )
    )


def _key_of(seal: Sealed) -> str | None:
    return seal.signature.key_id if seal.signature else None
