"""What ledger and quota answer about one generation, on SQLite and PostgreSQL, and what the command reads of both."""

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, update
from typer.testing import CliRunner

from services.ledger import __main__ as ledger_service
from services.ledger import store as ledger_store
from services.ledger.explain import told_of
from services.ledger.settings import Settings
from services.quota import store as quota_store
from services.quota.standing import Grant
from shared.calls import HOLD_TTL, Authorize, CountedIn, CountedStory, ExplainQuery, OnRecord, RecordedStory
from shared.database import Database
from shared.errors import Misconfigured
from shared.events import Event, GenerationCompleted, new_id, utc_now
from shared.plans import Plans
from shared.settings import sqlite_url
from shared.story import Story, story
from tests.builders import (
    NOON,
    authorized,
    generation_completed,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)

DAY = timedelta(days=1)
# A generation of 1,000 input and 100 output counts 750 under `heavy`, by two limits at once.
PLANS_FILE = """
default = "free"
[plans.free]
limit_tokens = 108_000
period = "month"
[plans.heavy]
limits = [{ limit_tokens = 50_000, period = "day" }, { limit_tokens = 108_000, period = "none" }]
weights = { input = "0.5", output = "2.5" }
"""


@pytest.fixture
def plans_file(tmp_path: Path) -> Path:
    file = tmp_path / "plans.toml"
    file.write_text(PLANS_FILE)
    return file


class Both:
    """Both databases, and what is told from them: by the services' answers, and by the command."""

    def __init__(self, ledger_url: str, quota_url: str, plans_file: Path) -> None:
        self.settings = Settings(ledger_database_url=ledger_url, quota_database_url=quota_url, plans=plans_file)
        self.plans = Plans.load(plans_file)
        self.ledger, self.quota = Database(ledger_url), Database(quota_url)

    async def handle(self, *events: Event) -> None:
        await self.ledger.write(ledger_store.record, events)
        await self.quota.write(quota_store.settle, self.plans, events)

    async def recorded(self, event_id: str, user_id: str | None = None) -> RecordedStory:
        return await self.ledger.read(ledger_store.explain, ExplainQuery(event_id=event_id, user_id=user_id))

    async def counted(self, event_id: str, user_id: str | None = None) -> CountedStory:
        query = ExplainQuery(event_id=event_id, user_id=user_id)
        return await self.quota.read(quota_store.explain, self.plans, query)

    async def told(self, event_id: str, user_id: str | None = None) -> Story | None:
        """The command tells the same."""
        told = story(event_id, await self.recorded(event_id, user_id), await self.counted(event_id, user_id))
        assert told_of(self.settings, ExplainQuery(event_id=event_id, user_id=user_id)) == told
        return told

    async def authorize(self, user_id: str = "user_1", **fields: Any) -> str:
        """The id of a generation that has its hold."""
        request = Authorize(
            generation_id=new_id(),
            user_id=user_id,
            model="claude-haiku-4-5",
            **{"input_tokens_max": 1_000, "output_tokens_min": 1, "output_tokens_max": 100, **fields},
        )
        ((granted,), _, _) = await self.quota.write(quota_store.authorize, self.plans, [request])
        assert isinstance(granted, Grant)
        return request.generation_id

    async def change_hold(self, **values: Any) -> None:
        await self.quota.write(lambda db: db.execute(update(quota_store.holds).values(values)))

    async def seal(self, *event_ids: str | None, sizes: tuple[int, ...]) -> None:
        """A leaf for each, and seals of these sizes."""

        def work(db: Connection) -> None:
            for sequence, event_id in enumerate(event_ids, 1):
                leaf = {"stream_sequence": sequence, "event_id": event_id, "leaf_hash": leaf_of(sequence)}
                db.execute(insert(ledger_store.leaves).values(leaf))
            for size in sizes:
                root = hashlib.sha256(b"root %d" % size).digest()
                seal = {"tree_size": size, "root_hash": root, "subtrees": root, "sealed_at": NOON + size * DAY}
                db.execute(insert(ledger_store.seals).values(seal))

        await self.ledger.write(work)


def leaf_of(sequence: int) -> bytes:
    return hashlib.sha256(b"leaf %d" % sequence).digest()


@pytest.fixture
async def both(ledger_url: str, quota_url: str, plans_file: Path) -> AsyncIterator[Both]:
    both = Both(ledger_url, quota_url, plans_file)
    yield both
    await both.ledger.close()
    await both.quota.close()


