"""Quota under a storm: four processes on one database, 2,000 callers for one user, kills, and clocks apart."""

import asyncio
import json
import random
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate, groupby
from math import ceil
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from nats.aio.client import Client
from sqlalchemy import Connection, column, create_engine, make_url, select, text, update

from services.quota import store
from services.quota.domain import Account
from services.quota.subscriptions import subscriptions
from services.quota.totals import settlements, totals
from shared.broker import connect
from shared.calls import HOLD_TTL, Authorization, Authorize, Granted, Refused, Usage
from shared.database import Database, is_sqlite, now
from shared.errors import BadCall
from shared.events import Event, GenerationCompleted, TokenCounts, new_id
from shared.plans import Period, Plans
from shared.settings import sqlite_url
from tests.builders import (
    NOON,
    generation_completed,
    publish,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)
from tests.fixtures import Postgres, broker_in, eventually, migrate, new_database
from tests.quota_process import (
    SERVE,
    Quota,
    Replica,
    authorize,
    authorize_once,
    create_stream,
    everything_is_acknowledged,
    started,
    usage_of,
)

LIMIT = 1_000_000
CALLERS, GENERATIONS = 2_000, 3
# The plan's `output_tokens_min`: a generation that wants less wants all of it.
USEFUL_OUTPUT_TOKENS = 64
# Asked again after this. A call that a living process still has then is answered twice, and held once.
ANSWER_WITHIN_S = 2
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
# Of three processes, each is among those that answer so many questions.
OFTEN = 30

# "none": no period ends in the middle of a run.
PLANS_FILE = f"""
default = "storm"
[plans.storm]
limit_tokens = {LIMIT}
period = "none"
[plans.daily]
limit_tokens = {LIMIT}
period = "day"
[plans.monthly]
limit_tokens = {LIMIT}
period = "month"
"""


@pytest.fixture(scope="module")
def plans_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plans.toml"
    path.write_text(PLANS_FILE)
    return path


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker with the empty stream. The storms share it, and keep apart by their users."""
    with broker_in(tmp_path_factory.mktemp("nats")) as url:
        asyncio.run(create_stream(url))
        yield url


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def quota(
    request: pytest.FixtureRequest, bus: str, plans_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Quota]:
    """Four processes on one database."""
    folder = tmp_path_factory.mktemp("quota")
    with new_database(request, request.param, folder, "quota") as url:
        replicas = [Replica(_settings(bus, url, plans_file), folder / f"{n}.log") for n in range(4)]
        with started(replicas):
            yield Quota(replicas, url)


def _settings(bus: str, database_url: str, plans_file: Path) -> dict[str, str]:
    return {
        "CHATRAIL_NATS_URL": bus,
        "CHATRAIL_QUOTA_DATABASE_URL": database_url,
        "CHATRAIL_PLANS": str(plans_file),
    }


@pytest.fixture
async def nats(bus: str) -> AsyncIterator[Client]:
    client = await connect(bus, name="test")
    yield client
    await client.close()


@pytest.fixture
async def database(quota: Quota) -> AsyncIterator[Database]:
    """Quota's own, seen from outside the service."""
    database = Database(quota.database_url)
    yield database
    await database.close()


class State(NamedTuple):
    """What one snapshot of the database says of a user. Every hold of these tests is an open one."""

    used_tokens: int
    held_tokens: int
    settled_tokens: int


# One statement is one snapshot on both databases.
_STATE = text(
    "SELECT (SELECT coalesce(sum(tokens_used), 0) FROM usage_totals WHERE user_id = :user_id),"
    " (SELECT coalesce(sum(tokens), 0) FROM holds WHERE user_id = :user_id),"
    " (SELECT coalesce(sum(tokens_used), 0) FROM settlements WHERE user_id = :user_id)"
)


