"""Programs under a supervisord of our own: started again when they die, stopped in reverse order."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

PROJECT = Path(__file__).parent.parent
LOG_LINES_SHOWN = 15
HEALTH_TIMEOUT_S = 2

# No path is written into it: supervisord runs in the data folder, and programs find theirs in the environment.
# So one with spaces, quotes, % or # needs no escaping, for which this format has no means.
SUPERVISORD = """\
[supervisord]
nodaemon=true
silent=true
nocleanup=true
pidfile=supervisord.pid
logfile=logs/supervisord.log
logfile_maxbytes=10MB
logfile_backups=3

[unix_http_server]
file={socket}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""

# Without retries of supervisor's own, which pause longer and longer and then end: `tend` goes on for ever.
PROGRAM = """
[program:{name}]
command={command}
directory=%(ENV_CHATRAIL_PROJECT)s
priority={priority}
autostart=false
autorestart={lasting}
startsecs={lasting:d}
startretries=0
stopwaitsecs=20
killasgroup=true
redirect_stderr=true
stdout_logfile=logs/{name}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=3
"""


@dataclass(frozen=True, slots=True)
class Program:
    """A shell command in the project's folder. It lasts, and answers at `ready_url`; without one it is a step."""

    name: str
    command: str
    ready_url: str | None = None

    def section(self, priority: int) -> str:
        command = shlex.join(["/bin/sh", "-c", f"exec {self.command}"])
        lasting = self.ready_url is not None
        # supervisor takes a second for each priority it stops, even for a step that was over long ago.
        return PROGRAM.format(name=self.name, command=command, lasting=lasting, priority=priority if lasting else 0)


class SupervisorDied(Exception):
    """Nothing is started again any more; what ran has ended with it."""


class Supervisor:
    """Leaving the context stops all programs, the last one first, and returns when every process is gone."""

    def __init__(
        self, programs: Sequence[Program], *, data: Path, environment: Mapping[str, str], lock_fd: int
    ) -> None:
        self._programs = programs
        self._data = data
        # Programs are found by name, first among those that were installed with this interpreter.
        path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        self._environment = {**environment, "PATH": path, "CHATRAIL_PROJECT": str(PROJECT)}
        self._lock_fd = lock_fd

    def __enter__(self) -> "Supervisor":
        # Not in the data folder: a socket's path has at most a hundred bytes or so.
        self._folder = tempfile.TemporaryDirectory(prefix="chatrail-", dir="/tmp")
        socket = f"{self._folder.name}/socket"
        sections = [program.section(priority) for priority, program in enumerate(self._programs, start=1)]
        logs = {program.name: self._log(program.name) for program in self._programs}
        self._logged = {name: log.stat().st_size for name, log in logs.items() if log.exists()}
        (self._data / "supervisord.conf").write_text(SUPERVISORD.format(socket=socket) + "".join(sections))
        self._process = subprocess.Popen(
            [sys.executable, "-P", PROJECT / "deploy" / "supervisord.py", "-c", "supervisord.conf"],
            cwd=self._data,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            # Ctrl-C is for the stack alone; and the data folder stays locked until the last program is gone.
            start_new_session=True,
            pass_fds=[self._lock_fd],
        )
        self._proxy: Any = ServerProxy("http://socket", SupervisorTransport(serverurl=f"unix://{socket}"))
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        while self._process.poll() is None:
            # Any call wakes it. By itself it looks but once a second whether it can go on to stop the next.
            with suppress(Fault, SupervisorDied):
                self._call("getState")
            time.sleep(0.05)
        self._proxy("close")()
        self._folder.cleanup()

    def is_up(self) -> bool:
        """Raises SupervisorDied when it never will be."""
        self._check_alive()
        try:
            self._proxy.supervisor.getState()
        except OSError:
            self._proxy("close")()
            return False
        return True

    def start(self, name: str) -> None:
        with suppress(Fault):  # what cannot be started now, `tend` tries again
            self._call("startProcess", name, False)

    def info(self, name: str) -> dict[str, Any]:
        """supervisor's own: `statename`, `start` (seconds since the epoch), `exitstatus` and more."""
        info: dict[str, Any] = self._call("getProcessInfo", name)
        return info

    def tend(self) -> dict[str, int]:
        """Start again what died young, once a second at most. To be called all the time.

        Gives when each program was last started, in seconds since the epoch.
        """
        programs = self._call("getAllProcessInfo")
        for info in programs:
            if info["statename"] == "FATAL" and info["now"] > info["start"]:
                self.start(info["name"])
        return {info["name"]: info["start"] for info in programs}

    def restart(self, name: str) -> None:
        """Told to end, it is started again like anything that ends by itself."""
        with suppress(Fault):  # it has ended already
            self._call("signalProcess", name, "TERM")

    def log_end(self, name: str) -> str:
        """The last lines of the program's log, of those since we started, under its path."""
        log = self._log(name)
        content = log.read_bytes() if log.exists() else b""
        before = self._logged.get(name, 0)
        since = content[before:] if before < len(content) else content  # a new log was begun
        lines = since.decode(errors="replace").splitlines()
        return "\n  ".join([f"{log} ends with", *lines[-LOG_LINES_SHOWN:]])

    def _log(self, name: str) -> Path:
        return self._data / "logs" / f"{name}.log"

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._proxy.supervisor, method)(*arguments)
        except (OSError, HTTPException) as error:
            self._check_alive()
            raise SupervisorDied(f"The supervisor does not answer: {error}") from error

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise SupervisorDied(f"The supervisor ended with status {self._process.returncode}.")


def health(url: str) -> tuple[int, str]:
    """The status and the body that a program answers with; (0, "") when it does not."""
    address = urlsplit(url)
    with closing(HTTPConnection(address.hostname or "", address.port, timeout=HEALTH_TIMEOUT_S)) as connection:
        try:
            connection.request("GET", address.path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, HTTPException):
            return 0, ""
