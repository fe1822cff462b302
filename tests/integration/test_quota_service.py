"""Quota as a service: real processes on the real broker, one on SQLite and two on PostgreSQL, for all tests here."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from nats.aio.client import Client
from sqlalchemy import Connection, insert, select
from starlette.applications import Starlette
from structlog.testing import capture_logs

from services.quota import app, store
from services.quota import totals as quota_totals
from services.quota.settings import Settings
from shared import broker, calls, streams
from shared.broker import connect
from shared.calls import Authorize, Granted, Refused
from shared.database import Database, table_of
from shared.errors import Unavailable
from shared.events import GenerationCompleted, encode, new_id
from shared.quarantine import Quarantined
from tests.builders import generation_completed, publish, publish_raw, subscription_changed, usage_reported
from tests.fixtures import broker_in, eventually, new_database
from tests.integration.test_ledger_service import closed_postgresql, locked_sqlite
from tests.quota_process import (
    PATIENCE_S,
    Quota,
    Replica,
    authorize,
    create_stream,
    everything_is_acknowledged,
    started,
    usage_of,
)
from tests.stack import PROJECT, environment

LIMIT = 108_000


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker with the empty stream. Tests here share it, and keep apart by their users."""
    with broker_in(tmp_path_factory.mktemp("nats")) as url:
        asyncio.run(create_stream(url))
        yield url


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def quota(request: pytest.FixtureRequest, bus: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quota]:
    folder = tmp_path_factory.mktemp("quota")
    with new_database(request, request.param, folder, "quota") as url:
        replicas = [
            Replica({"CHATRAIL_NATS_URL": bus, "CHATRAIL_QUOTA_DATABASE_URL": url}, folder / f"{n}.log")
            for n in range(1 if request.param == "sqlite" else 2)
        ]
        with started(replicas):
            yield Quota(replicas, url)


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


@pytest.fixture
def user_id(quota: Quota) -> str:
    """Somebody whom no other test knows."""
    return f"a.user with *, / and 🛤 {new_id()}"