@asynccontextmanager
async def observed(quota: Quota, user_id: str) -> AsyncIterator[list[State]]:
    """The committed states of the user, as a connection of its own sees them all the time until it ends."""
    states: list[State] = []
    over = threading.Event()

    def observe() -> None:
        url = make_url(quota.database_url)
        driver = "sqlite" if url.get_backend_name() == "sqlite" else "postgresql+psycopg"
        engine = create_engine(url.set(drivername=driver), isolation_level="AUTOCOMMIT")
        with engine.connect() as db:
            is_last = False
            while not is_last:
                is_last = over.is_set()
                states.append(State(*map(int, db.execute(_STATE, {"user_id": user_id}).one())))
        engine.dispose()

    observing = asyncio.create_task(asyncio.to_thread(observe))
    try:
        yield states
    finally:
        over.set()
        await observing


def requests_of(user_id: str, seed: int) -> list[Authorize]:
    """Of all sizes, the same in every run: some may be cut short, some must fit whole, and a few never fit."""
    sizes = random.Random(seed)  # noqa: S311 - no secret
    requests = []
    for n in range(CALLERS * GENERATIONS):
        output_tokens_max = sizes.choice([sizes.randint(1, 63), sizes.randint(64, 600), sizes.randint(600, 2_000)])
        requests.append(
            Authorize(
                generation_id=new_id(),
                user_id=user_id,
                input_tokens_max=sizes.randint(0, 1_500) if n % 100 else LIMIT,
                output_tokens_min=min(output_tokens_max, sizes.choice([1, 1, 8, 200, 2_000])),
                output_tokens_max=output_tokens_max,
            )
        )
    return requests


def least_tokens(request: Authorize) -> int:
    """What must fit, at the least, on a plan without weights."""
    useful = max(request.output_tokens_min, min(USEFUL_OUTPUT_TOKENS, request.output_tokens_max))
    return request.input_tokens_max + useful


def settling(request: Authorize, tokens_used: int, at: datetime) -> GenerationCompleted:
    """The generation's event: as chat publishes it, it has the generation's id."""
    event = generation_completed(
        request.user_id,
        input_tokens=tokens_used,
        output_tokens=0,
        generation_id=request.generation_id,
        started_at=at,
    )
    return event.model_copy(update={"id": request.generation_id})


class Told(NamedTuple):
    """A generation that was granted."""

    request: Authorize
    granted: Granted

    @property
    def hold_tokens(self) -> int:
        return self.request.input_tokens_max + self.granted.output_tokens_max

    @property
    def is_cut_short(self) -> bool:
        return self.granted.output_tokens_max < self.request.output_tokens_max

    def ending(self) -> GenerationCompleted:
        """Most of what was held was used, and never nothing."""
        return settling(self.request, ceil(self.hold_tokens * 0.9), self.granted.started_at)


@dataclass
class Callers:
    """2,000 at once, each with one generation after the other: most that are granted are settled, some are not."""

    nats: Client
    granted: dict[str, Told] = field(default_factory=dict)
    refused: list[tuple[Authorize, Refused]] = field(default_factory=list)
    settled: dict[str, int] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)
    calls: int = 0
    answers: int = 0
    many_are_answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, requests: Sequence[Authorize], ask: Callable[[Authorize], Awaitable[Authorization]]) -> None:
        async def generate(mine: Sequence[Authorize]) -> None:
            for request in mine:
                await self._told(request, await ask(request))

        await asyncio.gather(*(generate(requests[n::CALLERS]) for n in range(CALLERS)))

    async def ask(self, request: Authorize) -> Authorization:
        answer = await authorize_once(self.nats, request)
        assert answer
        return answer

    async def ask_until_answered(self, request: Authorize) -> Authorization:
        """Under the same id: whoever dies in between may have granted it already."""

        async def ask() -> Authorization | None:
            self.calls += 1
            answer = await authorize_once(self.nats, request, timeout_s=ANSWER_WITHIN_S)
            if answer is None:
                self.unanswered.add(request.generation_id)
            return answer

        return await eventually(ask)

    async def _told(self, request: Authorize, answer: Authorization) -> None:
        self.answers += 1
        if self.answers == CALLERS // 2:
            self.many_are_answered.set()
        if isinstance(answer, Granted):
            told = self.granted[request.generation_id] = Told(request, answer)
            if len(self.granted) % 10:
                await self._settle(told.ending())
        else:
            self.refused.append((request, answer))
            if request.generation_id in self.unanswered:
                # A living process may have been so slow that it grants the first question now.
                await self._settle(settling(request, 0, datetime.now(UTC)))

    async def _settle(self, event: GenerationCompleted) -> None:
        self.settled[event.id] = event.data.tokens_used
        await publish(self.nats, event)

    @property
    def open(self) -> dict[str, Told]:
        """Granted, and not settled."""
        return {id_: told for id_, told in self.granted.items() if id_ not in self.settled}


