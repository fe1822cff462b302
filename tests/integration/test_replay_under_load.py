"""Quota replayed while it answers: nobody is refused or waits too long, and no figure is wrong in between."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from services.quota.totals import SUMS, totals
from shared.broker import TIMEOUT_S, connect
from shared.calls import Authorize, Granted
from shared.database import patient_engine
from shared.events import GenerationCompleted, new_id, utc_now
from shared.plans import FOR_EVER
from tests import forked
from tests.builders import NOON, generation_completed, publish
from tests.quota_process import (
    Quota,
    Replica,
    authorize_once,
    create_stream,
    everything_is_acknowledged,
    started,
    usage_of,
)
from tests.stack import environment

USERS, REPLAYS = 6, 3
PLANS = """
default = "roomy"
[plans.roomy]
limit_tokens = 1_000_000_000
period = "month"
"""


@pytest.fixture
def quota(backend: str, quota_url: str, own_nats_server: str, tmp_path: Path) -> Iterator[Quota]:
    """On PostgreSQL two replicas share the work."""
    plans = tmp_path / "plans.toml"
    plans.write_text(PLANS)
    asyncio.run(create_stream(own_nats_server))
    settings = {
        "CHATRAIL_NATS_URL": own_nats_server,
        "CHATRAIL_PLANS": str(plans),
        "CHATRAIL_QUOTA_DATABASE_URL": quota_url,
    }
    replicas = [Replica(settings, tmp_path / f"quota{nth}.log") for nth in range(1 + (backend != "sqlite"))]
    with started(replicas):
        yield Quota(replicas, quota_url)


async def replay(settings: dict[str, str]) -> None:
    ended = await forked.run("services.quota", "replay", env=environment(**settings))
    assert ended.status == 0, ended.out


def add_a_total(url: str, user_id: str) -> None:
    """Of somebody whom no event names: only where something is wrong all tables have to be exchanged."""
    engine = patient_engine(url)
    added = dict.fromkeys(SUMS, 1) | {"user_id": user_id, "period_start": NOON, "period_end": FOR_EVER}
    with engine.begin() as db:
        db.execute(insert(totals).values(added))
    engine.dispose()


def tokens_of(url: str, user_id: str) -> int:
    engine = patient_engine(url)
    with engine.begin() as db:
        found: int = db.execute(select(totals.c.tokens_used).where(totals.c.user_id == user_id)).scalar_one()
    engine.dispose()
    return found


async def test_while_quota_is_replayed_everybody_is_answered_in_time_and_rightly(
    quota: Quota, own_nats_server: str
) -> None:
    nats = await connect(own_nats_server, name="test")
    is_busy, published = True, dict.fromkeys((f"user_{nth}" for nth in range(USERS)), 0)

    async def generate(user_id: str) -> None:
        while is_busy:
            asked = Authorize(
                generation_id=new_id(),
                user_id=user_id,
                input_tokens_max=10,
                output_tokens_min=1,
                output_tokens_max=100,
            )
            granted = await authorize_once(nats, asked, timeout_s=TIMEOUT_S)
            assert isinstance(granted, Granted)
            event = _settled(asked.generation_id, user_id)
            await publish(nats, event)
            published[user_id] += event.data.tokens_used

    async def watch(user_id: str) -> None:
        used = 0
        while is_busy:
            now = (await usage_of(nats, user_id, timeout_s=TIMEOUT_S)).tokens_used
            assert used <= now
            used = now

    async with asyncio.TaskGroup() as people:
        for user_id in published:
            people.create_task(generate(user_id))
            people.create_task(watch(user_id))
        for nth in range(REPLAYS):
            await asyncio.to_thread(add_a_total, quota.database_url, f"nobody_{nth}")
            await replay(quota.replicas[0].settings)
        is_busy = False

    await everything_is_acknowledged(nats)
    assert {tokens_of(quota.database_url, f"nobody_{nth}") for nth in range(REPLAYS)} == {0}
    assert min(published.values()) > 0
    assert {user_id: (await usage_of(nats, user_id)).tokens_used for user_id in published} == published
    assert {(await usage_of(nats, user_id)).tokens_held for user_id in published} == {0}
    await nats.close()


def _settled(generation_id: str, user_id: str) -> GenerationCompleted:
    event = generation_completed(
        user_id, generation_id=generation_id, input_tokens=7, output_tokens=3, started_at=utc_now()
    )
    return event.model_copy(update={"id": generation_id})
