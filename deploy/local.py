"""The whole of ChatRail on one machine: `make run` and `make run-cluster`, or `python -m deploy.local`.

Broker, stand-in for Claude, migrations and services run under supervisor, which starts again what dies.
"""

import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from deploy import brokers
from deploy.claims import Ports, free_ports, locked
from deploy.settings import LOOPBACK, Settings
from deploy.supervised import Program, Supervisor, SupervisorDied, health
from services.chat.settings import Settings as ChatSettings
from services.ledger.checkpoint import signing_keys
from services.ledger.settings import Settings as LedgerSettings
from services.quota.settings import Settings as QuotaSettings
from shared.errors import Misconfigured
from shared.plans import Plans
from shared.settings import StreamSettings

CLAUDE_URL = "https://api.anthropic.com"

TICK_S = 0.1
TEND_EVERY_S = 0.5
REVIVE_EVERY_S = 3
READY_TIMEOUT_S = 60
STARTS_MAX = 3
# Creates what the bus lacks, and is safe to repeat.
BUS_STEP = "streams"


class Endpoints(NamedTuple):
    """Where each part answers: the content of `endpoints.json`."""

    chat: str
    ledger: str
    quota: str
    nats: str
    claude: str


class Stopped(Exception):
    """Ctrl-C, SIGTERM, or the terminal was closed."""


class StartFailed(Exception):
    """A part does not come up; the message names it and shows the end of its log."""


class Patience:
    """Waiting that ends with Stopped as soon as somebody asks us to stop. A stop asked for twice is one stop."""

    def __init__(self) -> None:
        self._asked, self._ask = socket.socketpair()
        self._ask.setblocking(False)
        signal.set_wakeup_fd(self._ask.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda _number, _frame: None)

    def wait(self, seconds: float) -> None:
        if select.select([self._asked], [], [], seconds)[0]:
            say("Stopping ChatRail")
            raise Stopped


def say(line: str) -> None:
    with suppress(BrokenPipeError):  # whoever read along has left; that must not keep us from stopping in order
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def main() -> None:
    """Exits with 0 when it was asked to stop, and else with 1 and words."""
    try:
        run(Settings.read(), Patience())
    except Stopped:
        return
    except (Misconfigured, StartFailed, SupervisorDied) as problem:
        sys.exit(str(problem))


def run(settings: Settings, patience: Patience) -> NoReturn:
    """Raises Stopped in the end, or what keeps ChatRail from running."""
    data = settings.data.absolute()
    with locked(data, patience.wait) as lock_fd:
        check_services()
        ports = free_ports(settings.host, settings.port, nodes=settings.nodes)
        endpoints = locate(settings, ports)
        nodes = brokers.programs(ports.nodes, data)
        phases = plan(settings, ports, nodes)
        with (
            published(endpoints, data / "endpoints.json"),
            Supervisor(
                [program for phase in phases for program in phase],
                data=data,
                environment=environment(settings, endpoints, data) | brokers.environment(ports.nodes),
                lock_fd=lock_fd,
            ) as supervisor,
        ):
            while not supervisor.is_up():
                patience.wait(TICK_S)
            for phase in phases:
                bring_up(phase, supervisor, patience)
            say(f"ChatRail is ready at {settings.url}")
            tend(supervisor, nodes, [program.name for program in phases[-1]], data, patience)


def check_services() -> None:
    """Raises Misconfigured where a part would not start. Told by itself it would be known only once others run."""
    Plans.load(ChatSettings.read().plans)
    ledger = LedgerSettings.read()
    signing_keys(ledger.seal_key_file)
    if ledger.seals_file:
        check_writable(ledger.seals_file)
    QuotaSettings.read()
    StreamSettings.read()


def check_writable(seals_file: Path) -> None:
    """Raises Misconfigured. The file is there afterwards, as it is once the ledger has begun."""
    try:
        with seals_file.open("ab"):
            pass
    except OSError as error:
        raise Misconfigured(f"CHATRAIL_SEALS_FILE {seals_file} cannot be written: {error.strerror}.") from error


def tend(
    supervisor: Supervisor, nodes: list[Program], services: list[str], data: Path, patience: Patience
) -> NoReturn:
    """Keep what runs running. A service that begins anew may have ended because the bus lacks something."""
    known, look_again_at = supervisor.tend(), 0.0
    while True:
        patience.wait(TEND_EVERY_S)
        if time.monotonic() >= look_again_at:
            revive_brokers(supervisor, nodes, data)
            look_again_at = time.monotonic() + REVIVE_EVERY_S
        started = supervisor.tend()
        if any(started[name] != known[name] for name in services):
            supervisor.start(BUS_STEP)
        known = started