def check_refusals(callers: Callers, what: str) -> None:
    """Each was right by the numbers that it names itself, and names why."""
    false_refusals = [
        (request, refused)
        for request, refused in callers.refused
        if least_tokens(request) <= refused.tokens_available
    ]
    told = f"{len(callers.granted)} granted, {len(callers.refused)} refused, {len(callers.unanswered)} asked again"
    print(f"\n{what}: {told}, false refusals: {len(false_refusals)}")  # noqa: T201 - shown by pytest -s
    assert false_refusals == []
    assert {refused.reason for _, refused in callers.refused} == {"held", "tokens"}
    for request, refused in callers.refused:
        unused = LIMIT - refused.usage.tokens_used
        assert refused.tokens_available == unused - refused.usage.tokens_held
        assert (refused.reason == "tokens") == (least_tokens(request) > unused)


def check_states(states: Sequence[State]) -> None:
    assert max(state.used_tokens + state.held_tokens for state in states) <= LIMIT
    assert [state for state in states if state.used_tokens != state.settled_tokens] == []
    # In the middle of it, too, and not at its ends alone.
    assert len({state for state in states if state.used_tokens and state.held_tokens}) >= 5


async def check_the_end(callers: Callers, database: Database, user_id: str) -> None:
    """What is open and what is settled is what the callers were told, and nothing else."""
    settled = select(*settlements.c["event_id", "tokens_used"]).where(settlements.c.user_id == user_id)
    held = select(*store.holds.c["generation_id", "tokens", "output_tokens", "started_at"]).where(
        store.holds.c.user_id == user_id
    )
    ended, under_way = await database.read(lambda db: (db.execute(settled).all(), db.execute(held).all()))
    assert {row.event_id: row.tokens_used for row in ended} == callers.settled
    assert {row.generation_id: tuple(row)[1:] for row in under_way} == {
        generation_id: (told.hold_tokens, told.granted.output_tokens_max, told.granted.started_at)
        for generation_id, told in callers.open.items()
    }
    usage = await usage_of(callers.nats, user_id)
    assert usage.tokens_used == sum(callers.settled.values())
    assert usage.tokens_held == sum(told.hold_tokens for told in callers.open.values())


class History:
    """What was committed, in order: everything that was settled, and everything that was granted."""

    def __init__(self, granted: Mapping[str, Told], settled: Sequence[Sequence[tuple[str, int]]]) -> None:
        """`settled`: (generation, tokens used) of each transaction."""
        # One transaction gives all its holds one moment, and no two have the same.
        moments = groupby(sorted(granted.values(), key=_moment), key=_moment)
        per_moment = {moment: sum(told.hold_tokens for told in group) for moment, group in moments}
        self.granted_by = dict(zip(per_moment, accumulate(per_moment.values()), strict=True))
        used = accumulate((sum(tokens for _, tokens in group) for group in settled), initial=0)
        released = accumulate((sum(granted[id_].hold_tokens for id_, _ in group) for group in settled), initial=0)
        self.released_by = dict(zip(used, released, strict=True))
        self._granted_tokens = {0, *self.granted_by.values()}

    def was(self, used_tokens: int, held_tokens: int) -> bool:
        """Whether there was such a state."""
        released = self.released_by.get(used_tokens)
        return released is not None and held_tokens + released in self._granted_tokens

    def was_full_after(self, moment: datetime) -> bool:
        """Whether nothing can have been left when the holds of that moment stood."""
        granted = self.granted_by[moment]
        return any(used + granted - released == LIMIT for used, released in self.released_by.items())


