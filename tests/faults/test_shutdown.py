"""A chat service that is told to stop: answers under way may end, none is begun, and nothing is lost."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx2
import psutil
import pytest

from tests.faults.beside import Chat, chat_beside
from tests.fixtures import eventually
from tests.people import Answer, ask, asked, given, rows
from tests.stack import Stack

GRACE_S = 2.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One of its own: what is cut off is estimated, and no sum of what the provider gave."""
    with Stack(tmp_path_factory.mktemp("stopped") / "data") as running:
        yield running


async def _asking(stack: Stack, chat: Chat, user: str, *questions: str) -> list[asyncio.Task[Answer]]:
    """Questions that Claude is answering."""
    before = await asked(stack)
    asking = [asyncio.create_task(ask(chat.http, user, question)) for question in questions]

    async def are_asked() -> bool:
        return await asked(stack) == before + len(questions)

    await eventually(are_asked)
    return asking


async def _recorded(stack: Stack, user: str, records: int) -> dict[str, int]:
    """The tokens of each outcome, once there are so many records."""

    async def look() -> dict[str, int] | None:
        found = rows(stack.data / "ledger.db", "SELECT user_id, outcome, tokens_used FROM usage")
        mine = {outcome: tokens for user_id, outcome, tokens in found if user_id == user}
        return mine if len([row for row in found if row[0] == user]) == records else None

    return await eventually(look)


async def test_what_ends_within_the_grace_is_whole_the_rest_is_cut_and_counted_and_nothing_is_begun(
    stack: Stack, tmp_path: Path
) -> None:
    user, tag = f"user {uuid4()}", uuid4().hex
    async with chat_beside(stack, tmp_path, CHATRAIL_GRACE_S=str(GRACE_S)) as chat:
        short, long = await _asking(
            stack, chat, user, f"[slow 50ms] [deltas 10] [tag {tag}]", "[slow 100ms] [deltas 400] [usage input=20]"
        )
        # Somebody whose question is on its way: half of it has come.
        body = json.dumps({"userId": user, "messages": [{"role": "user", "content": "Hello"}]}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", chat.port)
        head = ["POST /api/chat HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
        lines = [*head, f"content-length: {len(body)}", "", ""]
        writer.write("\r\n".join(lines).encode() + body[:10])
        await writer.drain()
        assert (await chat.http.get("/healthz")).is_success  # read after what came before it

        begun = time.monotonic()
        psutil.Process(chat.pid).send_signal(signal.SIGTERM)

        async def nobody_listens() -> bool:
            try:
                async with httpx2.AsyncClient(trust_env=False, verify=False) as newcomer:
                    await newcomer.get(f"http://127.0.0.1:{chat.port}/healthz")
            except httpx2.ConnectError:
                return True
            except (httpx2.RemoteProtocolError, httpx2.ReadError):
                return False  # let in just as the door was closed
            return False

        await eventually(nobody_listens)
        writer.write(body[10:])
        refused = (await reader.read()).lower()
        writer.close()
        assert refused.startswith(b"http/1.1 503")
        assert b"retry-after: 2" in refused
        assert b"the service is restarting" in refused

        assert (await short).last == "done"
        cut = await long
        assert (cut.last, cut.data["title"]) == ("error", "The service is restarting")
        await asyncio.to_thread(chat.process.wait, 20)
        assert time.monotonic() - begun >= GRACE_S
        assert await chat.outbox_is_empty()
    recorded = await _recorded(stack, user, records=2)
    (whole,) = [record for record in (await given(stack))["records"] if record.get("tag") == tag]
    assert recorded["completed"] == whole["tokens"]
    assert recorded["interrupted"] > 20
    assert (await stack.usage(user))["tokensHeld"] == 0


async def test_what_the_broker_does_not_take_before_the_end_is_published_by_the_next_process(
    stack: Stack, tmp_path: Path
) -> None:
    user = f"user {uuid4()}"
    broker = psutil.Process(stack.pid("broker"))
    async with chat_beside(stack, tmp_path, CHATRAIL_GRACE_S="0") as chat:
        (asking,) = await _asking(stack, chat, user, "[slow 100ms] [deltas 400] [usage input=20]")
        broker.suspend()
        try:
            psutil.Process(chat.pid).send_signal(signal.SIGTERM)
            await asking
            await asyncio.to_thread(chat.process.wait, 20)
        finally:
            broker.resume()
        assert chat.process.poll() is not None
        assert not await chat.outbox_is_empty()
    await stack.answers("/readyz")
    async with chat_beside(stack, tmp_path) as chat:
        await eventually(chat.outbox_is_empty)
    assert (await _recorded(stack, user, records=1))["interrupted"] >= 20
    await stack.usage_reaches(user, (await _recorded(stack, user, records=1))["interrupted"])
