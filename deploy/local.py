"""The whole of ChatRail on one machine: `make run`, or `python -m deploy.local`.

Broker, stand-in for Claude, migrations and services run under supervisor, which starts again what dies.
"""

import fcntl
import http.client
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from deploy.supervised import Program, Supervisor, SupervisorDied
from shared.errors import Misconfigured
from shared.plans import Plans

LOOPBACK = "127.0.0.1"
CLAUDE_URL = "https://api.anthropic.com"
TICK_S = 0.1
READY_TIMEOUT_S = 60
STARTS_MAX = 3
# A little longer than the services are given to stop before they are killed.
PREDECESSOR_TIMEOUT_S = 25


class Settings(BaseSettings):
    """What an operator sets; an empty variable counts as absent. Everything else is the services' own."""

    model_config = SettingsConfigDict(env_prefix="CHATRAIL_", env_ignore_empty=True, frozen=True)

    host: str = LOOPBACK
    port: int = Field(default=8000, ge=1, le=65535)
    data: Path = Path("data")
    plans: Path | None = None
    nats_url: str | None = None
    anthropic_api_key: str | None = Field(default=None, validation_alias="ANTHROPIC_API_KEY", repr=False)
    anthropic_base_url: str | None = Field(default=None, validation_alias="ANTHROPIC_BASE_URL")

    @classmethod
    def read(cls) -> "Settings":
        try:
            return cls()
        except ValidationError as error:
            problem = error.errors()[0]
            name = f"CHATRAIL_{problem['loc'][0]}".upper()
            raise Misconfigured(f"{name} is {problem['input']!r}: {problem['msg']}.") from error

    @property
    def simulated(self) -> bool:
        """A base URL that was named is used as it is, with a key or without."""
        return not (self.anthropic_api_key or self.anthropic_base_url)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds chat, also when it listens on every address."""
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where each part answers: the content of `endpoints.json`."""

    chat: str
    ledger: str
    quota: str
    nats: str
    claude: str

    def write(self, file: Path) -> None:
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        draft.replace(file)


class Stopped(Exception):
    """Somebody asked us to stop."""


class StartFailed(Exception):
    """A part cannot be brought up; the message names it and shows the end of its log."""


class Patience:
    """Waiting that ends with Stopped once Ctrl-C, SIGTERM or a closed terminal has asked for it, however often."""

    def __init__(self) -> None:
        self._stopped = False
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGTERM, self._stop)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.SIGHUP, self._stop)

    def _stop(self, _signal: int, _frame: object) -> None:
        self._stopped = True

    def wait(self) -> None:
        time.sleep(TICK_S)
        if self._stopped:
            raise Stopped


def main() -> int:
    patience = Patience()
    try:
        run(Settings.read(), patience)
    except Stopped:
        return 0
    except (Misconfigured, StartFailed, SupervisorDied) as problem:
        sys.stderr.write(f"{problem}\n")
        return 1


def run(settings: Settings, patience: Patience) -> None:
    """Raises Stopped in the end, or what keeps it from running."""
    data = settings.data.absolute()
    with locked(data, patience) as lock_fd:
        if settings.plans:
            Plans.load(settings.plans)
        ports = free_ports(settings, "ledger", "quota", "nats", "nats_monitor", "claude")
        endpoints = locate(settings, ports)
        phases = plan(settings, endpoints, ports)
        programs = [program for phase in phases for program in phase]
        environment = environment_of(settings, endpoints, data)
        with Supervisor(programs, data=data, environment=environment, lock_fd=lock_fd) as supervisor:
            endpoints.write(data / "endpoints.json")
            while not supervisor.is_up():
                patience.wait()
            for phase in phases:
                bring_up(phase, supervisor, patience)
            say(f"ChatRail is ready at {settings.url}")
            while True:
                supervisor.tend()
                patience.wait()