def _moment(told: Told) -> datetime:
    return told.granted.started_at


def settled_in_order(db: Connection, user_id: str) -> list[list[tuple[str, int]]]:
    """(generation, tokens used) of each transaction; on SQLite, which does not tell, of each row."""
    order = "rowid" if is_sqlite(db) else "CAST(CAST(xmin AS text) AS bigint)"
    columns = (*settlements.c["event_id", "tokens_used"], text(f"{order} AS place"))
    query = select(*columns).where(settlements.c.user_id == user_id).order_by(text("place"))
    rows = db.execute(query).all()
    return [[(row[0], row[1]) for row in group] for _, group in groupby(rows, key=itemgetter(2))]


async def test_in_a_storm_the_limit_holds_in_every_committed_state_and_every_refusal_is_right(
    quota: Quota, nats: Client, database: Database
) -> None:
    user_id = f"storm {new_id()}"
    callers = Callers(nats)

    async with observed(quota, user_id) as states:
        await callers.run(requests_of(user_id, seed=1), callers.ask)
        await everything_is_acknowledged(nats)

    assert callers.answers == CALLERS * GENERATIONS
    check_states(states)
    check_refusals(callers, "storm")
    await check_the_end(callers, database, user_id)
    history = History(callers.granted, await database.read(settled_in_order, user_id))
    assert [state for state in states if not history.was(state.used_tokens, state.held_tokens)] == []
    shown = [refused.usage for _, refused in callers.refused]
    assert [usage for usage in shown if not history.was(usage.tokens_used, usage.tokens_held)] == []
    # Cut short is only what comes to the limit, and then exactly to what was left.
    cut_short = [told for told in callers.granted.values() if told.is_cut_short]
    assert cut_short
    assert [told for told in cut_short if not history.was_full_after(told.granted.started_at)] == []


async def test_in_a_storm_in_which_processes_are_killed_the_limit_holds_and_no_hold_is_doubled_or_lost(
    quota: Quota, nats: Client, database: Database
) -> None:
    user_id = f"kills {new_id()}"
    callers = Callers(nats)
    victims = quota.replicas[:2]

    async with observed(quota, user_id) as states:
        storm = asyncio.create_task(callers.run(requests_of(user_id, seed=2), callers.ask_until_answered))
        await callers.many_are_answered.wait()
        # They stand still wherever they are, in a transaction or not, until they have calls to die with.
        for victim in victims:
            victim.process.send_signal(signal.SIGSTOP)
        calls = callers.calls

        async def are_called_in_vain() -> bool:
            return callers.calls >= calls + CALLERS // 4

        await eventually(are_called_in_vain)
        await nats.flush()  # the broker has handed those calls over
        assert [victim.stop(signal.SIGKILL) for victim in victims] == [-signal.SIGKILL] * 2
        for victim in victims:
            victim.start()
        for victim in victims:
            await asyncio.to_thread(victim.wait_until_ready)
        await storm
        await everything_is_acknowledged(nats)

    assert callers.answers == CALLERS * GENERATIONS
    assert callers.unanswered
    check_states(states)
    check_refusals(callers, "storm with kills")
    await check_the_end(callers, database, user_id)
    for told in callers.open.values():
        assert _what_is_held(await authorize(nats, told.request)) == _what_is_held(told.granted)
    await check_the_end(callers, database, user_id)


def _what_is_held(answer: Authorization | BaseException) -> tuple[int, datetime]:
    assert isinstance(answer, Granted)
    return answer.output_tokens_max, answer.started_at


# Clocks apart.

SKEWS = {"slow": -HOUR, "right": timedelta(0), "fast": HOUR}


