"""What a stack has for itself, or does not start: a data folder and ports."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from deploy.settings import LOOPBACK
from shared.errors import Misconfigured

# The supervisor gives each program 20 seconds to stop.
PREDECESSOR_TIMEOUT_S = 60


class NodePorts(NamedTuple):
    """Of one node of the broker."""

    clients: int
    monitoring: int
    routes: int


class Ports(NamedTuple):
    ledger: int
    quota: int
    claude: int
    nodes: tuple[NodePorts, ...]


@contextmanager
def locked(data: Path, wait: Callable[[float], None]) -> Iterator[int]:
    """The data folder, made if need be, for us alone. Raises Misconfigured when it cannot be had.

    Gives a lock for the supervisor to hold as well: while it stops what a killed stack left behind, we wait.
    """
    advice = "choose another: CHATRAIL_DATA=/another/folder make run"
    try:
        (data / "logs").mkdir(parents=True, exist_ok=True)
        ours, supervisors = (data / "stack.lock").open("a+"), (data / "supervisord.lock").open("a+")
    except OSError as error:
        raise Misconfigured(f"The data folder {data} cannot be written ({error.strerror}); {advice}") from error
    with ours, supervisors:
        if not _try_lock(ours):
            ours.seek(0)
            raise Misconfigured(
                f"ChatRail is already running on the data folder {data} (process {ours.read()}). Stop it, or {advice}"
            )
        ours.truncate(0)
        ours.write(str(os.getpid()))
        ours.flush()
        deadline = time.monotonic() + PREDECESSOR_TIMEOUT_S
        while not _try_lock(supervisors):
            if time.monotonic() > deadline:
                raise Misconfigured(f"What another ChatRail started still runs on the data folder {data}; {advice}")
            wait(0.1)
        yield supervisors.fileno()


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free_ports(host: str, port: int, *, nodes: int) -> Ports:
    """Ports of loopback that nobody uses. Raises Misconfigured when chat cannot have its own."""
    with ExitStack() as open_sockets:
        # All stay open until the last is chosen, so that no two are the same.
        open_sockets.enter_context(_listen_as_chat(host, port))

        def free() -> int:
            found: int = open_sockets.enter_context(socket.create_server((LOOPBACK, 0))).getsockname()[1]
            return found

        return Ports(free(), free(), free(), tuple(NodePorts(free(), free(), free()) for _ in range(nodes)))


def _listen_as_chat(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Misconfigured(
                f"Port {port} on {host} is taken by another program. "
                f"Choose another: CHATRAIL_PORT={port % 65535 + 1} make run"
            ) from error
        reason = str(error.strerror).partition(" (while")[0]
        raise Misconfigured(f"ChatRail cannot listen on {host}, port {port}: {reason}.") from error
