"""The bus, as `shared/streams.py` creates it on a real broker: what it refuses is what makes it the record."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, DiscardPolicy
from nats.js.errors import APIError

from shared import streams
from shared.errors import Misconfigured
from shared.events import decode, encode
from tests import forked
from tests.builders import generation_completed, publish, publish_raw, usage_adjusted
from tests.fixtures import MIB, broker_in
from tests.stack import environment

ONLY_FIRST = {"Nats-Expected-Last-Subject-Sequence": "0"}


@pytest.fixture
def js(nats: Client) -> JetStreamContext:
    return nats.jetstream()


@pytest.fixture
def bare_js(bare_nats: Client) -> JetStreamContext:
    return bare_nats.jetstream()


async def stored(js: JetStreamContext) -> int:
    state = (await js.stream_info(streams.STREAM)).state
    return state.messages


async def test_creating_it_again_changes_nothing(nats: Client, js: JetStreamContext) -> None:
    await publish(nats, generation_completed())
    before = (await js.stream_info(streams.STREAM)).config

    await streams.create(js, max_bytes=128 * MIB)

    assert (await js.stream_info(streams.STREAM)).config == before
    assert await stored(js) == 1


async def test_each_durable_gets_what_was_published_before_anybody_read(nats: Client, js: JetStreamContext) -> None:
    event = generation_completed()
    await publish(nats, event)
    for name in (streams.LEDGER, streams.QUOTA):
        await streams.check(js, name)
        reading = await js.pull_subscribe_bind(name, streams.STREAM)
        (message,) = await reading.fetch(1, timeout=10)
        assert decode(message.data) == event
        await reading.unsubscribe()


async def test_creating_adds_a_durable_that_is_missing(js: JetStreamContext) -> None:
    await js.delete_consumer(streams.STREAM, streams.QUOTA)
    await streams.create(js)
    await streams.check(js, streams.QUOTA)


async def test_a_stream_of_an_earlier_release_gets_the_subjects_that_it_lacks_and_nothing_else_changes(
    bare_nats: Client, bare_js: JetStreamContext
) -> None:
    lacking = [streams.GENERATION_COMPLETED, streams.SUBSCRIPTION_CHANGED]
    await bare_js.add_stream(
        replace(
            streams.USAGE_STREAM, subjects=lacking, max_bytes=64 * MIB, duplicate_window=60, metadata={"by": "us"}
        )
    )
    await publish(bare_nats, event := generation_completed())
    before = (await bare_js.stream_info(streams.STREAM)).config
    with pytest.raises(Misconfigured, match="subjects"):
        await streams.check(bare_js)

    for _ in range(2):
        await streams.create(bare_js, max_bytes=128 * MIB)

    assert (await bare_js.stream_info(streams.STREAM)).config == replace(
        before, subjects=streams.USAGE_STREAM.subjects
    )
    assert (await bare_js.get_msg(streams.STREAM, seq=1)).data == encode(event)
    await bare_js.publish(streams.keyed_adjustment("0f" * 32), encode(usage_adjusted()), headers=ONLY_FIRST)
    assert await stored(bare_js) == 2


async def test_a_stream_that_is_refused_for_something_else_gets_no_subjects(bare_js: JetStreamContext) -> None:
    lacking = [streams.GENERATION_COMPLETED]
    await bare_js.add_stream(replace(streams.USAGE_STREAM, subjects=lacking, max_bytes=64 * MIB, deny_purge=False))
    with pytest.raises(Misconfigured, match="The stream USAGE has deny_purge = "):
        await streams.create(bare_js)
    assert (await bare_js.stream_info(streams.STREAM)).config.subjects == lacking


async def test_the_step_is_a_command_and_safe_to_repeat(bare_js: JetStreamContext, own_nats_server: str) -> None:
    for _ in range(2):
        assert await run(CHATRAIL_NATS_URL=own_nats_server, CHATRAIL_STREAM_BYTES_MAX=str(64 * MIB)) == (0, "")
    for durable in streams.DURABLES:
        await streams.check(bare_js, durable.durable_name)


async def test_the_command_says_what_to_do_where_there_is_no_room(
    bare_js: JetStreamContext, own_nats_server: str
) -> None:
    status, said = await run(CHATRAIL_NATS_URL=own_nats_server, CHATRAIL_STREAM_BYTES_MAX=str(2**60))
    assert status == 1
    assert "set CHATRAIL_STREAM_BYTES_MAX lower" in said
    assert "Traceback" not in said


async def test_a_store_with_room_for_one_stream_and_not_for_the_other_is_named(tmp_path: Path) -> None:
    config = tmp_path / "small.conf"
    config.write_text("jetstream { max_file_store: 100M }")
    with broker_in(tmp_path, "--config", str(config)) as url:
        status, said = await run(CHATRAIL_NATS_URL=url, CHATRAIL_STREAM_BYTES_MAX=str(64 * MIB))
    assert status == 1
    assert said.startswith(f"The broker refuses the stream {streams.ALERTS} with {64 * MIB} bytes")
    assert "Traceback" not in said


async def test_replicas_that_a_stream_lacks_are_asked_for_in_words(bare_js: JetStreamContext) -> None:
    await streams.create(bare_js, max_bytes=64 * MIB)
    with pytest.raises(Misconfigured, match="has fewer replicas \\(1\\) than CHATRAIL_STREAM_REPLICAS \\(3\\)"):
        await streams.create(bare_js, replicas=3)


async def run(**variables: str) -> tuple[int | None, str]:
    ended = await forked.run("shared.streams", env=environment(**variables), apart=True)
    return ended.status, ended.err


@pytest.mark.parametrize(
    "other",
    [
        {"subjects": [*(streams.USAGE_STREAM.subjects or []), "another"]},
        {"subjects": [streams.GENERATION_COMPLETED, "another"]},
        {"discard": DiscardPolicy.OLD},
        {"max_age": 3600},
        {"deny_delete": False},
        {"deny_purge": False},
    ],
)
async def test_a_stream_of_another_kind_is_refused_in_words(bare_js: JetStreamContext, other: dict[str, Any]) -> None:
    await bare_js.add_stream(replace(streams.USAGE_STREAM, max_bytes=64 * MIB, **other))
    (field,) = other
    for refused in (streams.check(bare_js), streams.create(bare_js)):
        with pytest.raises(Misconfigured, match=f"The stream USAGE has {field} = .*, and this release needs "):
            await refused


@pytest.mark.parametrize(
    "other",
    [{"ack_policy": AckPolicy.NONE}, {"max_deliver": 5}, {"filter_subject": streams.GENERATION_COMPLETED}],
)
async def test_a_durable_of_another_kind_is_refused_in_words(js: JetStreamContext, other: dict[str, Any]) -> None:
    await js.delete_consumer(streams.STREAM, streams.LEDGER)
    config = streams.durable(streams.LEDGER)
    unacknowledged = {"max_ack_pending": None, "ack_wait": None} if "ack_policy" in other else {}
    await js.add_consumer(streams.STREAM, replace(config, **other, **unacknowledged))
    (field,) = other
    for refused in (streams.check(js, streams.LEDGER), streams.create(js)):
        with pytest.raises(Misconfigured, match=f"The consumer ledger has {field} = .*, and this release needs "):
            await refused


async def test_a_missing_stream_is_named_with_the_step_that_creates_it(bare_js: JetStreamContext) -> None:
    with pytest.raises(Misconfigured, match=r"no stream USAGE\. Run: python -m shared\.streams"):
        await streams.check(bare_js, streams.LEDGER)


async def test_a_missing_durable_is_named_with_the_step_that_creates_it(js: JetStreamContext) -> None:
    await js.delete_consumer(streams.STREAM, streams.LEDGER)
    await streams.check(js, streams.QUOTA)
    with pytest.raises(Misconfigured, match=r"no consumer ledger\. Run: python -m shared\.streams"):
        await streams.check(js, streams.LEDGER)


async def test_a_full_stream_tells_the_publisher_and_drops_nothing(
    bare_nats: Client, bare_js: JetStreamContext
) -> None:
    await streams.create(bare_js, max_bytes=100_000)
    for _ in range(3):
        await publish_raw(bare_nats, b"x" * 30_000)

    with pytest.raises(APIError, match="maximum bytes exceeded"):
        await publish_raw(bare_nats, b"x" * 30_000)

    assert (await bare_js.get_msg(streams.STREAM, seq=1)).data == b"x" * 30_000
    assert await stored(bare_js) == 3


async def test_what_is_recorded_cannot_be_deleted_or_purged(nats: Client, js: JetStreamContext) -> None:
    await publish(nats, generation_completed())
    with pytest.raises(APIError):
        await js.delete_msg(streams.STREAM, 1)
    with pytest.raises(APIError):
        await js.purge_stream(streams.STREAM)
    assert await stored(js) == 1


async def test_the_protection_cannot_be_taken_back(js: JetStreamContext) -> None:
    config = (await js.stream_info(streams.STREAM)).config
    for weaker in (replace(config, deny_delete=False), replace(config, deny_purge=False)):
        with pytest.raises(APIError):
            await js.update_stream(weaker)


async def test_an_event_published_twice_in_a_row_is_stored_once(nats: Client, js: JetStreamContext) -> None:
    event = generation_completed()
    await publish(nats, event, event)
    assert await stored(js) == 1


async def test_an_idempotency_key_is_taken_once_and_kept_for_ever(js: JetStreamContext) -> None:
    subject = streams.keyed("0f" * 32)
    first, second = generation_completed(), generation_completed()
    await js.publish(subject, encode(first), headers=ONLY_FIRST)

    with pytest.raises(APIError) as refusal:
        await js.publish(subject, encode(second), headers=ONLY_FIRST)

    assert refusal.value.err_code == streams.WRONG_LAST_SEQUENCE
    assert (await js.get_last_msg(streams.STREAM, subject)).data == encode(first)
    assert await stored(js) == 1


async def test_of_many_at_once_with_one_idempotency_key_exactly_one_is_stored(js: JetStreamContext) -> None:
    subject = streams.keyed("0f" * 32)
    tries = await asyncio.gather(
        *(js.publish(subject, encode(generation_completed()), headers=ONLY_FIRST) for _ in range(20)),
        return_exceptions=True,
    )
    assert sum(not isinstance(outcome, Exception) for outcome in tries) == 1
    assert await stored(js) == 1


async def test_other_keys_and_reports_without_one_are_not_in_the_way(nats: Client, js: JetStreamContext) -> None:
    await publish(nats, generation_completed())
    for digest in ("aa", "bb"):
        await js.publish(streams.keyed(digest), encode(generation_completed()), headers=ONLY_FIRST)
    assert await stored(js) == 3


async def test_one_key_of_a_report_and_of_an_adjustment_are_two(js: JetStreamContext) -> None:
    await js.publish(streams.keyed("aa"), encode(generation_completed()), headers=ONLY_FIRST)
    await js.publish(streams.keyed_adjustment("aa"), encode(usage_adjusted()), headers=ONLY_FIRST)
    assert await stored(js) == 2


@pytest.mark.parametrize("user_id", ["a", "a.b", "*", ">", "a b", "ü/🛤", "x" * 128])
def test_any_user_has_a_subject_of_one_legal_token(user_id: str) -> None:
    prefix, _, token = streams.quota_updated(user_id).rpartition(".")
    assert prefix == "quota.updated"
    assert token
    assert set(token).isdisjoint(" .*>/=")