@dataclass(frozen=True)
class Apart:
    """Three processes whose clocks are an hour slow, right, and an hour fast; and a caller and their database."""

    replicas: Mapping[str, Replica]
    nats: Client
    database: Database

    async def ask_until_each_has_authorized(self, user_id: str) -> list[Told]:
        """Small generations; every process has authorized one of them, at the least."""
        told = []

        async def look() -> bool:
            request = Authorize(
                generation_id=new_id(),
                user_id=user_id,
                input_tokens_max=10,
                output_tokens_min=1,
                output_tokens_max=10,
            )
            answer = await authorize(self.nats, request)
            assert isinstance(answer, Granted)
            told.append(Told(request, answer))
            return len(told) > 1 and set(self.replicas) == {row.authorized_by for row in await self.holds(user_id)}

        await eventually(look)
        return told

    async def ask_again(self, told: Told) -> list[Authorization | BaseException]:
        """So often that every process is among those that answer."""
        again = (authorize(self.nats, told.request) for _ in range(OFTEN))
        return await asyncio.gather(*again, return_exceptions=True)

    async def usages(self, user_id: str) -> list[Usage]:
        return await asyncio.gather(*(usage_of(self.nats, user_id) for _ in range(OFTEN)))

    async def settle_until_each_has(self, user_id: str) -> int:
        """Reports of one token; every process has settled one of them, at the least. How many there were."""
        before = {name: len(replica.said("usage_settled")) for name, replica in self.replicas.items()}
        events = 0

        async def look() -> bool:
            nonlocal events
            events += 1
            started_at = await self.database.read(now)
            await publish(self.nats, usage_reported(user_id, tokens_used=1, started_at=started_at))
            return all(len(r.said("usage_settled")) > before[name] for name, r in self.replicas.items())

        await eventually(look)
        await everything_is_acknowledged(self.nats)
        return events

    async def holds(self, user_id: str) -> Sequence[Any]:
        mine = select(store.holds, column("authorized_by")).where(store.holds.c.user_id == user_id)
        return await self.database.read(lambda db: db.execute(mine).all())

    async def expire(self, time: timedelta, told: Sequence[Told]) -> None:
        """As if these had so much time left, by the database's clock."""
        which = store.holds.c.generation_id.in_([each.request.generation_id for each in told])
        await self.database.write(
            lambda db: db.execute(update(store.holds).where(which).values(expires_at=now(db) + time))
        )


@pytest.fixture(scope="module")
def replicas_apart(
    postgres: Postgres, plans_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Replica]]:
    """On PostgreSQL: on SQLite all processes are on one machine, and have its clock."""
    folder = tmp_path_factory.mktemp("apart")
    with broker_in(folder) as bus, postgres.new_database("quota") as url:
        asyncio.run(create_stream(bus))
        with psycopg.connect(url, autocommit=True) as connection:
            # What a process is named in PGAPPNAME tells who authorized what.
            connection.execute(
                "ALTER TABLE holds ADD COLUMN authorized_by text DEFAULT current_setting('application_name')"
            )
        replicas = {
            name: Replica(
                {**_settings(bus, url, plans_file), "PGAPPNAME": name},
                folder / f"{name}.log",
                ("tests.faults.skewed", str(round(skew / SECOND)), *SERVE),
            )
            for name, skew in SKEWS.items()
        }
        with started(list(replicas.values())):
            yield replicas


@pytest.fixture
async def apart(replicas_apart: Mapping[str, Replica]) -> AsyncIterator[Apart]:
    settings = replicas_apart["right"].settings
    nats = await connect(settings["CHATRAIL_NATS_URL"], name="test")
    database = Database(settings["CHATRAIL_QUOTA_DATABASE_URL"])
    yield Apart(replicas_apart, nats, database)
    await database.close()
    await nats.close()


async def test_the_processes_clocks_are_an_hour_apart(apart: Apart) -> None:
    await apart.settle_until_each_has(f"clocks {new_id()}")
    for name, replica in apart.replicas.items():
        believed = datetime.fromisoformat(replica.said("usage_settled")[-1]["timestamp"])
        assert abs(believed - datetime.now(UTC) - SKEWS[name]) < MINUTE


