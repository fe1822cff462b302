"""An operator archives and trims beside a running stack, and later loses both databases: every figure stays."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from nats.errors import Error as NatsError
from nats.js.api import StreamConfig

from shared.archive import Archive
from shared.bus_of_folder import bus_of_folder
from shared.recorded import bounds
from shared.settings import ServiceSettings
from shared.streams import STREAM, trimmed
from tests import forked
from tests.fixtures import eventually
from tests.people import ask, client_of, open_holds, recorded, totalled
from tests.stack import Stack, environment

USERS = ("user_1", "user_2", "user_3")
REPORT = {"userId": "user_3", "actionType": "chat_generation", "tokensUsed": 1_000, "metadata": {}}
KEY = {"Idempotency-Key": "invoice-7"}
OVERLAP = timedelta(seconds=2)


async def command(data: Path, *arguments: str, service: str = "ledger") -> str:
    """What it says; it ends with 0."""
    ended = await forked.run(f"services.{service}", *arguments, env=environment(CHATRAIL_DATA=str(data)))
    assert ended.status == 0, ended.out
    return ended.out


async def short_trim(data: Path) -> str:
    arguments = ("services.ledger", "trim", "--overlap-s", str(OVERLAP.total_seconds()))
    ended = await forked.run("tests.short_overlap", *arguments, env=environment(CHATRAIL_DATA=str(data)))
    assert ended.status == 0, ended.out
    return ended.out


async def begins(data: Path) -> int:
    async with bus_of_folder(ServiceSettings(data=data), name="test") as nc:
        return (await bounds(nc))[0]


async def has_grown_old(stack: Stack) -> bool:
    """Whether there is something on the stream that is older than what stays of an archive in these tests."""
    async with bus_of_folder(ServiceSettings(data=stack.data), name="test") as nc:
        stored_at = (await nc.jetstream().get_msg(STREAM, 1)).time
    return stored_at is not None and datetime.now(UTC) - stored_at > 2 * OVERLAP


async def is_archived(stack: Stack) -> bool:
    """Whether what is archived by now has something that is so old, and something that is not."""
    await command(stack.data, "archive", "--before", datetime.now(UTC).isoformat())
    manifests = Archive.at(stack.data / "archive").manifests
    return bool(manifests) and manifests[-1].last_stored_at - manifests[0].first_stored_at > 2 * OVERLAP


async def test_archived_and_trimmed_beside_people_and_rebuilt_from_both(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "data", CHATRAIL_SEAL_EVERY_S="0.5")
    with stack:
        async with client_of(stack) as client:
            (await client.post("/api/usage", json=REPORT, headers=KEY)).raise_for_status()
            for user_id in USERS:
                await ask(client, user_id, "[usage input=40 output=7]")
            (await client.put("/api/subscriptions/user_2", json={"tier": "pro"})).raise_for_status()

            await eventually(partial(has_grown_old, stack))
            await ask(client, "user_1", "[usage input=40 output=7]")
            await eventually(partial(is_archived, stack), deadline_s=60)
            parts = stack.parts()
            said = await short_trim(stack.data)
            assert "messages left the stream" in said
            assert await begins(stack.data) > 5

            # Nobody had to end for it, and a key of before is known.
            await ask(client, "user_1", "[usage input=40 output=7]")
            (await client.post("/api/usage", json=REPORT, headers=KEY)).raise_for_status()
            assert (await client.post("/api/usage", json=REPORT | {"tokensUsed": 7}, headers=KEY)).status_code == 409
            assert stack.parts() == parts

        async def is_settled() -> bool:
            return recorded(stack) == totalled(stack) and open_holds(stack) == 0

        await eventually(is_settled)
        assert (await stack.usage("user_3"))["tokensUsed"] == 1_047
        assert "All agree." in await command(stack.data, "audit")
        for service in ("ledger", "quota"):
            await command(stack.data, "replay", service=service)
        figures = [await stack.usage(user_id) for user_id in USERS]
    # The stack is stopped: both start a broker for themselves.
    assert "All agree." in await command(stack.data, "audit")
    assert "Archived messages" in await command(stack.data, "archive", "--before", datetime.now(UTC).isoformat())
    assert (await command(stack.data, "trim")).startswith("Nothing was trimmed")

    for service in ("ledger", "quota"):
        for file in stack.data.glob(f"{service}.db*"):
            file.unlink()
    with stack:
        assert [await stack.usage(user_id) for user_id in USERS] == figures
        assert "All agree." in await command(stack.data, "audit")


async def test_what_a_trim_that_died_has_left_is_put_back_by_the_stack_itself(tmp_path: Path) -> None:
    with Stack(tmp_path / "data") as stack:
        parts = stack.parts()

        async def config() -> StreamConfig:
            async with bus_of_folder(ServiceSettings(data=stack.data), name="test") as nc:
                return (await nc.jetstream().stream_info(STREAM)).config

        before = await config()
        left = trimmed(before, max_age_s=24 * 3600, within=timedelta(seconds=1))
        async with bus_of_folder(ServiceSettings(data=stack.data), name="test") as nc:
            await nc.jetstream().update_stream(left)

        async def nothing_expires_any_more() -> bool:
            return await config() == before

        await eventually(nothing_expires_any_more, deadline_s=60)
        for part in ("chat", "ledger", "quota"):
            await stack.answers(f"{stack.endpoints[part]}/readyz")
        assert stack.parts()["broker"] == parts["broker"]


async def test_on_three_nodes_what_is_trimmed_is_gone_from_each(tmp_path: Path) -> None:
    with Stack(tmp_path / "data", CHATRAIL_NATS_CLUSTER="true", CHATRAIL_SEAL_EVERY_S="0.5") as stack:
        for nth in range(20):
            await stack.report("user_1", nth)

        await eventually(partial(has_grown_old, stack))
        await stack.report("user_1", 1)
        await eventually(partial(is_archived, stack), deadline_s=60)
        await short_trim(stack.data)
        begun = await begins(stack.data)
        assert begun > 20

        leaders = set()
        for _ in range(2):
            async with bus_of_folder(ServiceSettings(data=stack.data), name="test") as nc:
                cluster = (await nc.jetstream().stream_info(STREAM)).cluster
                assert cluster is not None
                leader = cluster.leader
                await nc.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{STREAM}", timeout=10)
            leaders.add(leader)

            async def another_leads(leader: str | None = leader) -> bool:
                with suppress(NatsError):  # while the nodes elect it, nobody answers
                    async with bus_of_folder(ServiceSettings(data=stack.data), name="test") as nc:
                        info = await nc.jetstream().stream_info(STREAM)
                        return info.cluster is not None and info.cluster.leader not in (None, "", leader)
                return False

            await eventually(another_leads)
            assert await begins(stack.data) == begun
            assert "All agree." in await command(stack.data, "audit")
        assert len(leaders) == 2
