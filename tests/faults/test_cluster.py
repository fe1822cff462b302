"""Three nodes under load: any one may die, two cost only what needs the stream, and every token is counted once."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2
import psutil
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from shared import streams
from shared.broker import connect
from tests.fixtures import eventually
from tests.people import ask, client_of, given, open_holds, recorded, totalled
from tests.stack import Stack

NODES = ("broker-1", "broker-2", "broker-3")
PEOPLE = 6
# Between two questions: what is to be seen is who gets an answer, and not how many.
PAUSE_S = 0.1
TOLD_WITHIN_S = 2.5  # two seconds, and a half for a busy machine
WINDOW_MAX_S = 10.0  # in which the nodes that are left agree on leaders
REPORT_TOKENS = 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("cluster") / "data", CHATRAIL_NATS_CLUSTER="true") as running:
        yield running


@dataclass
class Seen:
    """What people, and a back end that reports usage, were told."""

    done: int = 0
    done_at: float = field(default_factory=time.monotonic)
    longest_window_s: float = 0.0
    reported_tokens: int = 0
    refused_reports: int = 0
    slowest_refusal_s: float = 0.0
    other: list[str] = field(default_factory=list)


@asynccontextmanager
async def load(cluster: Stack) -> AsyncIterator[Seen]:
    """People who chat and a back end that reports, one after the other, as long as this lasts."""
    seen, is_over = Seen(), asyncio.Event()

    async def chat(client: httpx2.AsyncClient, person: int) -> None:
        while not is_over.is_set():
            begun = time.monotonic()
            try:
                answer = await ask(client, f"person {person}", "Go on. [slow 10ms]", maxTokens=50)
                if answer.last == "done":
                    _done()
                else:
                    seen.other.append(answer.last)
            except httpx2.HTTPStatusError as refused:
                await _refused(refused.response, begun)
            await asyncio.sleep(PAUSE_S)

    async def report(client: httpx2.AsyncClient) -> None:
        body = {
            "userId": "reported",
            "actionType": "chat_generation",
            "tokensUsed": REPORT_TOKENS,
            "metadata": {"inputTokens": REPORT_TOKENS, "outputTokens": 0, "model": "claude-haiku-4-5"},
        }
        while not is_over.is_set():
            begun = time.monotonic()
            answer = await client.post("/api/usage", json=body)
            if answer.status_code == 200:
                seen.reported_tokens += REPORT_TOKENS
            else:
                seen.refused_reports += 1
                await _refused(answer, begun)
            await asyncio.sleep(PAUSE_S)

    def _done() -> None:
        now = time.monotonic()
        seen.longest_window_s = max(seen.longest_window_s, now - seen.done_at)
        seen.done, seen.done_at = seen.done + 1, now

    async def _refused(answer: httpx2.Response, begun: float) -> None:
        seen.slowest_refusal_s = max(seen.slowest_refusal_s, time.monotonic() - begun)
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            seen.other.append(f"{answer.status_code} {answer.text}")

    async with client_of(cluster) as client, asyncio.TaskGroup() as tasks:
        for person in range(PEOPLE):
            tasks.create_task(chat(client, person))
        tasks.create_task(report(client))
        try:
            yield seen
        finally:
            is_over.set()


async def is_whole(nats: Client) -> bool:
    """The stream and its durables have a leader, and two replicas that are up to date."""
    js = nats.jetstream(timeout=1)
    try:
        found = [await js.stream_info(streams.STREAM), await js.stream_info(streams.ALERTS)]
        found += [await js.consumer_info(streams.STREAM, name) for name in (streams.LEDGER, streams.QUOTA)]
    except NatsError:
        return False
    replicas = [(one.cluster and one.cluster.replicas) or [] for one in found]
    return all(len(each) == 2 and all(peer.current and not peer.offline for peer in each) for each in replicas)


async def leader(nats: Client) -> str:
    cluster = (await nats.jetstream().stream_info(streams.STREAM)).cluster
    return str(cluster and cluster.leader)


async def all_agree(cluster: Stack, reported_tokens: int) -> None:
    """The provider's count and the reports, the ledger and the totals."""

    async def is_agreed() -> bool:
        gave = int((await given(cluster))["tokens"]) + reported_tokens
        return recorded(cluster) == totalled(cluster) == gave and not open_holds(cluster)

    await eventually(is_agreed)


@pytest.fixture
async def nats(cluster: Stack) -> AsyncIterator[Client]:
    client = await connect(cluster.endpoints["nats"], name="test")
    yield client
    await client.close()


@pytest.fixture(scope="module")
def reported() -> list[int]:
    """What the tests so far have reported."""
    return []


async def test_the_bus_is_on_all_three_nodes(cluster: Stack, nats: Client) -> None:
    async def on_all() -> bool:
        return await is_whole(nats)

    await eventually(on_all)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_any_node_may_die_the_streams_leader_included(
    cluster: Stack, nats: Client, reported: list[int], number: signal.Signals
) -> None:
    async def whole() -> bool:
        return await is_whole(nats)

    async with load(cluster) as seen:
        await eventually(whole)
        first = await leader(nats)
        for node in (first, *(node for node in NODES if node != first)):
            done, pid = seen.done, cluster.pid(node)
            os.kill(pid, number)

            async def chats_go_on(done: int = done, node: str = node, pid: int = pid) -> bool:
                return seen.done > done + PEOPLE and cluster.parts().get(node) not in (None, pid)

            await eventually(chats_go_on)
            await eventually(whole)
            for service in ("chat", "quota", "ledger"):
                await cluster.answers(f"{cluster.endpoints[service]}/readyz", timeout_s=30)
    reported.append(seen.reported_tokens)
    assert seen.other == []
    assert seen.longest_window_s < WINDOW_MAX_S
    assert seen.slowest_refusal_s < TOLD_WITHIN_S
    await all_agree(cluster, sum(reported))


async def test_with_two_nodes_gone_who_needs_the_stream_is_told_and_what_is_used_is_kept_until_they_are_back(
    cluster: Stack, nats: Client, reported: list[int]
) -> None:
    gone = [psutil.Process(cluster.pid(node)) for node in NODES[:2]]
    async with load(cluster) as seen, client_of(cluster) as operator:
        for node in gone:
            node.suspend()  # dead to everybody, and not started again while they are
        try:

            async def stream_is_missed() -> bool:
                begun = time.monotonic()
                answer = await operator.put("/api/subscriptions/operated", json={"tier": "pro"})
                assert time.monotonic() - begun < TOLD_WITHIN_S
                return answer.status_code == 503 and "retry-after" in answer.headers

            await eventually(stream_is_missed)

            async def quota_and_ledger_are_not_ready() -> bool:
                answers = [await operator.get(f"{cluster.endpoints[each]}/readyz") for each in ("quota", "ledger")]
                return [answer.status_code for answer in answers] == [503, 503]

            await eventually(quota_and_ledger_are_not_ready)
        finally:
            for node in gone:
                node.resume()

        async def is_whole_and_ready() -> bool:
            answer = await operator.get("/readyz")
            return await is_whole(nats) and answer.status_code == 200

        await eventually(is_whole_and_ready)
        done = seen.done

        async def chats_go_on() -> bool:
            return seen.done > done + PEOPLE

        await eventually(chats_go_on)
    reported.append(seen.reported_tokens)
    assert seen.other == []
    assert seen.slowest_refusal_s < TOLD_WITHIN_S
    await all_agree(cluster, sum(reported))