@pytest.fixture
def away(quota: Quota, request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    """Within this context quota's database cannot be written."""
    if quota.database_url.startswith("sqlite"):
        return locked_sqlite(quota.database_url)
    return closed_postgresql(request.getfixturevalue("postgres"), quota.database_url)


def asking(user_id: str, *, beside: int = 1_000, asked: int = 1_000, least: int = 1) -> Authorize:
    return Authorize(
        generation_id=new_id(),
        user_id=user_id,
        input_tokens_max=beside,
        output_tokens_min=least,
        output_tokens_max=asked,
    )


def ending(request: Authorize, granted: Granted) -> GenerationCompleted:
    """The generation's event: all of its input and half of its output were used."""
    return generation_completed(
        request.user_id,
        input_tokens=request.input_tokens_max,
        output_tokens=granted.output_tokens_max // 2,
        generation_id=request.generation_id,
        started_at=granted.started_at,
    )


def spent(user_id: str, tokens: int = 8_094) -> GenerationCompleted:
    return usage_reported(user_id, tokens_used=tokens, started_at=datetime.now(UTC))


async def settled_ids(database: Database, user_id: str) -> list[str]:
    mine = select(quota_totals.settlements.c.event_id).where(quota_totals.settlements.c.user_id == user_id)
    return await database.read(lambda db: list(db.execute(mine).scalars()))


async def held_ids(database: Database, user_id: str) -> list[str]:
    mine = select(store.holds.c.generation_id).where(store.holds.c.user_id == user_id)
    return await database.read(lambda db: list(db.execute(mine).scalars()))


async def test_an_authorization_is_granted_held_and_settled(quota: Quota, nats: Client, user_id: str) -> None:
    request = asking(user_id, beside=6_000, asked=4_000)
    granted = await authorize(nats, request)
    assert isinstance(granted, Granted)
    assert granted.output_tokens_max == 4_000
    assert abs(datetime.now(UTC) - granted.started_at) < timedelta(minutes=1)
    assert (await usage_of(nats, user_id)).tokens_held == 10_000

    await publish(nats, ending(request, granted))
    await everything_is_acknowledged(nats)

    usage = await usage_of(nats, user_id)
    assert (usage.tokens_used, usage.tokens_held, usage.tokens_remaining) == (8_000, 0, 100_000)


async def test_a_refusal_is_an_answer_that_says_what_is_left_and_when_more_comes(
    quota: Quota, nats: Client, user_id: str
) -> None:
    await publish(nats, spent(user_id, LIMIT - 500))
    await everything_is_acknowledged(nats)

    refused = await authorize(nats, asking(user_id))

    assert isinstance(refused, Refused)
    assert refused.tokens_available == 500
    assert refused.usage == await usage_of(nats, user_id)
    assert refused.usage.resets_at is not None
    until_reset = (refused.usage.resets_at - datetime.now(UTC)) / timedelta(seconds=1)
    assert refused.retry_after_s == pytest.approx(until_reset, abs=60)


WELL_FORMED = asking("somebody").model_dump_json()
MALFORMED = [
    b"",
    b"not JSON",
    b"[]",
    b"{}",
    *(WELL_FORMED.replace("somebody", odd).encode() for odd in ("", "x" * 129, r"\u0000", r"\ud800")),
]
ABSURD = [WELL_FORMED.replace("1000", odd).encode() for odd in ("-1", "0.5", '"many"', "null", "1000000000000")]


@pytest.mark.parametrize(("subject", "bodies"), [(calls.AUTHORIZE, MALFORMED + ABSURD), (calls.USAGE, MALFORMED)])
async def test_a_malformed_call_is_answered_with_a_fault_and_not_with_a_timeout(
    quota: Quota, nats: Client, subject: str, bodies: list[bytes]
) -> None:
    for body in bodies:
        reply = await nats.request(subject, body, timeout=PATIENCE_S)
        assert (reply.headers or {})[broker.ERROR_CODE] == "400", body
        assert (reply.headers or {})[broker.ERROR]


async def test_200_authorizations_at_once_are_all_answered(quota: Quota, nats: Client, user_id: str) -> None:
    answers = await asyncio.gather(*(authorize(nats, asking(f"{user_id} {n}")) for n in range(200)))
    assert {answer.kind for answer in answers} == {"granted"}


async def test_of_200_authorizations_at_once_for_one_user_exactly_what_fits_is_granted(
    quota: Quota, nats: Client, database: Database, user_id: str
) -> None:
    requests = [asking(user_id, least=1_000) for _ in range(200)]

    answers = await asyncio.gather(*(authorize(nats, request) for request in requests))

    granted = [r.generation_id for r, answer in zip(requests, answers, strict=True) if answer.kind == "granted"]
    assert len(granted) == 54
    assert sorted(await held_ids(database, user_id)) == sorted(granted)
    assert (await usage_of(nats, user_id)).tokens_held == LIMIT


async def test_whoever_watches_a_user_is_told_of_every_change(quota: Quota, nats: Client, user_id: str) -> None:
    mine = await nats.subscribe(streams.quota_updated(user_id))
    others = await nats.subscribe(streams.quota_updated(f"{user_id} "))
    await nats.flush()

    async def next_told() -> tuple[str, int, int]:
        await mine.next_msg(timeout=PATIENCE_S)
        usage = await usage_of(nats, user_id)
        return usage.tier, usage.tokens_used, usage.tokens_held

    request = asking(user_id)
    granted = await authorize(nats, request)
    assert await next_told() == ("free", 0, 2_000)
    assert isinstance(granted, Granted)
    await publish(nats, ending(request, granted))
    assert await next_told() == ("free", 1_500, 0)
    await publish(nats, subscription_changed(user_id, "pro"))
    assert await next_told() == ("pro", 1_500, 0)
    assert not others.pending_msgs


async def test_poison_is_quarantined_and_holds_up_nothing(
    quota: Quota, nats: Client, database: Database, user_id: str
) -> None:
    good = [spent(user_id, 100) for _ in range(3)]
    nowhere = subscription_changed(user_id, "a plan of last year", time_zone="Mars/Olympus")
    negative = encode(good[0]).replace(b'"tokens_used":100', b'"tokens_used":-1')
    without_id = encode(good[0]).replace(b'"id":', b'"idea":')
    poison = [b"", b"not JSON", user_id.encode(), negative, without_id]

    await publish(nats, good[0], nowhere)
    for body in poison:
        await publish_raw(nats, body)
    await publish(nats, *good[1:])
    await everything_is_acknowledged(nats)

    assert sorted(await settled_ids(database, user_id)) == sorted(event.id for event in good)
    assert (await usage_of(nats, user_id)).tokens_used == 300
    kept = await database.read(lambda db: list(db.execute(select(table_of(Quarantined).c.body)).scalars()))
    assert set(poison) <= set(kept)


@pytest.mark.parametrize("quota", ["postgresql"], indirect=True)
async def test_replicas_share_calls_and_events(quota: Quota, nats: Client, database: Database, user_id: str) -> None:
    events: list[GenerationCompleted] = []

    async def all_have_settled() -> bool:
        events.append(spent(user_id, 1))
        await publish(nats, events[-1])
        return all(replica.said("usage_settled") for replica in quota.replicas)

    await eventually(all_have_settled)
    await everything_is_acknowledged(nats)

    assert sorted(await settled_ids(database, user_id)) == sorted(event.id for event in events)
    assert (await usage_of(nats, user_id)).tokens_used == len(events)


async def test_a_replica_killed_in_the_middle_loses_nothing_and_the_limit_holds(
    quota: Quota, nats: Client, database: Database, user_id: str
) -> None:
    finished: list[GenerationCompleted] = []
    unfinished: list[str] = []
    seen: list[int] = []

    async def chat() -> None:
        for n in range(12):
            request = asking(user_id)
            with suppress(Unavailable):  # nothing was spent
                granted = await authorize(nats, request, timeout_s=1)
                if isinstance(granted, Granted) and n % 6:
                    finished.append(ending(request, granted))
                    await publish(nats, finished[-1])
                elif isinstance(granted, Granted):
                    unfinished.append(request.generation_id)
                usage = await usage_of(nats, user_id, timeout_s=1)
                seen.append(usage.tokens_used + usage.tokens_held)

    async def in_the_middle() -> bool:
        return len(finished) > 10

    chats = [asyncio.create_task(chat()) for _ in range(8)]
    await eventually(in_the_middle)
    victim = quota.replicas[0]
    victim.stop(signal.SIGKILL)
    await publish(nats, late := spent(user_id, 1))
    finished.append(late)
    victim.start()
    await asyncio.to_thread(victim.wait_until_ready)
    await asyncio.gather(*chats)
    await everything_is_acknowledged(nats)

    assert sorted(await settled_ids(database, user_id)) == sorted(event.id for event in finished)
    assert set(unfinished) <= set(await held_ids(database, user_id))
    usage = await usage_of(nats, user_id)
    assert usage.tokens_used == sum(event.data.tokens_used for event in finished)
    assert max(*seen, usage.tokens_used + usage.tokens_held) <= LIMIT + late.data.tokens_used


async def test_a_database_that_is_away_for_a_while_costs_no_event(
    quota: Quota, nats: Client, user_id: str, away: AbstractContextManager[None]
) -> None:
    async def came_again() -> bool:
        consumer = await nats.jetstream().consumer_info(streams.STREAM, streams.QUOTA)
        return bool(consumer.num_redelivered)

    with away:
        await publish(nats, *(spent(user_id, 100) for _ in range(20)))
        await eventually(came_again)
    await everything_is_acknowledged(nats)

    assert (await usage_of(nats, user_id)).tokens_used == 2_000


@pytest.mark.parametrize("quota", ["postgresql"], indirect=True)
async def test_quota_says_so_while_its_database_is_away_and_goes_on_when_it_is_back(
    quota: Quota, nats: Client, user_id: str, away: AbstractContextManager[None]
) -> None:
    async with httpx2.AsyncClient(base_url=quota.replicas[0].url, trust_env=False, verify=False) as client:
        assert (await client.get("/readyz")).status_code == 200
        with away:
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["missing"]) == (503, {"database": "OperationalError"})
            assert (await client.get("/healthz")).status_code == 200
            for call in (authorize(nats, asking(user_id)), usage_of(nats, user_id)):
                with pytest.raises(Unavailable, match="could not answer"):
                    await call
        assert (await client.get("/readyz")).status_code == 200
    assert (await authorize(nats, asking(user_id))).kind == "granted"
    assert (await usage_of(nats, user_id)).tokens_held == 2_000


