"""What a run left: the log, what the stand-in gave, the stream, the databases. Read once, judged elsewhere."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from sqlalchemy import Row, create_engine, make_url, text

from shared.broker import connect
from shared.errors import PoisonMessage
from shared.events import Event, decode
from shared.streams import LEDGER_SEALED, STREAM
from tests.faults.machine.log import Line, read
from tests.faults.machine.places import Places

FETCH = 500


class Given(NamedTuple):
    """What the provider gave to one request. Cached input is input."""

    op: str
    outcome: str
    input_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Counted(NamedTuple):
    """An event as one of the databases has it."""

    user_id: str
    tokens: int
    input_tokens: int
    output_tokens: int


class Total(NamedTuple):
    user_id: str
    begins: datetime
    ends: datetime
    tokens: int


class Hold(NamedTuple):
    generation_id: str
    user_id: str
    tokens: int
    expires_at: datetime


@dataclass(frozen=True)
class Evidence:
    log: Sequence[Line] = ()
    given: Sequence[Given] = ()
    # In the order of the stream; what is no event of ours is in `poison`, by its SHA-256.
    events: Sequence[Event] = ()
    poison: frozenset[str] = frozenset()
    # Of events that say something else than an earlier one of the same id.
    contradicting: frozenset[str] = frozenset()
    ledger: dict[str, Counted] = field(default_factory=dict)
    settlements: dict[str, Counted] = field(default_factory=dict)
    plan_changes: dict[str, dict[str, str]] = field(default_factory=dict)
    totals: Sequence[Total] = ()
    holds: Sequence[Hold] = ()
    # By service, the SHA-256 of what is in quarantine.
    quarantine: dict[str, frozenset[str]] = field(default_factory=dict)
    unsent: int = 0
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


def gather(places: Places) -> Evidence:
    bodies = asyncio.run(_stream(places.nats_url))
    events: list[Event] = []
    first: dict[str, Event] = {}
    poison, contradicting = set(), set()
    for body in bodies:
        digest = hashlib.sha256(body).hexdigest()
        try:
            event = decode(body)
        except PoisonMessage:
            poison.add(digest)
            continue
        events.append(event)
        if first.setdefault(event.id, event).data != event.data:
            contradicting.add(digest)
    counts = "input_tokens + cache_creation_input_tokens + cache_read_input_tokens AS input, output_tokens"
    ledger = _rows(places.ledger_url, f"SELECT id, user_id, tokens_used, {counts} FROM usage")  # noqa: S608 - ours
    settled = _rows(places.quota_url, f"SELECT event_id AS id, user_id, tokens_used, {counts} FROM settlements")  # noqa: S608
    quarantined = {
        name: frozenset(row.body_sha256 for row in _rows(url, "SELECT body_sha256 FROM quarantine"))
        for name, url in (("ledger", places.ledger_url), ("quota", places.quota_url))
    }
    changes = {
        "ledger": _rows(places.ledger_url, "SELECT event_id, tier FROM subscription_changes"),
        "quota": _rows(places.quota_url, "SELECT event_id, tier FROM plan_changes"),
    }
    return Evidence(
        log=read(Path(places.log)),
        given=[_given(json.loads(line)) for line in Path(places.given).read_text().splitlines()],
        events=events,
        poison=frozenset(poison),
        contradicting=frozenset(contradicting),
        ledger={row.id: _counted(row) for row in ledger},
        settlements={row.id: _counted(row) for row in settled},
        plan_changes={name: {row.event_id: row.tier for row in rows} for name, rows in changes.items()},
        totals=[
            Total(row.user_id, _moment(row.period_start), _moment(row.period_end), int(row.tokens_used))
            for row in _rows(
                places.quota_url, "SELECT user_id, period_start, period_end, tokens_used FROM usage_totals"
            )
        ],
        holds=[
            Hold(row.generation_id, row.user_id, int(row.tokens), _moment(row.expires_at))
            for row in _rows(places.quota_url, "SELECT generation_id, user_id, tokens, expires_at FROM holds")
        ],
        quarantine=quarantined,
        unsent=_unsent(places.outbox),
    )


async def _stream(url: str) -> list[bytes]:
    """Every event, from the first to what was the last when we began. Seals count nothing."""
    nats = await connect(url, name="checker")
    try:
        js = nats.jetstream()
        left = (await js.stream_info(STREAM)).state.messages
        config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.NONE, inactive_threshold=60)
        pulling = await js.pull_subscribe("", stream=STREAM, config=config)
        messages: list[Msg] = []
        while len(messages) < left:
            try:
                messages += await pulling.fetch(min(FETCH, left - len(messages)), timeout=10)
            except NatsTimeoutError:
                raise RuntimeError(f"the stream gave {len(messages)} of {left} messages") from None
        return [message.data for message in messages if message.subject != LEDGER_SEALED]
    finally:
        await nats.close()


def _rows(url: str, statement: str) -> Sequence[Row[Any]]:
    parsed = make_url(url)
    driver = "sqlite" if parsed.get_backend_name() == "sqlite" else "postgresql+psycopg"
    engine = create_engine(parsed.set(drivername=driver))
    try:
        with engine.connect() as db:
            return db.execute(text(statement)).all()
    finally:
        engine.dispose()


def _given(record: dict[str, Any]) -> Given:
    cached = record["cacheCreationInputTokens"] + record["cacheReadInputTokens"]
    return Given(record.get("tag", ""), record["outcome"], record["inputTokens"] + cached, record["outputTokens"])


def _counted(row: Row[Any]) -> Counted:
    return Counted(row.user_id, int(row.tokens_used), int(row.input or 0), int(row.output_tokens or 0))


def _moment(value: Any) -> datetime:
    """SQLite keeps moments as text."""
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    return moment.astimezone(UTC)


def _unsent(outbox: str) -> int:
    with closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM outbox").fetchone()[0])
