"""The ledger's tables, built anew from the stream."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from nats.aio.client import Client
from sqlalchemy import Connection, Table, func, select

from services.ledger import store
from services.ledger.settings import Settings
from shared.database import patient_engine
from shared.events import Event
from shared.replay_command import as_of, console
from shared.replaying import Message
from shared.streams import LEDGER


class RebuiltLedger:
    """Every record follows from its event alone, and the sums of days from the records."""

    service = "ledger"
    durable = LEDGER
    migrations = Path(__file__).with_name("migrations")
    tables: tuple[Table, ...] = (store.usage, store.subscription_changes, store.usage_daily)
    kept: tuple[Table, ...] = (store.usage, store.subscription_changes)
    optional: tuple[Table, ...] = ()
    indexes: tuple[str, ...] = ()

    def load(self, db: Connection, messages: Sequence[Message]) -> list[Event]:
        return store.keep(db, [message.event for message in messages if message.event]).contradicting

    def derive(self, db: Connection, live: str | None) -> None:
        store.sum_up_days(db)

    def add(self, db: Connection, messages: Sequence[Message]) -> list[Event]:
        return store.record(db, [message.event for message in messages if message.event]).contradicting

    def adopt(self, db: Connection, old: Callable[[str], str]) -> None:
        pass

    async def restore(self, nc: Client, url: str) -> None:
        pass


async def show_past(settings: Settings, at: datetime, *, out: Path | None) -> None:
    """How many records there were by what the stream had at that moment, and of how many tokens."""
    async with as_of(settings, RebuiltLedger(), until=at, out=out) as file:
        engine = patient_engine(f"sqlite:///{file}", begin="BEGIN")
        with engine.begin() as db:
            records, tokens = db.execute(select(func.count(), func.sum(store.usage.c.tokens_used))).one()
        engine.dispose()
    console().print(f"ledger: {records:,} records of {tokens or 0:,} tokens at {at.isoformat()}")
