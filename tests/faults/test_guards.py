"""What a process notices about itself, and what it does then."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest
from structlog.testing import capture_logs

from shared import guards, telemetry
from shared.telemetry import Missing
from tests import forked
from tests.fixtures import eventually
from tests.people import client_of, given, recorded, rows
from tests.stack import PROJECT, Stack, environment, free_port

# Ten beats of a tenth of a second; the loop is kept for as long as the test wants.
PROGRAM = """
import asyncio, sys, time
from shared import guards, telemetry
from shared.telemetry import configure_logging

guards.BEAT_EVERY_S = 0.1

async def main():
    async with guards.beating():
        print("guarded", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        time.sleep(float(sys.argv[1]))
        await asyncio.sleep(0.5)

configure_logging("test")
asyncio.run(main())
"""


# A service like any other, with a route that keeps the loop.
SERVICE = """
import sys, time
from starlette.applications import Starlette
from starlette.routing import Route
from shared import guards
from shared.server import serve
from shared.settings import ServiceSettings
from shared.telemetry import install_probes

guards.BEAT_EVERY_S = 0.1

async def block(request):
    time.sleep(60)

async def ready():
    return {}

def create_app(settings):
    app = Starlette(routes=[Route("/block", block)])
    install_probes(app, ready)
    return app

serve("test", ServiceSettings.read, create_app)
"""

# One that hears when it is told to end, and then ends or not.
PART = """
import asyncio, signal, sys
from shared import broker, guards
from shared.telemetry import configure_logging

broker.ENDS_WITHIN_S = 0.3

async def fail():
    raise ValueError("it is broken")

async def main():
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    part = guards.essential(asyncio.create_task(fail(), name="the part"))
    await told.wait()
    if sys.argv[1] == "never":
        await asyncio.Event().wait()

configure_logging("test")
asyncio.run(main())
"""


@contextmanager
def guarded_process(blocked_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process whose event loop stands still for so long, once it is told to begin."""
    command = [sys.executable, "-c", PROGRAM, str(blocked_s)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=PROJECT, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "guarded\n"
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def test_a_process_whose_event_loop_is_stuck_says_where_and_ends() -> None:
    with guarded_process(60) as process:
        output, errors = process.communicate("begin\n", timeout=30)
    assert process.returncode == 1
    assert [json.loads(line)["event"] for line in output.splitlines()][-1] == "event_loop_blocked"
    assert "in main" in errors


async def test_whatever_is_served_ends_when_its_event_loop_is_stuck(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path / "log"
    with log.open("wb") as output:
        command, settings = [sys.executable, "-c", SERVICE], environment(CHATRAIL_PORT=str(port))
        process = await asyncio.create_subprocess_exec(*command, cwd=PROJECT, env=settings, stdout=output)
    try:
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:

            async def is_ready() -> bool:
                with suppress(httpx2.TransportError):
                    return (await client.get(f"{url}/readyz")).status_code == 200
                return False

            await eventually(is_ready)
            with pytest.raises(httpx2.TransportError):
                await client.get(f"{url}/block", timeout=30)
        async with asyncio.timeout(10):
            assert await process.wait() == 1
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert "event_loop_blocked" in log.read_text()


@pytest.mark.parametrize(("ends", "status"), [("in order", 0), ("never", 1)])
def test_a_process_ends_when_a_part_fails_that_it_cannot_do_without(ends: str, status: int) -> None:
    command = [sys.executable, "-c", PART, ends]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=30, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["reason"] for line in told if line["event"] == "process_ends"] == [
        "the part failed: ValueError('it is broken')"
    ]
    assert done.returncode == status


@pytest.mark.parametrize("service", ["ledger", "quota"])
async def test_a_service_that_waits_for_its_broker_can_be_told_to_stop(tmp_path: Path, service: str) -> None:
    settings = environment(CHATRAIL_DATA=str(tmp_path), CHATRAIL_NATS_URL=f"nats://127.0.0.1:{free_port()}")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = forked.start(f"services.{service}", "serve", env=settings, output=output)

    async def is_waiting() -> bool:
        return b"nats_error" in log.read_bytes()

    try:
        await eventually(is_waiting)
        process.terminate()
        async with asyncio.timeout(10):
            assert await process.ended() == 0
    finally:
        process.kill()


@pytest.mark.parametrize("blocked_s", [0, 0.5])
def test_a_loop_that_turns_again_is_left_alone(blocked_s: float) -> None:
    with guarded_process(blocked_s) as process:
        output, errors = process.communicate("begin\n", timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert "event_loop_blocked" not in output


def test_a_process_that_was_stopped_and_continues_has_missed_nothing() -> None:
    with guarded_process(0) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)  # this is the fault itself: as long as twenty beats
        process.send_signal(signal.SIGCONT)
        process.communicate("begin\n", timeout=30)
    assert process.returncode == 0


async def test_the_log_says_when_a_service_stops_being_ready_and_when_it_is_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards, "READINESS_EVERY_S", 0.01)
    monkeypatch.setattr(telemetry, "LOOK_TIMEOUT_S", 0.2)
    looks: list[Missing | None] = [{}, {}, {"nats": "away"}, {"nats": "away"}, None, {}, {}]

    async def missing() -> Missing:
        absent = looks.pop(0) if looks else {}
        if absent is None:
            await asyncio.sleep(60)
        return absent or {}

    async def seen_all() -> bool:
        return not looks

    with capture_logs() as logs:
        async with guards.readiness_logged(missing):
            await eventually(seen_all)
    told = [(line["event"], line.get("missing")) for line in logs]
    assert told[:4] == [
        ("ready", None),
        ("not_ready", {"nats": "away"}),
        ("not_ready", {"readiness": "cannot be told within 0.2 s"}),
        ("ready", None),
    ]


async def test_told_twice_to_stop_chat_waits_for_no_answer_and_loses_none(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Stack(tmp_path_factory.mktemp("hurry") / "data") as stack:
        async with client_of(stack) as http:
            body = {"userId": "user_1", "messages": [{"role": "user", "content": "[slow 1s] [deltas 50] Hello"}]}
            with suppress(httpx2.TransportError):
                async with http.stream("POST", "/api/chat", json=body) as answer:
                    words = answer.aiter_lines()
                    await anext(words)
                    chat = psutil.Process(stack.pid("chat"))
                    begun = time.monotonic()
                    chat.send_signal(signal.SIGTERM)
                    await asyncio.sleep(0.2)
                    chat.send_signal(signal.SIGTERM)
                    async for _ in words:
                        pass
            await asyncio.to_thread(chat.wait, 20)
            assert time.monotonic() - begun < 4, "chat waited for its grace, which is five seconds"

        async def counted() -> bool | None:
            return recorded(stack) > 0 or None

        await eventually(counted)
        assert rows(stack.data / "ledger.db", "SELECT outcome FROM usage") == [("interrupted",)]
        assert (await given(stack))["generations"] == 1
