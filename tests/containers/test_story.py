"""The product page's story on real containers: two replicas of each consumer, PostgreSQL, and replicas that die."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from tests.containers.conftest import Containers, output
from tests.fixtures import eventually
from tests.people import ask, ask_until_answered

SERVICES = ["chat", "ledger", "quota"]
PEOPLE = 50
# What a dead replica took and did not acknowledge comes again after the durable's ack_wait, and once more if need be.
AGREE_DEADLINE_S = 60


@pytest.fixture
async def client(containers: Containers) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=containers.url, trust_env=False, timeout=60) as client:
        yield client


async def usage(client: httpx2.AsyncClient, user_id: str) -> dict[str, Any]:
    body: dict[str, Any] = (await client.get("/api/usage", params={"userId": user_id})).raise_for_status().json()
    return body


async def report(client: httpx2.AsyncClient, user_id: str, tokens: int) -> None:
    body = {"userId": user_id, "actionType": "chat_generation", "tokensUsed": tokens}
    (await client.post("/api/usage", json=body)).raise_for_status()


async def given(client: httpx2.AsyncClient, containers: Containers) -> dict[str, Any]:
    """What the provider says that it gave."""
    counts: dict[str, Any] = (await client.get(f"{containers.claude_url}/given")).raise_for_status().json()
    return counts


async def three_counts_agree(client: httpx2.AsyncClient, containers: Containers) -> None:
    """Returns once provider, ledger and totals say the same, reports included."""
    gave = (await given(client, containers))["tokens"]

    async def agree() -> bool:
        generated = _sum(containers, "ledger", "usage WHERE usage_source = 'provider'")
        recorded = _sum(containers, "ledger", "usage")
        return gave == generated and recorded == _sum(containers, "quota", "usage_totals")

    await eventually(agree, deadline_s=AGREE_DEADLINE_S)


def _sum(containers: Containers, service: str, rows: str) -> int:
    return containers.query(service, f"SELECT coalesce(sum(tokens_used), 0) FROM {rows}")  # noqa: S608


async def test_a_user_goes_from_nothing_to_the_limit_and_on_with_a_larger_plan(
    client: httpx2.AsyncClient, containers: Containers
) -> None:
    user = "user_1"
    fresh = await usage(client, user)
    assert (fresh["tokensUsed"], fresh["tokensLimit"]) == (0, 108_000)
    answer = await ask(client, user, "Explain metering. [usage input=5282 output=2812]")
    assert (answer.last, answer.data["tokensUsed"]) == ("done", 8_094)
    after_one = await usage(client, user)
    assert (after_one["tokensUsed"], after_one["tokensRemaining"]) == (8_094, 99_906)
    assert after_one["usagePercentage"] == 7.5

    for tokens, used in ((6_500, 14_594), (75_406, 90_000), (18_000, 108_000)):
        await report(client, user, tokens)
        assert (await usage(client, user))["tokensUsed"] == used
    with pytest.raises(httpx2.HTTPStatusError) as refused:
        await ask(client, user, "One more?")
    assert refused.value.response.status_code == 429
    assert refused.value.response.json()["detail"] == "Upgrade to Pro"

    (await client.put(f"/api/subscriptions/{user}", json={"tier": "pro"})).raise_for_status()
    assert (await ask(client, user, "And now?")).last == "done"
    assert (await usage(client, user))["tokensLimit"] == 500_000
    await three_counts_agree(client, containers)


async def test_fifty_people_chatting_at_once_are_counted_to_the_token_by_two_replicas_each(
    client: httpx2.AsyncClient, containers: Containers
) -> None:
    answers = await asyncio.gather(*(ask(client, f"person {number}", "Hello?") for number in range(PEOPLE)))
    assert {answer.last for answer in answers} == {"done"}
    await three_counts_agree(client, containers)
    for service, event in (("ledger", b"usage_recorded"), ("quota", b"usage_settled")):
        assert [event in replica.logs() for replica in containers.running(service)] == [True, True]


async def test_replicas_killed_in_the_middle_cost_no_token(
    client: httpx2.AsyncClient, containers: Containers
) -> None:
    asked_before = (await given(client, containers))["messageRequests"]
    questions = [
        asyncio.create_task(ask_until_answered(client, f"survivor {number}", f"I am {number}. [slow 20ms]"))
        for number in range(PEOPLE)
    ]

    async def half_are_being_answered() -> bool:
        return bool((await given(client, containers))["messageRequests"] - asked_before > PEOPLE / 2)

    await eventually(half_are_being_answered)
    killed = [containers.running(service)[0] for service in ("ledger", "quota")]
    for replica in killed:
        await asyncio.to_thread(replica.kill)
    answers = await asyncio.gather(*questions)
    assert {answer.last for answer in answers} == {"done"}
    await three_counts_agree(client, containers)
    for replica in killed:
        replica.start()


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_its_own_service_and_nothing_to_build_with(containers: Containers, service: str) -> None:
    container = containers.running(service)[0]
    assert output(container, "ls", "/app/services").split() == ["__init__.py", service]
    assert output(container, "sh", "-c", "command -v cc gcc g++ make || true") == ""
    assert output(container, "sh", "-c", "find / -xdev -path '*/.cache/pip' 2>/dev/null || true") == ""


@pytest.mark.parametrize("service", [*SERVICES, "claude", "nats"])
def test_a_container_runs_without_privileges(containers: Containers, service: str) -> None:
    container = containers.running(service)[0]
    assert output(container, "id", "--user").strip() == "10001"
    status = dict(line.split(":\t") for line in output(container, "cat", "/proc/1/status").splitlines())
    assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"


def test_only_its_owner_reaches_a_database(containers: Containers) -> None:
    connect = ["python", "-c", "import socket; socket.create_connection(('ledger-db', 5432), 2)"]
    statuses = {service: containers.running(service)[0].exec_run(connect)[0] for service in SERVICES}
    assert statuses == {"chat": 1, "ledger": 0, "quota": 1}


@pytest.mark.parametrize("service", ["ledger", "quota"])
def test_a_command_that_keeps_what_it_reads_has_room_for_it(containers: Containers, service: str) -> None:
    replay = ["python", "-m", f"services.{service}", "replay", "--until", "2026-01-01"]
    assert f"{service}: 0 messages read" in output(containers.running(service)[0], *replay)


async def test_an_audit_reaches_both_databases(client: httpx2.AsyncClient, containers: Containers) -> None:
    await ask(client, "audited", "Hello?")
    await three_counts_agree(client, containers)
    assert "All agree." in containers.run("audit")
