"""A part that is away, not dead: it hangs for a while. People are told in time, and then all is well."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        yield
    finally:
        process.send_signal(signal.SIGCONT)


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
