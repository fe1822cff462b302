"""A disk or a stream that is full: nothing new is begun, what is under way is counted, and all goes on by itself."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import httpx2
import psutil
import pytest

from shared import streams
from shared.broker import connect
from tests.faults.beside import chat_beside
from tests.fixtures import eventually
from tests.left_out import left_out
from tests.people import ask, asked, client_of, given, open_holds, recorded, rows, totalled
from tests.stack import Stack

MIB = 1024 * 1024


class Disk(Protocol):
    """Where chat keeps its outbox and its log."""

    folder: Path

    def fill(self, pid: int) -> None: ...
    def free(self, pid: int) -> None: ...


class SmallDisk:
    """A file system of its own, of 8 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, _pid: int = 0) -> None:
        with (self.folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
            for size in (MIB, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    def free(self, _pid: int = 0) -> None:
        (self.folder / "filler").unlink()


class SizeLimit:
    """A process that may not write to any file: what a full disk looks like to whoever is not root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, pid: int) -> None:
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))

    def free(self, pid: int) -> None:
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


@contextmanager
def _mounted(folder: Path, *, size: str) -> Iterator[SmallDisk]:
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "chatrail-test", str(folder)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        left_out("no file system can be mounted here, so no disk can be filled")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(params=["small disk", "size limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "size limit":
        yield SizeLimit(tmp_path)
    else:
        with _mounted(tmp_path / "disk", size="8m") as small:
            yield small


def _recorded(stack: Stack, user: str) -> int:
    found = rows(stack.data / "ledger.db", "SELECT user_id, tokens_used FROM usage")
    return sum(tokens for user_id, tokens in found if user_id == user)


async def _given(stack: Stack, tag: str) -> list[int]:
    """The tokens of each answer."""
    return [record["tokens"] for record in (await given(stack))["records"] if record.get("tag") == tag]


async def test_a_full_disk_refuses_what_is_new_counts_what_is_under_way_and_goes_on_by_itself(
    stack: Stack, disk: Disk
) -> None:
    user, tag = f"user {uuid4()}", uuid4().hex
    body = {"userId": user, "messages": [{"role": "user", "content": f"Hello [tag {tag}]"}]}
    report = {"userId": user, "actionType": "chat_generation", "tokensUsed": 7}
    async with chat_beside(stack, disk.folder) as chat:
        client, pid = chat.http, chat.pid
        asked_before = await asked(stack)
        question = f"Hello [slow 50ms] [deltas 40] [tag {tag}]"
        under_way = [asyncio.create_task(ask(client, user, question)) for _ in range(5)]

        async def are_asked() -> bool:
            return await asked(stack) == asked_before + 5

        await eventually(are_asked)
        disk.fill(pid)

        async def is_refused() -> httpx2.Response | None:
            answer = await client.post("/api/chat", json=body)
            return answer if answer.status_code == 503 else None

        await eventually(is_refused)
        asked_when_full = await asked(stack)
        refusals = [await client.post("/api/chat", json=body), await client.post("/api/usage", json=report)]
        for refused in refusals:
            assert (refused.status_code, int(refused.headers["retry-after"])) == (503, 5)
            assert "make room in its data folder" in refused.json()["detail"]
        assert await asked(stack) == asked_when_full
        assert "outbox" in (await client.get("/readyz")).json()["missing"]
        assert (await client.get("/healthz")).is_success

        # The stream has each of them before its reader is told that it is done.
        assert [answer.last for answer in await asyncio.gather(*under_way)] == ["done"] * 5

        async def all_are_recorded() -> bool:
            return _recorded(stack, user) == sum(await _given(stack, tag)) > 0

        await eventually(all_are_recorded)

        disk.free(pid)
        await eventually(chat.is_ready)
        await eventually(chat.outbox_is_empty)
        before = len(await _given(stack, tag))
        assert (await client.post("/api/chat", json=body)).is_success
        assert len(await _given(stack, tag)) == before + 1
        await eventually(all_are_recorded)
    usage = await stack.usage_reaches(user, _recorded(stack, user))
    assert usage["tokensHeld"] == 0


async def test_a_disk_that_is_full_for_all_parts_at_once_costs_no_token_and_nobody_needs_to_start_anything(
    tmp_path: Path,
) -> None:
    variables = {"CHATRAIL_STREAM_BYTES_MAX": str(32 * MIB)}
    with _mounted(tmp_path / "disk", size="256m") as disk, Stack(disk.folder / "data", **variables) as stack:
        async with client_of(stack) as client:
            body = {"userId": "user_1", "messages": [{"role": "user", "content": "Hello"}]}
            question = "Hello [slow 100ms] [deltas 20]"
            under_way = [asyncio.create_task(ask(client, "user_1", question)) for _ in range(10)]

            async def are_asked() -> bool:
                return await asked(stack) == 10

            await eventually(are_asked)
            disk.fill()
            # The broker has its store on it, too: neither disk nor stream takes what is settled now.
            answers = await asyncio.gather(*under_way)
            assert {(answer.last, answer.data.get("title")) for answer in answers} <= {
                ("done", None),
                ("error", "Not counted yet"),
            }
            assert (await client.post("/api/chat", json=body)).status_code == 503
            assert await asked(stack) == 10
            assert (await client.get("/readyz")).status_code == 503
            disk.free()
            await stack.answers("/readyz", timeout_s=60)
            assert (await client.post("/api/chat", json=body)).is_success

        async def all_agree() -> bool:
            return recorded(stack) == totalled(stack) == (await given(stack))["tokens"] and not open_holds(stack)

        await eventually(all_agree)


async def test_a_full_stream_fills_the_outbox_and_then_what_is_new_is_refused_until_there_is_room(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    room = {"CHATRAIL_STREAM_BYTES_MAX": str(16 * 1024), "CHATRAIL_OUTBOX_EVENTS_MAX": "5"}
    with Stack(tmp_path_factory.mktemp("full") / "data", **room) as stack:
        user = "user_1"
        body = {"userId": user, "messages": [{"role": "user", "content": "Hello"}]}
        async with client_of(stack) as client:

            async def is_refused() -> bool:
                return (await client.post("/api/chat", json=body)).status_code == 503

            await eventually(is_refused)
            asked_when_full = await asked(stack)
            refused = await client.post("/api/usage", json={"userId": user, "actionType": "any", "tokensUsed": 7})
            assert (refused.status_code, int(refused.headers["retry-after"])) == (503, 5)
            assert "5 events that the usage stream has not taken yet" in refused.json()["detail"]
            assert "outbox" in (await client.get("/readyz")).json()["missing"]
            assert "chatrail_outbox_events 5.0" in (await client.get("/metrics")).text
            assert await is_refused()
            assert await asked(stack) == asked_when_full

            nats = await connect(stack.endpoints["nats"], name="test")
            js = nats.jetstream()
            config = (await js.stream_info(streams.STREAM)).config
            await js.update_stream(replace(config, max_bytes=MIB))
            await nats.close()
            await stack.answers("/readyz")
            assert (await client.post("/api/chat", json=body)).is_success

        async def all_agree() -> bool:
            return recorded(stack) == totalled(stack) == (await given(stack))["tokens"] and not open_holds(stack)

        await eventually(all_agree)