def ending(generation_id: str, user_id: str = "user_1", **data: Any) -> GenerationCompleted:
    """As chat makes them: the event has the id of its generation."""
    usual = {"input_tokens": 1_000, "output_tokens": 100, "started_at": utc_now(), **data}
    event = generation_completed(user_id, generation_id=generation_id, **usual)
    return event.model_copy(update={"id": generation_id})


def found(recorded: RecordedStory) -> OnRecord:
    assert recorded.record is not None
    return recorded.record


async def test_of_what_nobody_knows_there_is_no_story(both: Both) -> None:
    await both.handle(subscription_changed())
    assert await both.told(new_id()) is None


async def test_a_record_is_told_as_it_was_recorded(both: Both) -> None:
    event = generation_completed(authorized=authorized(resets_at=None, period_start=None), metadata={"a": [1, None]})
    await both.handle(event)
    record = found(await both.recorded(event.id, "user_1"))
    assert (record.user_id, record.moment, record.authorized) == ("user_1", NOON, event.data.authorized)
    assert record.given.model_dump(by_alias=False) == {
        name: getattr(event.data, name) for name in type(record.given).model_fields
    }


async def test_the_place_of_a_record_is_its_first_leaf_and_the_first_seal_that_covers_it(both: Both) -> None:
    events: list[Event] = [generation_completed(), usage_adjusted(), usage_reported()]
    await both.handle(*events)
    early, late, unsealed = (event.id for event in events)
    await both.seal(early, None, early, late, unsealed, sizes=(2, 4))

    places = [found(await both.recorded(event.id)).place for event in events]
    assert [place.stream_sequence for place in places] == [1, 4, 5]
    assert [place.leaf_hash for place in places] == [leaf_of(sequence).hex() for sequence in (1, 4, 5)]
    assert [place.sealed_by and place.sealed_by.tree_size for place in places] == [2, 4, None]
    assert [place.type for place in places] == ["generation.completed", "usage.adjusted", "generation.completed"]
    assert places[0].sealed_by
    assert (places[0].sealed_by.sealed_at, places[0].sealed_by.key_id) == (NOON + 2 * DAY, None)


async def test_before_its_leaf_is_there_a_record_has_no_place_yet(both: Both) -> None:
    await both.handle(event := usage_reported())
    place = found(await both.recorded(event.id)).place
    assert (place.id, place.stream_sequence, place.leaf_hash, place.sealed_by) == (event.id, None, None, None)


async def test_a_hold_is_told_until_it_is_settled(both: Both) -> None:
    generation_id = await both.authorize(output_tokens_asked=4_096)
    told = await both.told(generation_id)
    assert told
    assert told.asked
    assert told.granted
    assert told.held
    assert (told.state, told.user_id, told.held.is_open) == ("under_way", "user_1", True)
    assert (told.asked.input_tokens_max, told.asked.output_tokens) == (1_000, 4_096)
    assert (told.granted.output_tokens, told.granted.tier, told.held.tokens) == (100, "free", 1_100)
    assert told.held.expires_at - told.granted.at == HOLD_TTL

    await both.change_hold(expires_at=utc_now() - DAY)
    expired = await both.told(generation_id)
    assert expired
    assert expired.held
    assert (expired.state, expired.held.is_open, expired.settled) == ("expired", False, None)

    await both.handle(ending(generation_id))
    late = await both.told(generation_id)
    assert late
    assert late.settled
    assert (late.state, late.settled.is_late, late.settled.tokens_counted) == ("settled", True, 1_100)
    assert (late.asked, late.granted, late.held) == (None, None, None)  # the event does not say


async def test_a_hold_of_an_earlier_release_tells_what_it_knows(both: Both) -> None:
    generation_id = await both.authorize()
    unknown = dict.fromkeys(("input_tokens_max", "output_tokens_asked", "tier", "period", "resets_at"))
    await both.change_hold(**unknown)
    told = await both.told(generation_id)
    assert told
    assert told.held
    assert (told.state, told.asked, told.granted, told.held.tokens) == ("under_way", None, None, 1_100)


