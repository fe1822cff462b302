"""Processes on cores of their own: started, watched, and stopped in the end."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import psutil

from tests.stack import PROJECT, environment

START_DEADLINE_S = 60


class Cores:
    """One for what is measured, alone; the others for everything else. A machine with one core has it for all."""

    def __init__(self) -> None:
        *others, self.measured = sorted(os.sched_getaffinity(0))
        self.others = others or [self.measured]
        os.sched_setaffinity(0, self.others)

    @property
    def is_one_for_all(self) -> bool:
        return self.measured in self.others

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What is started meanwhile runs on the measured core, with all its threads."""
        os.sched_setaffinity(0, [self.measured])
        try:
            yield
        finally:
            os.sched_setaffinity(0, self.others)


class Processes:
    """Leaving the context stops them, the last one first."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment(**variables)
        self._stops = ExitStack()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.close()

    def start(self, name: str, *command: str, ready: Callable[[], bool], **variables: str) -> psutil.Process:
        """Returns once `ready` says so; ends the bench with the end of the process's log when that is not to be."""
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = psutil.Popen(
                command,
                cwd=PROJECT,
                env={**self._environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the bench, which stops them in order
            )
        self._stops.callback(_stop, process)
        deadline = time.monotonic() + START_DEADLINE_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        return process

    def run(self, *command: str) -> None:
        """A step that ends by itself."""
        subprocess.run(command, cwd=PROJECT, env=self._environment, stdout=subprocess.DEVNULL, check=True)


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def _stop(process: psutil.Popen) -> None:
    process.terminate()
    process.wait()
