"""A part that is away, not dead: it hangs for a while. People are told in time, and then all is well."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import uuid4

import httpx2
import psutil
import pytest

from tests.fixtures import eventually
from tests.people import ask, asked, client_of, given, open_holds, recorded, totalled
from tests.stack import Stack

TOLD_WITHIN_S = 2.0


@contextmanager
def away(stack: Stack, part: str) -> Iterator[None]:
    """The process stands still: its connections are open, and nobody answers."""
    process = psutil.Process(stack.pid(part))
    process.send_signal(signal.SIGSTOP)
    try:
        # On a machine with much to do it goes on until one of its threads has its turn.
        while (status := process.status()) != psutil.STATUS_STOPPED:
            assert status != psutil.STATUS_ZOMBIE, f"{part} has ended"
            time.sleep(0.001)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


class Route(NamedTuple):
    """One that asks others; `needs` are those without whom it can but say 503."""

    method: str
    path: str
    needs: set[str]
    body: dict[str, Any] | None = None
    headers: dict[str, str] | None = None


def routes(user: str) -> list[Route]:
    """All of them. What they count is nothing, so that the stack's counts agree in the end."""
    report = {"userId": user, "actionType": "chat_generation", "tokensUsed": 0}
    top_up = {"userId": user, "topUpTokens": 1, "reason": "a gift", "actor": "support"}
    question = {"userId": user, "messages": [{"role": "user", "content": "Anybody there?"}]}
    return [
        Route("GET", f"/api/usage?userId={user}", {"broker", "quota"}),
        Route("GET", f"/api/usage/history?userId={user}", {"broker", "ledger"}),
        Route("GET", f"/api/usage/logs?userId={user}", {"broker", "ledger"}),
        Route("GET", f"/api/usage/explain?userId={user}&generationId=1", {"broker", "ledger", "quota"}),
        Route("GET", f"/api/usage/events?userId={user}", set()),
        Route("GET", "/api/plans", set()),
        # As one document: of an answer that is not read to its end nobody knows the count.
        Route("POST", "/api/chat", {"broker", "quota"}, question, {"Accept": "application/json"}),
        Route("POST", "/api/usage", set(), report),
        Route("POST", "/api/usage", {"broker"}, report, {"Idempotency-Key": str(uuid4())}),
        Route("POST", "/api/usage/adjustments", {"broker"}, top_up),
        Route("PUT", f"/api/subscriptions/{user}", {"broker"}, {"tier": "free"}),
    ]


async def told(client: httpx2.AsyncClient, route: Route) -> tuple[httpx2.Response, float]:
    """What is answered, and after how many seconds; of a stream of events, its first."""
    started = time.monotonic()
    async with client.stream(route.method, route.path, json=route.body, headers=route.headers) as answer:
        async for _ in answer.aiter_bytes():
            if answer.headers["content-type"].startswith("text/event-stream"):
                break
        return answer, time.monotonic() - started


async def told_again_if_late(client: httpx2.AsyncClient, route: Route) -> tuple[httpx2.Response, float]:
    """On a machine with much to do somebody may be late once. Whoever waits for too long is late each time."""
    for _ in range(2):
        answer, after_s = await told(client, route)
        if after_s < TOLD_WITHIN_S:
            return answer, after_s
    return await told(client, route)


def is_told_to_come_back(answer: httpx2.Response) -> bool:
    return answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("part", ["broker", "quota", "ledger"])
async def test_every_route_answers_in_time_while_a_part_stands_still(stack: Stack, part: str) -> None:
    asked_for = routes(f"patient_{uuid4().hex}")
    async with client_of(stack) as client:
        await stack.answers("/readyz")
        with away(stack, part):
            answers = await asyncio.gather(*(told_again_if_late(client, route) for route in asked_for))
        await stack.answers("/readyz")
    for route, (answer, after_s) in zip(asked_for, answers, strict=True):
        assert after_s < TOLD_WITHIN_S, route
        assert is_told_to_come_back(answer) if part in route.needs else answer.status_code in (200, 404), route


@pytest.mark.parametrize("part", ["broker", "quota", "ledger"])
async def test_every_route_answers_in_time_when_a_part_has_been_killed(stack: Stack, part: str) -> None:
    asked_for = routes(f"patient_{uuid4().hex}")
    async with client_of(stack) as client:
        await stack.answers("/readyz")
        stack.kill(part)
        answers = await asyncio.gather(*(told(client, route) for route in asked_for))
        await stack.answers("/readyz")
    for route, (answer, after_s) in zip(asked_for, answers, strict=True):
        assert after_s < TOLD_WITHIN_S, route
        # It is started again, perhaps before it was asked.
        assert is_told_to_come_back(answer) or answer.status_code in (200, 404), route


@pytest.mark.parametrize("part", ["quota", "broker"])
async def test_while_a_part_is_away_nothing_is_spent_and_everybody_is_told_in_time(stack: Stack, part: str) -> None:
    user = f"patient {part}"
    question = {"userId": user, "messages": [{"role": "user", "content": "Anybody there?"}]}
    async with client_of(stack) as client:
        asked_before = await asked(stack)
        with away(stack, part):
            started = time.monotonic()
            answers = await asyncio.gather(
                client.post("/api/chat", json=question), client.get("/api/usage", params={"userId": user})
            )
            assert time.monotonic() - started < TOLD_WITHIN_S
            for answer in answers:
                assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
                assert int(answer.headers["retry-after"]) >= 1
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
        assert await asked(stack) == asked_before

        async def is_answered() -> bool:
            return (await client.post("/api/chat", json=question)).status_code == 200

        await eventually(is_answered)

    async def all_agree() -> bool:
        gave = int((await given(stack))["tokens"])
        return recorded(stack) == totalled(stack) == gave and not open_holds(stack)

    await eventually(all_agree)


async def test_an_answer_that_ends_while_the_broker_is_away_is_counted_when_it_is_back(stack: Stack) -> None:
    async with client_of(stack) as client:
        asked_before = await asked(stack)
        asking = asyncio.create_task(ask(client, "in between", "Go on. [slow 30ms]"))

        async def is_being_answered() -> bool:
            return await asked(stack) > asked_before

        await eventually(is_being_answered)
        with away(stack, "broker"):
            answer = await asking
    assert answer.last == "done"
    await stack.answers("/readyz")  # quota may take a moment longer than chat to be back on the bus
    await stack.usage_reaches("in between", answer.data["tokensUsed"], timeout_s=30)

    async def all_agree() -> bool:
        gave = int((await given(stack))["tokens"])
        return recorded(stack) == totalled(stack) == gave and not open_holds(stack)

    await eventually(all_agree)
    # A client that lost its reading half would have noticed only now, a quarter of a minute later.
    assert not [log for log in (stack.data / "logs").iterdir() if "encountered error" in log.read_text()]
