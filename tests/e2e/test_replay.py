"""Replays of a stack with people on it, and of one that is stopped: nobody notices, and nothing is lost."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import httpx2

from tests import forked
from tests.fixtures import eventually
from tests.people import ask, client_of, given, open_holds, recorded, rows, totalled
from tests.stack import Stack, environment

PEOPLE, QUESTIONS, REPLAYS = 8, 6, 2
REPLAY_S = 120
TOTALS = "SELECT user_id, period_start, period_end, tokens_used, models FROM usage_totals ORDER BY 1, 2, 3"
NOBODYS_DAY = "INSERT INTO usage_daily VALUES ('nobody', '2026-11-22', '', 1, 0, 0, 0, 0, 1)"
NOBODYS_TOTAL = (
    "INSERT INTO usage_totals (user_id, period_start, period_end, tokens_used, input_tokens, output_tokens,"
    " cache_creation_input_tokens, cache_read_input_tokens) VALUES ('nobody', '2026-11-01T00:00:00.000000Z',"
    " '2026-12-01T00:00:00.000000Z', 1, 1, 0, 0, 0) ON CONFLICT DO UPDATE SET tokens_used = 1"
)
PLANS = "SELECT user_id, tier, changed_at FROM subscriptions ORDER BY 1"
USAGE = "SELECT id, user_id, tokens_used, created_at, metadata FROM usage ORDER BY 1"


async def replay(data: Path, *arguments: str) -> str:
    """What both commands say; they end with 0."""
    said = ""
    for service in ("ledger", "quota"):
        variables = environment(CHATRAIL_DATA=str(data))
        ended = await forked.run(f"services.{service}", "replay", *arguments, env=variables, timeout_s=REPLAY_S)
        said += ended.out
        assert ended.status == 0, said
    return said


def do(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


async def test_people_chat_while_all_is_replayed_and_every_token_is_counted_once(tmp_path: Path) -> None:
    """Every question is answered the first time that it is asked, and no bar ever moves back."""
    with Stack(tmp_path / "data") as stack:
        chatting = True

        async def chat(client: httpx2.AsyncClient, user_id: str) -> None:
            asked = 0
            while chatting or asked < QUESTIONS:
                assert (await ask(client, user_id, "[usage input=40 output=7]")).last == "done"
                asked += 1

        async def watch(user_id: str) -> None:
            used = 0
            while chatting:
                now = (await stack.usage(user_id))["tokensUsed"]
                assert now >= used
                used = now

        async def is_counted() -> bool:
            return recorded(stack) > 0 and totalled(stack) > 0

        async with client_of(stack) as client, asyncio.TaskGroup() as people:
            for nth in range(PEOPLE):
                people.create_task(chat(client, f"user_{nth}"))
                people.create_task(watch(f"user_{nth}"))
            await eventually(is_counted)
            for _ in range(REPLAYS):
                # Only where something is wrong all tables have to be exchanged.
                do(stack.data / "ledger.db", NOBODYS_DAY)
                do(stack.data / "quota.db", NOBODYS_TOTAL)
                assert "writers waited" in await replay(stack.data)
            chatting = False

        gave = (await given(stack))["tokens"]

        async def all_agree() -> bool:
            return recorded(stack) == totalled(stack) == gave and not open_holds(stack)

        await eventually(all_agree)


async def test_a_stack_that_lost_its_databases_has_every_figure_again(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "data")
    with stack:
        async with client_of(stack) as client:
            for user_id in ("user_1", "user_2"):
                await ask(client, user_id, "Hello")
            (await client.put("/api/subscriptions/user_2", json={"tier": "pro"})).raise_for_status()
        await stack.report("user_3", 90_000)
        await stack.usage_reaches("user_3", 90_000)

        used = (await given(stack))["tokens"] + 90_000

        async def is_settled() -> bool:
            return recorded(stack) == totalled(stack) == used and open_holds(stack) == 0

        await eventually(is_settled)
        figures = [await stack.usage(f"user_{nth}") for nth in range(5)]
        before = rows(stack.data / "ledger.db", USAGE)
    for service in ("ledger", "quota"):
        for file in stack.data.glob(f"{service}.db*"):
            file.unlink()
    with stack:
        await replay(stack.data)
        assert [await stack.usage(f"user_{nth}") for nth in range(5)] == figures
        assert rows(stack.data / "ledger.db", USAGE) == before


async def test_a_stopped_stack_is_replayed_on_its_data_folder(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "data", CHATRAIL_SEAL_EVERY_S="0.5")
    with stack:
        await stack.report("user_1", 8_094)
        await stack.usage_reaches("user_1", 8_094)
        async with client_of(stack) as client:
            (await client.put("/api/subscriptions/user_1", json={"tier": "pro"})).raise_for_status()

        async def is_sealed() -> bool:
            return bool(rows(stack.data / "ledger.db", "SELECT 1 FROM seals"))

        await eventually(is_sealed)
    quota = stack.data / "quota.db"
    before = rows(quota, TOTALS), rows(quota, PLANS)
    do(quota, "UPDATE usage_totals SET tokens_used = tokens_used + 5", "DELETE FROM subscriptions")

    told = await replay(stack.data, "--dry-run")
    assert "tokens_used 8099 becomes 8094" in told
    assert "subscriptions: 1 missing" in told
    await replay(stack.data)

    assert (rows(quota, TOTALS), rows(quota, PLANS)) == before
    assert "would change nothing" in (await replay(stack.data, "--dry-run"))
    now = datetime.now(UTC).isoformat()
    past = await replay(stack.data, "--until", now, "--out", str(tmp_path / "past"))
    assert "8,094" in past
    assert rows(tmp_path / "past" / "quota.db", TOTALS) == before[0]

    for service in ("ledger", "quota"):
        for file in stack.data.glob(f"{service}.db*"):
            file.unlink()
    assert "made anew as the stream's seals tell" in await replay(stack.data)
    assert (rows(quota, TOTALS), rows(quota, PLANS)) == before
    variables = environment(CHATRAIL_DATA=str(stack.data))
    audited = await forked.run("services.ledger", "audit", env=variables, timeout_s=REPLAY_S)
    assert (audited.status, audited.err) == (0, ""), audited