async def test_a_hold_of_one_process_is_found_by_others_whose_clocks_are_an_hour_off(apart: Apart) -> None:
    user_id = f"found {new_id()}"
    before = await apart.database.read(now)
    held = await apart.ask_until_each_has_authorized(user_id)
    after = await apart.database.read(now)

    for hold in await apart.holds(user_id):
        assert before <= hold.started_at <= after
        assert hold.expires_at == hold.started_at + HOLD_TTL
    for told in held:
        again = await apart.ask_again(told)
        assert {_what_is_held(answer) for answer in again} == {_what_is_held(told.granted)}
    assert {usage.tokens_held for usage in await apart.usages(user_id)} == {sum(told.hold_tokens for told in held)}


async def test_a_hold_expires_by_the_databases_clock_whoever_is_asked(apart: Apart) -> None:
    user_id = f"expiring {new_id()}"
    held = await apart.ask_until_each_has_authorized(user_id)
    expired, standing = held[::2], held[1::2]
    await apart.expire(-SECOND, expired)
    await apart.expire(MINUTE, standing)

    tokens_held = sum(told.hold_tokens for told in standing)
    assert {usage.tokens_held for usage in await apart.usages(user_id)} == {tokens_held}
    for told in standing:
        assert {_what_is_held(answer) for answer in await apart.ask_again(told)} == {_what_is_held(told.granted)}
    for told in expired:
        assert {type(answer) for answer in await apart.ask_again(told)} == {BadCall}


async def test_expired_holds_are_reported_by_the_databases_clock(apart: Apart) -> None:
    user_id = f"reported {new_id()}"
    held = await apart.ask_until_each_has_authorized(user_id)
    expired, standing = held[::2], held[1::2]
    await apart.expire(-SECOND, expired)
    await apart.expire(MINUTE, standing)

    async def reported() -> list[str]:
        lines = [line for replica in apart.replicas.values() for line in replica.said("hold_expired")]
        return [line["generation_id"] for line in lines if line["user_id"] == user_id]

    # A process looks for expired holds when it starts. By their clocks, slow finds none and fast all.
    off = [apart.replicas[name] for name in ("slow", "fast")]
    for replica in off:
        replica.stop()
        replica.start()
    for replica in off:
        await asyncio.to_thread(replica.wait_until_ready)
    await eventually(reported)
    assert sorted(await reported()) == sorted(told.request.generation_id for told in expired)


@pytest.mark.parametrize("hour", [23, 0])
async def test_the_period_is_the_databases_where_it_is_another_day_by_a_processs_clock(
    apart: Apart, hour: int
) -> None:
    user_id = f"at {hour} {new_id()}"
    before = await apart.database.read(now)
    zone = zone_where_it_is(hour, before)
    # Long enough ago that nothing of this day is of the plan before it.
    changed_at = before - 3 * DAY
    await publish(apart.nats, subscription_changed(user_id, "daily", time_zone=zone, changed_at=changed_at))
    await everything_is_acknowledged(apart.nats)

    tokens_used = await apart.settle_until_each_has(user_id)
    held = await apart.ask_until_each_has_authorized(user_id)
    usages = await apart.usages(user_id)
    after = await apart.database.read(now)

    days = {Period.containing(moment, "day", zone) for moment in (before, after)}
    kept = select(*totals.c["period_start", "period_end"]).where(totals.c.user_id == user_id)
    assert {Period(*row) for row in await apart.database.read(lambda db: db.execute(kept).all())} <= days
    assert {hold.period_start for hold in await apart.holds(user_id)} <= {day.start for day in days}
    assert {(usage.period_start, usage.resets_at) for usage in usages} <= {day.bounds for day in days}
    if len(days) == 1:  # and did not end just now
        assert {usage.tokens_used for usage in usages} == {tokens_used}
        assert {usage.tokens_held for usage in usages} == {sum(told.hold_tokens for told in held)}


def zone_where_it_is(hour: int, at: datetime) -> str:
    """A zone whose clocks show that hour then. Its name has the sign the other way round."""
    ahead = next(hours for hours in range(-12, 15) if (at.hour + hours) % 24 == hour)
    return f"Etc/GMT{-ahead:+d}"


# The stream again, in any order.