async def test_a_limit_without_a_period_has_neither_start_nor_reset(both: Both) -> None:
    await both.handle(subscription_changed(tier="heavy"), usage_reported(tokens_used=100_000))
    told = await both.told(await both.authorize())
    assert told
    assert told.granted
    assert told.held
    # Held is what its input may come to: written to the cache it weighs 1.
    assert (told.held.tokens, told.granted.limit) == (
        1_250,
        CountedIn(period="none", period_start=None, resets_at=None),
    )


async def test_what_quota_has_not_counted_yet_is_on_record(both: Both) -> None:
    generation_id = await both.authorize()
    await both.ledger.write(ledger_store.record, [ending(generation_id, authorized=authorized())])
    told = await both.told(generation_id)
    assert told
    assert told.held
    assert (told.state, told.held.is_open, told.settled) == ("recorded", True, None)


async def test_what_the_ledger_has_not_recorded_yet_is_settled_all_the_same(both: Both) -> None:
    generation_id = await both.authorize()
    await both.quota.write(quota_store.settle, both.plans, [ending(generation_id)])
    told = await both.told(generation_id)
    assert told
    assert told.settled
    assert (told.state, told.user_id, told.given, told.event) == ("settled", "user_1", None, None)


async def test_each_counts_as_the_plan_of_its_moment_weighs_it_in_its_periods(both: Both) -> None:
    before = ending(new_id(), started_at=NOON - DAY)
    after = ending(new_id(), started_at=NOON)
    later = ending(new_id(), started_at=NOON + 2 * DAY)
    await both.handle(before, after, later)
    await both.handle(
        subscription_changed(tier="free", changed_at=NOON + DAY),
        subscription_changed(tier="heavy", changed_at=NOON, time_zone="Asia/Kathmandu"),
    )
    told = [await both.told(event.id) for event in (before, after, later)]
    counts = [one.settled for one in told if one and one.settled]
    assert [(count.tier, count.tokens_counted) for count in counts] == [
        ("free", 1_100),
        ("heavy", 750),
        ("free", 1_100),
    ]
    assert [period.period for period in counts[1].counted_in] == ["day", "none"]
    day, always = counts[1].counted_in
    assert (day.period_start, day.resets_at) == (
        datetime(2026, 11, 21, 18, 15, tzinfo=UTC),
        datetime(2026, 11, 22, 18, 15, tzinfo=UTC),
    )
    assert (always.period_start, always.resets_at) == (None, None)


async def test_a_correction_and_a_top_up_are_told_by_what_they_change(both: Both) -> None:
    events = [usage_adjusted(tokens_used=-94), topped_up(tokens=5_000), topped_up(tokens=7, lasts=True)]
    await both.handle(*events)
    told = [await both.told(event.id) for event in events]
    counts = [one.settled for one in told if one and one.settled]
    assert [(count.tokens_counted, count.top_up_tokens) for count in counts] == [(-94, 0), (0, 5_000), (0, 7)]
    assert [one.given.action_type for one in told if one and one.given] == ["adjustment", "top_up", "top_up"]


async def test_another_users_is_as_unknown_as_none_to_each(both: Both) -> None:
    held, done = await both.authorize("üser *.> 3"), ending(new_id(), "üser *.> 3")
    await both.handle(done)
    for event_id in (held, done.id):
        assert await both.told(event_id, "user_1") is None
        assert (await both.recorded(event_id, "user_1")).record is None
        assert await both.counted(event_id, "user_1") == CountedStory(user_id=None, hold=None, settled=None)
        assert await both.told(event_id, "üser *.> 3") == await both.told(event_id)
        assert await both.told(event_id) is not None


async def test_where_there_is_no_database_the_command_says_which(both: Both, tmp_path: Path) -> None:
    for name in ("ledger_database_url", "quota_database_url"):
        settings = both.settings.model_copy(update={name: sqlite_url(tmp_path, "gone.db")})
        with pytest.raises(Misconfigured, match=r"gone\.db"):
            told_of(settings, ExplainQuery(event_id="g"))


@pytest.mark.parametrize("option", ["--id", "--user"])
@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb"])
def test_what_is_no_name_is_refused_by_the_command_in_words(option: str, name: str) -> None:
    arguments = ["explain", *(part for pair in {"--id": "g", option: name}.items() for part in pair)]
    told = CliRunner().invoke(ledger_service.cli, arguments)
    assert told.exit_code == 2
    assert f"Invalid value for '{option}': it has 1 to 128 characters" in told.output
