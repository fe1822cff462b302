"""Classic mistakes, put back one at a time: the machine must find each, or it proves nothing.

    python -m tests.faults.machine.mutants "ack before commit" services.ledger serve

Runs a module of ours with the mistake in it: patched in while the process starts, and nowhere in the product.
"""

import asyncio
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy
from sqlalchemy import Connection

from services.chat import publisher
from services.quota import handlers, store
from services.quota import totals as quota_totals
from shared import consumer, streams
from shared.events import Event, encode
from shared.plans import Plans
from shared.quarantine import Poison
from tests.faults.machine.schedule import Fault, Shape

SQLITE = Shape("sqlite", "sqlite")
# Between the two transactions of a mistake: long enough to be killed in it.
GAP_S = 1.0
# Whoever writes waits in line, two seconds each: that of a batch with events comes, too.
LOCKED_S = 12


@dataclass(frozen=True, slots=True)
class Mutant:
    """The mistake, the faults that expose it, and the words with which the checker must say so."""

    make: Callable[[], None]
    faults: tuple[Fault, ...]
    finds: str
    stream_bytes_max: int | None = None


def default_ack_policy() -> None:
    """What raised is terminated and never delivered again, as FastStream does unless it is told otherwise."""

    async def settle(messages: list[Msg], handle: consumer.Handler, failures: int) -> bool:
        try:
            await consumer.apply(handle, messages)
        except Exception:  # noqa: BLE001 - the mistake
            await _answer([message.term for message in messages])
        else:
            await _answer([message.ack for message in messages])
        return True

    consumer._settle = settle


def ack_before_commit() -> None:
    """Acknowledged as soon as it has arrived."""

    async def settle(messages: list[Msg], handle: consumer.Handler, failures: int) -> bool:
        await _answer([message.ack for message in messages])
        with suppress(Exception):
            await consumer.apply(handle, messages)
        return True

    consumer._settle = settle


async def _answer(answers: Sequence[Callable[[], Any]]) -> None:
    with suppress(NatsError):
        for answer in answers:
            await answer()


def fire_and_forget() -> None:
    """Published, and taken for stored: nobody waits for the stream to say so."""

    async def publish(
        js: JetStreamContext, subject: str, event: Event, *, headers: dict[str, str] | None = None, timeout_s: float
    ) -> int:
        await js._nc.publish(subject, encode(event), headers={"Nats-Msg-Id": event.id, **(headers or {})})
        return 0

    publisher.publish = publish


def dedupe_outside_the_transaction() -> None:
    """Events are marked as seen in one transaction, and counted in the next."""

    insert_once = vars(store)["insert_once"]

    def mark(db: Connection, plans: Plans, events: Sequence[Event]) -> list[Any]:
        marked: list[Any] = []

        def and_no_more(db: Connection, table: Any, rows: Any) -> Any:
            outcomes = insert_once(db, table, rows)
            if table is quota_totals.settlements:
                marked.extend(outcomes)
                raise _Marked
            return outcomes

        with suppress(_Marked), _instead(and_no_more):
            store.settle(db, plans, events)
        return marked

    def count(
        db: Connection, plans: Plans, events: Sequence[Event], poison: Sequence[Poison], marked: list[Any]
    ) -> store.Settled:
        def known(db: Connection, table: Any, rows: Any) -> Any:
            return marked if table is quota_totals.settlements else insert_once(db, table, rows)

        with _instead(known):
            return store.settle(db, plans, events, poison)

    async def on_usage(self: handlers.Handlers, events: list[Event], poison: list[Poison]) -> list[Event]:
        marked = await self._database.write(mark, self._plans, events)
        await asyncio.sleep(GAP_S)
        await self._database.write(count, self._plans, events, poison, marked)
        return []

    handlers.Handlers.on_usage = on_usage  # type: ignore[method-assign]


class _Marked(Exception):
    pass


@contextmanager
def _instead(insert_once: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, quota's store inserts so. On SQLite one thread writes: nobody else does meanwhile."""
    before = vars(store)["insert_once"]
    vars(store)["insert_once"] = insert_once
    try:
        yield
    finally:
        vars(store)["insert_once"] = before


def discard_old() -> None:
    """At its limit the stream drops the oldest messages, read or not, and tells nobody."""
    streams.USAGE_STREAM = replace(streams.USAGE_STREAM, discard=DiscardPolicy.OLD)


MUTANTS = {
    "default ack policy": Mutant(
        default_ack_policy, (Fault(1, LOCKED_S, "lock", "ledger"),), "LOST: ledger does not have generation.completed"
    ),
    "ack before commit": Mutant(
        ack_before_commit, (Fault(1, LOCKED_S, "lock", "ledger"),), "LOST: ledger does not have generation.completed"
    ),
    "fire-and-forget publish": Mutant(
        fire_and_forget, (Fault(1.5, 4, "half-open", "chat->nats", "deaf"),), "and no event says so"
    ),
    "dedupe outside the transaction": Mutant(
        dedupe_outside_the_transaction,
        # The second not before the process is there again, also on a busy machine.
        (Fault(2, 0, "kill", "quota"), Fault(9, 0, "kill", "quota")),
        "LOST: the total of",
    ),
    "discard: old": Mutant(
        discard_old, (Fault(1, 4, "stop", "ledger"),), "and no event says so", stream_bytes_max=40_000
    ),
}


if __name__ == "__main__":
    _, name, module, *arguments = sys.argv
    MUTANTS[name].make()
    sys.argv = [module, *arguments]
    if module == "shared.streams":  # run by its name, it would be another module than the one with the mistake
        asyncio.run(streams.main())
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