CHANGING = "user_3"


def half_a_year() -> list[Event]:
    """Of four users, one of whom changes plans: the same in every run, but for the ids."""
    chance = random.Random(3)  # noqa: S311 - no secret
    events: list[Event] = []
    for n in range(300):
        user_id, moment = f"user_{n % 4}", NOON - chance.randrange(180 * 24 * 3600) * SECOND
        kind = chance.choices(["generation", "report", "correction", "top-up"], [6, 2, 1, 1])[0]
        if kind == "generation":
            model = chance.choice(["claude-haiku-4-5", "claude-opus-4-8", "claude-sonnet-4-6"])
            counts = {name: chance.randrange(5_000) for name in TokenCounts.model_fields}
            events.append(generation_completed(user_id, model=model, started_at=moment, **counts))
        elif kind == "report":
            events.append(usage_reported(user_id, tokens_used=chance.randrange(5_000), started_at=moment))
        elif kind == "correction":
            events.append(usage_adjusted(user_id, chance.randrange(-500, 500), effective_at=moment))
        else:
            lasts = chance.random() < 0.5
            events.append(topped_up(user_id, chance.randrange(5_000), lasts=lasts, effective_at=moment))
    for n, tier in enumerate(["daily", "monthly", "storm", "daily", "monthly"]):
        zone = chance.choice([None, "Asia/Kolkata", "America/New_York"])
        moment = NOON - (150 - 30 * n) * DAY
        events.append(subscription_changed(CHANGING, tier, time_zone=zone, changed_at=moment))
    return sorted(events, key=lambda event: event.id)


class Counted(NamedTuple):
    """All that a stream comes to. `totals`: of whoever changes plans, it depends on the order which are kept."""

    settlements: dict[str, tuple[Any, ...]]
    subscriptions: set[tuple[Any, ...]]
    totals: dict[tuple[Any, ...], tuple[Any, ...]]
    accounts: list[dict[str, Account]]


def counted(db: Connection, plans: Plans) -> Counted:
    kept = {}
    for row in db.execute(select(totals).where(totals.c.user_id != CHANGING)):
        key, sums, models = tuple(row)[:3], tuple(row)[3:-1], json.loads(row.models)
        if any(sums):  # what begins just now is kept, too
            kept[key] = (*sums, models)
    users = {f"user_{n}" for n in range(4)}
    return Counted(
        {row.event_id: tuple(row) for row in db.execute(select(settlements))},
        {tuple(row) for row in db.execute(select(subscriptions))},
        kept,
        [store.accounts(db, plans, users, at=NOON - 9 * n * DAY) for n in range(21)],
    )


@pytest.mark.parametrize("seed", range(2))
async def test_the_stream_again_in_any_order_and_batches_over_replicas_gives_the_same_totals(
    quota_url: str, tmp_path: Path, plans_file: Path, seed: int
) -> None:
    plans = Plans.load(plans_file).model_copy(update={"default": "monthly"})
    events = half_a_year()
    migrate(sqlite_url(tmp_path, "in_order.db"), "quota")
    in_order = Database(sqlite_url(tmp_path, "in_order.db"))
    for n in range(0, len(events), 20):
        await in_order.write(store.settle, plans, events[n : n + 20])
    expected = await in_order.read(counted, plans)
    await in_order.close()

    chance = random.Random(seed)  # noqa: S311 - no secret
    delivered = [*events, *chance.sample(events, 60)]
    chance.shuffle(delivered)
    replicas = [Database(quota_url) for _ in range(3)]

    async def replay(replica: Database, left: list[Event]) -> None:
        while left:
            size = chance.randint(1, 20)
            batch, left = left[:size], left[size:]
            await replica.write(store.settle, plans, batch)

    await asyncio.gather(*(replay(replica, delivered[n::3]) for n, replica in enumerate(replicas)))

    found = await replicas[0].read(counted, plans)
    for replica in replicas:
        await replica.close()
    assert found == expected
    assert len(found.settlements) == 300
    assert max(len(models) for *_, models in found.totals.values()) == 3
