"""`python -m services.ledger audit` beside a stack under load, and on one that is stopped."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from shared.bus_of_folder import bus_of_folder
from shared.errors import Misconfigured
from shared.recorded import bounds
from shared.settings import ServiceSettings
from tests import forked
from tests.forked import Ended
from tests.people import ask_until_answered, client_of
from tests.stack import Stack, environment

PEOPLE = 4


async def audit(data: Path, *options: str) -> Ended:
    return await forked.run(
        "services.ledger", "audit", *options, env=environment(CHATRAIL_DATA=str(data)), apart=True
    )


@asynccontextmanager
async def load(stack: Stack) -> AsyncIterator[None]:
    """People who ask, one question after the other, for as long as the context lasts."""
    is_over = asyncio.Event()

    async def person(user_id: str) -> None:
        async with client_of(stack) as client:
            while not is_over.is_set():
                await ask_until_answered(client, user_id, "[usage input=5 output=2] Hello")

    async with asyncio.TaskGroup() as people:
        for nth in range(PEOPLE):
            people.create_task(person(f"person_{nth}"))
        yield
        is_over.set()


def change(database: Path, *statements: str) -> None:
    """As somebody who may do everything: also drop what guards the tables."""
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert connection.execute(statement).rowcount


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose databases the tests change, and put right again."""
    with Stack(tmp_path_factory.mktemp("audited") / "data", CHATRAIL_SEAL_EVERY_S="0.5") as stack:
        yield stack


async def test_beside_services_under_load_what_was_done_is_named_and_nothing_else(audited: Stack) -> None:
    ledger, quota = audited.data / "ledger.db", audited.data / "quota.db"
    for nth in range(20):
        await audited.report(f"user_{nth}", 100 + nth)
    async with load(audited):
        for _ in range(2):
            said = await audit(audited.data)
            assert (said.status, said.err) == (0, ""), said
            assert "All agree." in said.out

        ((edited,),) = rows(ledger, "SELECT id FROM usage WHERE user_id = 'user_3'")
        change(ledger, "UPDATE usage SET tokens_used = 1 WHERE user_id = 'user_3'")
        said = await audit(audited.data, "--json")
        differences = json.loads(said.out)["differences"]
        assert len(differences) == 1, differences
        (difference,) = differences
        assert (said.status, difference["id"], difference["user_id"]) == (1, edited, "user_3")
        assert (difference["expected"], difference["found"]) == ({"tokens_used": 103}, {"tokens_used": 1})
        change(ledger, "UPDATE usage SET tokens_used = 103 WHERE user_id = 'user_3'")

        ((deleted,),) = rows(ledger, "SELECT id FROM usage WHERE user_id = 'user_4'")
        change(ledger, "CREATE TABLE kept AS SELECT * FROM usage WHERE user_id = 'user_4'")
        change(ledger, "DELETE FROM usage WHERE user_id = 'user_4'")
        said = await audit(audited.data)
        assert said.status == 1
        assert "ledger.usage: 1 on the stream, and not here" in said.out
        assert deleted in said.out
        change(ledger, "INSERT INTO usage SELECT * FROM kept", "DELETE FROM kept")

        # The last that the ledger wrote, and what comes meanwhile it writes behind them.
        change(ledger, "INSERT INTO kept SELECT * FROM usage ORDER BY rowid DESC LIMIT 3")
        change(ledger, "DELETE FROM usage WHERE id IN (SELECT id FROM kept)")
        said = await audit(audited.data, "--json")
        cut = {event_id for (event_id,) in rows(ledger, "SELECT id FROM kept")}
        found = json.loads(said.out)["differences"]
        assert (said.status, {difference["id"] for difference in found}) == (1, cut)
        assert {difference["kind"] for difference in found} == {"missing"}
        change(ledger, "INSERT INTO usage SELECT * FROM kept", "DROP TABLE kept")

        change(quota, "UPDATE usage_totals SET tokens_used = tokens_used + 5 WHERE user_id = 'user_5'")
        said = await audit(audited.data)
        assert said.status == 1
        assert "quota.usage_totals: 1 not the sum of the user's events in the period" in said.out
        assert "user_5" in said.out
        assert "make replay" in said.out
        assert (await audit(audited.data, "--user", "user_6")).status == 0
        assert (await audit(audited.data, "--user", "user_6", "--to", "2020-01-01")).status == 0
        unknown = await audit(audited.data, "--user", "user 6")
        assert (unknown.status, unknown.out) == (2, "")
        assert "Nothing is known of user 6" in unknown.err
        change(quota, "UPDATE usage_totals SET tokens_used = tokens_used - 5 WHERE user_id = 'user_5'")

        said = await audit(audited.data)
        assert said.status == 0, said


async def test_a_stopped_stack_is_audited_by_a_broker_of_its_own_and_starts_again(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "data")
    with stack:
        await stack.report("user_1", 100)
        await stack.report("user_2", 100)
        await stack.usage_reaches("user_2", 100)
    said = await audit(stack.data)
    assert (said.status, said.err) == (0, ""), said

    change(stack.data / "quota.db", "UPDATE usage_totals SET tokens_used = tokens_used + 5 WHERE user_id = 'user_1'")
    said = await audit(stack.data, "--json")
    (difference,) = json.loads(said.out)["differences"]
    assert (said.status, difference["kind"], difference["user_id"]) == (1, "differs", "user_1")

    # Nobody else has the store while an occasion lasts; afterwards everybody may.
    async with bus_of_folder(ServiceSettings(data=stack.data), name="test") as nc:
        assert (await bounds(nc))[1] >= 2
        with pytest.raises(pytest.fail.Exception, match="ChatRail is already running on the data folder"):
            await asyncio.to_thread(stack.start)
    with stack:
        await stack.usage_reaches("user_1", 105)


async def test_where_there_is_nothing_to_audit_a_sentence_says_so(tmp_path: Path) -> None:
    said = await audit(tmp_path / "nowhere")
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith(f"There is no stream in the data folder {tmp_path / 'nowhere'}. Start ChatRail")
    assert not (tmp_path / "nowhere").exists()

    (tmp_path / "nats-1").mkdir()
    with pytest.raises(Misconfigured, match="kept by three nodes: start them first, with make run-cluster"):
        async with bus_of_folder(ServiceSettings(data=tmp_path), name="test"):
            pass

    said = await audit(tmp_path, "--from", "yesterday")
    assert said.status == 2
    assert "neither a day, as 2026-11-30, nor a moment" in " ".join(said.err.replace("│", " ").split())