def revive_brokers(supervisor: Supervisor, nodes: list[Program], data: Path) -> None:
    """Start those again whose disk was full, once there is room."""
    for node in nodes:
        if brokers.is_frozen(node) and brokers.has_room(data):
            say(f"Starting {node.name} again: its disk was full")
            supervisor.restart(node.name)


def locate(settings: Settings, ports: Ports) -> Endpoints:
    nats_url = settings.nats_url or ",".join(f"nats://{LOOPBACK}:{node.clients}" for node in ports.nodes)
    claude_url = f"http://{LOOPBACK}:{ports.claude}" if settings.simulated else settings.anthropic_base_url
    return Endpoints(
        chat=settings.url,
        ledger=f"http://{LOOPBACK}:{ports.ledger}",
        quota=f"http://{LOOPBACK}:{ports.quota}",
        nats=nats_url,
        claude=claude_url or CLAUDE_URL,
    )


@contextmanager
def published(endpoints: Endpoints, file: Path) -> Iterator[None]:
    """`file` names the endpoints while they answer; passwords in them stay out of it."""
    public = {name: re.sub(r"//[^/@,]*@", "//", url) for name, url in endpoints._asdict().items()}
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")
    draft.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def environment(settings: Settings, endpoints: Endpoints, data: Path) -> dict[str, str]:
    """Ours, secrets included, which are never written down; the services listen and connect as told here."""
    ours = {
        name: value for name, value in os.environ.items() if value or not name.startswith(("CHATRAIL_", "ANTHROPIC_"))
    }
    ours |= {
        "CHATRAIL_HOST": settings.host,
        "CHATRAIL_PORT": str(settings.port),
        "CHATRAIL_DATA": str(data),
        "CHATRAIL_NATS_URL": endpoints.nats,
    }
    for name, path in (("CHATRAIL_PLANS", settings.plans), ("CHATRAIL_ARCHIVE", settings.archive)):
        if path:
            ours[name] = str(path.absolute())
    if settings.simulated:
        # A proxy of the machine's owner has no way back to this machine's loopback.
        ours |= {
            "CHATRAIL_STAND_IN_URL": endpoints.claude,
            "NO_PROXY": LOOPBACK,
            "no_proxy": LOOPBACK,
        }
    return ours


def plan(settings: Settings, ports: Ports, nodes: list[Program]) -> list[list[Program]]:
    """What is started together, phase by phase; each needs the phases before it. Stopped from the end."""
    python = Path(sys.executable).name
    pace = f"--delay-ms {settings.stand_in_delay_ms}"
    claude = Program(
        "claude",
        f'{python} -m deploy.claude --port {ports.claude} {pace} --data "$CHATRAIL_DATA/claude"',
        f"http://{LOOPBACK}:{ports.claude}/healthz",
    )
    migrations = [Program(f"migrate-{name}", f"{python} -m services.{name} migrate") for name in ("ledger", "quota")]
    return [
        [*nodes, *([claude] if settings.simulated else []), *migrations],
        [Program(BUS_STEP, f"{python} -m shared.streams")],
        [
            _inner_service("quota", ports.quota, python),
            _inner_service("ledger", ports.ledger, python),
            Program("chat", f"{python} -m services.chat serve", f"{settings.url}/readyz"),
        ],
    ]


def _inner_service(name: str, port: int, python: str) -> Program:
    listen = f"CHATRAIL_HOST={LOOPBACK} CHATRAIL_PORT={port}"
    return Program(name, f"env {listen} {python} -m services.{name} serve", f"http://{LOOPBACK}:{port}/readyz")


def bring_up(phase: list[Program], supervisor: Supervisor, patience: Patience) -> None:
    say(f"Starting {', '.join(program.name for program in phase)}")
    for program in phase:
        supervisor.start(program.name)
    for program in phase:
        _await_up(program, supervisor, patience)


def _await_up(program: Program, supervisor: Supervisor, patience: Patience) -> None:
    """Raises StartFailed when the program is not up, or its work not done, in time."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    starts = set()
    while not _is_up(program, supervisor):
        starts.add(supervisor.info(program.name)["start"])
        if len(starts) > STARTS_MAX:
            raise _failure(program, "ends again and again", supervisor)
        if time.monotonic() > deadline:
            raise _failure(program, f"is not up after {READY_TIMEOUT_S} seconds", supervisor)
        supervisor.tend()
        patience.wait(TICK_S)


def _is_up(program: Program, supervisor: Supervisor) -> bool:
    if program.ready_url:
        return health(program.ready_url)[0] == 200
    info = supervisor.info(program.name)
    if info["statename"] == "EXITED" and info["exitstatus"] != 0:
        raise _failure(program, "failed", supervisor)
    return bool(info["statename"] == "EXITED")


def _failure(program: Program, what: str, supervisor: Supervisor) -> StartFailed:
    return StartFailed(f"ChatRail cannot start: {program.name} {what}. {supervisor.log_end(program.name)}")


if __name__ == "__main__":
    main()
