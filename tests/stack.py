"""The local stack as tests use it: what `make run` starts, on a data folder and a port of its own."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx2
import psutil
import pytest
from pydantic import TypeAdapter

from tests import forked
from tests.forked import Forked

PROJECT = forked.PROJECT
COMMAND = [sys.executable, "-m", "deploy.local"]
READY_TIMEOUT_S = 90
STOP_TIMEOUT_S = 60
# A killed part is started again within a second or two; importing it takes as long again on a busy machine.
RESTART_TIMEOUT_S = 20

_endpoints: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


def free_port() -> int:
    """Below those that the system gives to whoever asks for any: it stays free while its process is started again."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def environment(**variables: str) -> dict[str, str]:
    """The test run's own, without the developer's settings of ChatRail and of Claude."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("CHATRAIL_", "ANTHROPIC_"))}
    return {**ours, **variables}


class Stack:
    """Starts and stops as a context, or by `start` and `stop`. Bound to no event loop: any test can use it."""

    def __init__(self, data: Path, **variables: str) -> None:
        self.data = data
        port = variables.setdefault("CHATRAIL_PORT", str(free_port()))
        # A test that needs a slow answer says so in its question.
        variables.setdefault("CHATRAIL_STAND_IN_DELAY_MS", "2")
        self.url = f"http://127.0.0.1:{port}"
        self._environment = environment(CHATRAIL_DATA=str(data), **variables)
        self._process: subprocess.Popen[bytes] | Forked | None = None

    def __enter__(self) -> "Stack":
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the stack says that it is ready; fails the test with all that it said when it is not."""
        with tempfile.TemporaryFile() as output:
            self._process = self._launched(output)
            deadline = time.monotonic() + READY_TIMEOUT_S
            while f"ChatRail is ready at {self.url}\n" not in (
                said := os.pread(output.fileno(), 1_000_000, 0).decode()
            ):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    pytest.fail(f"The stack is not ready. It said:\n{said}", pytrace=False)
                time.sleep(0.05)

    def _launched(self, output: IO[bytes]) -> subprocess.Popen[bytes] | Forked:
        if sys.platform != "linux":  # elsewhere a forked part has no name by which it could be found
            return self._executed(output)
        return forked.start("deploy.local", env=self._environment, output=output)

    def _executed(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            COMMAND,
            cwd=PROJECT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit status, once the process is gone. To stop what has stopped is no error."""
        self._running().send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit status of a stack that ends by itself."""
        return self._running().wait(STOP_TIMEOUT_S)

    @property
    def is_running(self) -> bool:
        return self._running().poll() is None

    @property
    def endpoints(self) -> dict[str, str]:
        """Where each part answers: chat, ledger, quota, nats, claude."""
        return _endpoints.validate_json((self.data / "endpoints.json").read_bytes())

    def processes(self) -> list[psutil.Process]:
        """The stack's own and all below it."""
        top = psutil.Process(self._running().pid)
        return [top, *top.children(recursive=True)]

    def parts(self) -> dict[str, int]:
        """The process of each part that runs just now: broker, claude, chat, ledger, quota."""
        named = {_part(process): int(process.pid) for process in self.processes()}
        return {name: pid for name, pid in named.items() if name}

    def pid(self, name: str) -> int:
        """The process of a part. Waits for one that is being started again."""
        deadline = time.monotonic() + RESTART_TIMEOUT_S
        while not (pid := self.parts().get(name)):
            if time.monotonic() > deadline:
                pytest.fail(f"{name} does not run", pytrace=False)
            time.sleep(0.05)
        return pid

    def kill(self, name: str) -> int:
        """SIGKILL; returns the pid that was, once it is gone."""
        process = psutil.Process(self.pid(name))
        process.kill()
        process.wait(RESTART_TIMEOUT_S)
        return int(process.pid)

    async def report(self, user_id: str, tokens: int) -> None:
        """Usage that a back end reports, through `POST /api/usage`."""
        body = {
            "userId": user_id,
            "actionType": "chat_generation",
            "tokensUsed": tokens,
            "metadata": {"inputTokens": tokens, "outputTokens": 0, "model": "claude-haiku-4-5"},
        }
        async with self._client() as client:
            (await client.post("/api/usage", json=body)).raise_for_status()

    async def usage(self, user_id: str) -> dict[str, Any]:
        async with self._client() as client:
            answer = (await client.get("/api/usage", params={"userId": user_id})).raise_for_status()
        usage: dict[str, Any] = answer.json()
        return usage

    async def usage_reaches(self, user_id: str, tokens_used: int, *, timeout_s: float = 10) -> dict[str, Any]:
        """The user's usage, once it shows `tokens_used`."""
        deadline = time.monotonic() + timeout_s
        while (usage := await self.usage(user_id))["tokensUsed"] != tokens_used:
            if time.monotonic() > deadline:
                pytest.fail(f"Usage is not {tokens_used} after {timeout_s} s, but {usage}", pytrace=False)
            await asyncio.sleep(0.05)
        return usage

    async def answers(self, url: str, *, timeout_s: float = RESTART_TIMEOUT_S) -> None:
        """Returns once `url` answers 200."""
        deadline = time.monotonic() + timeout_s
        async with self._client() as client:
            while not await _is_ok(client, url):
                if time.monotonic() > deadline:
                    pytest.fail(f"{url} does not answer after {timeout_s} s", pytrace=False)
                await asyncio.sleep(0.05)

    def _client(self) -> httpx2.AsyncClient:
        # Here and in all tests nothing speaks TLS; to load its certificates would take 25 ms of CPU a client.
        return httpx2.AsyncClient(base_url=self.url, trust_env=False, verify=False)

    def _running(self) -> subprocess.Popen[bytes] | Forked:
        assert self._process, "the stack was never started"
        return self._process


class ExecutedStack(Stack):
    """Started as users start it: every process of it by an exec."""

    def _launched(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        return self._executed(output)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; one whose end nobody has asked for yet has ended, too."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _part(process: psutil.Process) -> str | None:
    """The name that supervisor gave it."""
    try:
        name: str | None = process.environ().get(forked.NAMED) or forked.name_of(process.name())
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return None
    return name


async def _is_ok(client: httpx2.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One stack for all tests of a module; they keep apart by their users' ids, and leave it whole.

    It starts with a second of CPU. To wait for the next module it would need as much every quarter of a minute.
    """
    with Stack(tmp_path_factory.mktemp("stack") / "data") as running:
        yield running