@pytest.fixture
def another(quota: Quota, bus: str, monkeypatch: pytest.MonkeyPatch) -> Starlette:
    """One more replica, not started yet, that looks for expired holds all the time."""
    monkeypatch.setattr(app, "LOOK_AFTER_EVERY_S", 0.05)
    return app.create_app(Settings(nats_url=bus, quota_database_url=quota.database_url))


@pytest.mark.parametrize("quota", ["postgresql"], indirect=True)
async def test_expired_holds_are_reported_once_also_after_the_database_was_away(
    another: Starlette, database: Database, user_id: str, away: AbstractContextManager[None]
) -> None:
    lost: list[str] = []

    async def failed() -> bool:
        return any(line["event"] == "not_looked_after" for line in logs)

    async def reported() -> list[str]:
        lost.append(new_id())  # one after the other: another replica may be the one that reports some
        await database.write(_lose, user_id, lost[-1])
        return [line["generation_id"] for line in logs if line["event"] == "hold_expired"]

    with capture_logs() as logs:
        async with another.router.lifespan_context(another):
            with away:
                await eventually(failed)
            told = await eventually(reported)

    assert set(told) <= set(lost)
    assert len(told) == len(set(told))


def _lose(db: Connection, user_id: str, generation_id: str) -> None:
    at = datetime.now(UTC)
    times = dict.fromkeys(("period_start", "started_at", "expires_at"), at)
    hold = {"generation_id": generation_id, "user_id": user_id, "tokens": 1, "output_tokens": 1, **times}
    db.execute(insert(store.holds).values(hold))


def test_a_plans_file_that_makes_no_sense_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    plans = tmp_path / "plans.toml"
    plans.write_text('default = "gold"\n[plans.free]\nperiod = "day"')
    started = subprocess.run(
        [sys.executable, "-m", "services.quota", "serve"],
        cwd=PROJECT,
        env=environment(CHATRAIL_PLANS=str(plans), CHATRAIL_DATA=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (started.returncode, started.stdout) == (1, "")
    assert started.stderr == f"The plans file {plans} is wrong at line 1: there is no plan named 'gold'\n"
