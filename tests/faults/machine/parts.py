"""The processes of a run: each is started again when it ends, as a supervisor would, and every start is logged."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests import forked
from tests.faults.machine.log import OperationLog
from tests.forked import Forked
from tests.stack import PROJECT, environment

RESTART_AFTER_S = 0.5
STOP_WITHIN_S = 30.0


class Part:
    """A process that lasts, for as long as it is wanted. `user` is whom it runs as, when not as ourselves."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        folder: Path,
        log: OperationLog,
        user: str | None = None,
        **variables: str,
    ) -> None:
        self.name = name
        self._command, self._user = command, user
        self._output = folder / f"{name}.log"
        self._environment = environment(**variables)
        self._log = log
        self._is_wanted = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._has_ended.set()
        self._process: asyncio.subprocess.Process | Forked | None = None
        self._supervising: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._is_wanted.set()
        if self._supervising is None:
            self._supervising = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL when that is not enough; it stays away until it is started."""
        self._is_wanted.clear()
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await self._has_ended.wait()
        except TimeoutError:
            self._log.write("would not stop", part=self.name)
            self.signal(signal.SIGKILL)
            await self._has_ended.wait()

    async def close(self) -> None:
        self._is_wanted.clear()
        if self._supervising:
            self._supervising.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervising
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        if self._process:
            await _ended(self._process)

    def signal(self, number: signal.Signals) -> None:
        """To the process, when there is one."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _supervise(self) -> None:
        while True:
            await self._is_wanted.wait()
            self._has_ended.clear()
            self._process = await self._launched()
            self._log.write("started", part=self.name, pid=self._process.pid)
            status = await _ended(self._process)
            self._log.write("ended", part=self.name, pid=self._process.pid, status=status)
            self._has_ended.set()
            await asyncio.sleep(RESTART_AFTER_S)

    async def _launched(self) -> asyncio.subprocess.Process | Forked:
        """One of our modules is forked, anything else executed."""
        with self._output.open("ab") as output:
            if self._command[:2] == python():
                return forked.start(*self._command[2:], env=self._environment, output=output)
            return await asyncio.create_subprocess_exec(
                *self._command,
                cwd=PROJECT,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=self._user,
                start_new_session=True,
            )


async def _ended(process: asyncio.subprocess.Process | Forked) -> int:
    return await (process.ended() if isinstance(process, Forked) else process.wait())


class StepFailed(Exception):
    """With what it said."""


async def step(*command: str, **variables: str) -> None:
    """A module of ours that ends by itself. Raises StepFailed when it does so with an error."""
    ended = await forked.run(*command[2:], env=environment(**variables))
    if ended.status:
        raise StepFailed(f"{' '.join(command)} failed: {ended.out[-2000:]}")


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def is_root() -> bool:
    return os.geteuid() == 0
