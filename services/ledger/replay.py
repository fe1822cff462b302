"""The ledger's tables, built anew from the stream."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection, Table, func, select

from services.ledger import store
from services.ledger.checkpoint import Keys
from services.ledger.partitions import USAGE_ONLY_GROWS
from services.ledger.seal_store import Damaged
from services.ledger.sealer import Lost, Rewritten, Sealer
from services.ledger.settings import Settings
from shared.append_only import AppendOnly
from shared.database import Database, patient_engine
from shared.errors import Misconfigured, Unavailable
from shared.events import Event
from shared.loading import PlainRows, Value
from shared.plain import PlainAuthorized, PlainGeneration, utc_text
from shared.plans import COUNTS
from shared.record import Record
from shared.replay_command import as_of, console
from shared.streams import LEDGER

PLAIN_COLUMNS = (
    *("id", "event_type", "user_id", "action_type", "model", *COUNTS, "outcome", "usage_source", "on_disconnect"),
    *("metadata", "created_at", "usage_date", "completed_at", "generation_id", "provider_request_id", "authorized"),
)


def plain_row(generation: PlainGeneration) -> tuple[Value, ...]:
    """What `store.usage_rows` makes of the same event, in the order of PLAIN_COLUMNS and as a database keeps it."""
    data = generation.data
    created_at = utc_text(data.started_at)
    return (
        generation.id,
        generation.type,
        data.user_id,
        data.action_type,
        data.model,
        data.tokens_used,
        data.input_tokens,
        data.output_tokens,
        data.cache_creation_input_tokens,
        data.cache_read_input_tokens,
        data.outcome,
        data.usage_source,
        data.on_disconnect,
        bytes(data.metadata).decode(),
        created_at,
        created_at[:10],
        utc_text(data.completed_at),
        data.generation_id,
        data.provider_request_id,
        _authorized(data.authorized),
    )


def _authorized(told: PlainAuthorized | None) -> str | None:
    """JSON; the texts of what is plain need no escape."""
    if told is None:
        return None
    return (
        f'{{"input_tokens_max":{told.input_tokens_max},"output_tokens_asked":{told.output_tokens_asked},'
        f'"output_tokens_granted":{told.output_tokens_granted},"hold_tokens":{told.hold_tokens},'
        f'"tier":"{told.tier}","period":"{told.period}","period_start":{_moment(told.period_start)},'
        f'"resets_at":{_moment(told.resets_at)},"expires_at":{_moment(told.expires_at)}}}'
    )


def _moment(moment: datetime | None) -> str:
    return "null" if moment is None else f'"{utc_text(moment)}"'


class RebuiltLedger:
    """Every record follows from its event alone, and the sums of days from the records."""

    service = "ledger"
    durable = LEDGER
    migrations = Path(__file__).with_name("migrations")
    tables: tuple[Table, ...] = (store.usage, store.subscription_changes, store.usage_daily)
    kept: tuple[Table, ...] = (store.usage, store.subscription_changes)
    append_only: tuple[AppendOnly, ...] = (
        USAGE_ONLY_GROWS,
        AppendOnly("subscription_changes", "event_id"),
        AppendOnly("leaves", "stream_sequence", on_replace="abort"),
        AppendOnly("seals", "tree_size", on_replace="abort"),
    )
    indexes: tuple[str, ...] = ()
    plain = PlainRows(store.usage, PLAIN_COLUMNS, plain_row)

    def load(self, db: Connection, events: Sequence[Event]) -> list[Event]:
        return store.keep(db, events).contradicting

    def derive(self, db: Connection, live: str | None) -> None:
        store.sum_up_days(db)

    def add(self, db: Connection, events: Sequence[Event]) -> list[Event]:
        return store.record(db, events).contradicting

    def adopt(self, db: Connection, old: Callable[[str], str]) -> None:
        pass

    async def lost(self, record: Record, url: str) -> list[str]:
        async with _sealer(record, url) as sealer:
            try:
                return _in_words(
                    await sealer.lost(), "are missing, and would be made anew as the stream's seals tell"
                )
            except Rewritten as damage:
                return [f"{LOST}, and the record is not what was sealed: {damage}"]
            except Damaged as damage:
                return [f"{CHANGED}: {damage}"]

    async def restore(self, record: Record, url: str) -> list[str]:
        """Leaves and seals, where the record fits the seals on the stream: what is there stays whatever it is."""
        async with _sealer(record, url) as sealer:
            try:
                lost, left = await sealer.restore(), await sealer.lost()
                made = lost._replace(leaves=lost.leaves - left.leaves, seals=lost.seals - left.seals)
                return [
                    *_in_words(made, "were missing, and are made anew as the stream's seals tell"),
                    *_in_words(left, "do not fit what is there, which stays: make audit names it"),
                ]
            except Rewritten as damage:
                raise Misconfigured(
                    f"{LOST}, and the record is not what was sealed: {damage}. Nothing was changed. Restore the "
                    "broker's store first; make audit names what is wrong. --despite-gaps replays it as it is."
                ) from damage
            except Damaged as damage:
                return [f"{CHANGED}: {damage}"]
            except Unavailable:
                return ["leaves and seals are being made anew by the ledger that runs"]


LOST = "The ledger has lost leaves and seals"
CHANGED = "leaves and seals that are there were changed, and stay as they are; make audit names them"


@asynccontextmanager
async def _sealer(record: Record, url: str) -> AsyncIterator[Sealer]:
    """One that seals nothing by itself."""
    database = Database(url)
    try:
        yield Sealer(record.nc, database, keys=Keys(None, {}), every_s=0.0, archive=record.archive)
    finally:
        await database.close()


def _in_words(lost: Lost, what: str) -> list[str]:
    return [f"{lost.leaves:,} leaves and {lost.seals:,} seals {what}"] if lost.seals else []


async def show_past(settings: Settings, at: datetime, *, out: Path | None) -> None:
    """How many records there were by what the stream had at that moment, and of how many tokens."""
    async with as_of(settings, RebuiltLedger(), until=at, out=out) as file:
        engine = patient_engine(f"sqlite:///{file}", begin="BEGIN")
        with engine.begin() as db:
            records, tokens = db.execute(select(func.count(), func.sum(store.usage.c.tokens_used))).one()
        engine.dispose()
    console().print(f"ledger: {records:,} records of {tokens or 0:,} tokens at {at.isoformat()}")
