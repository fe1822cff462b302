"""Our programs, started within a moment: forked from a process that has imported them all, in place of an exec.

What runs is `python -m MODULE ARGUMENTS`, with an environment, a folder and files of its own, and it ends like any
process; only the seconds of CPU that importing takes are spent once, and not at each start. In the local stack the
supervisor and its programs are forked, too, each from the one that starts it, so that they end with it as ever.
tests/e2e/test_local_stack.py starts everything as users do.

    python -m tests.forked FD     the process that others are forked from, listening on the socket FD; tests start it
"""

import asyncio
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, NoReturn

PROJECT = Path(__file__).parent.parent
# Names the socket of the process to fork from.
SOCKET = "TESTS_FORKED_FROM"
PRELOADED = (
    "services.chat.__main__",
    "services.ledger.__main__",
    "services.quota.__main__",
    "shared.streams",
    "deploy.claude.__main__",
    "deploy.local",
    "supervisor.supervisord",
    "supervisor.rpcinterface",
    "tests.faults.failpoints",
    "tests.faults.machine.__main__",
    "tests.faults.machine.checker",
    "tests.faults.machine.mutants",
    # What tests.worker runs has these, too.
    "_hypothesis_pytestplugin",
    "anyio.pytest_plugin",
    "playwright.async_api",
    "pyarrow.parquet",
    "pytest_asyncio.plugin",
    "schemathesis",
    "testcontainers.compose",
    "xdist.plugin",
)
# What the supervisor calls its program; a forked one has this as the kernel's name for it, and no environment to see.
NAMED = "SUPERVISOR_PROCESS_NAME"
NAME_PREFIX = "part:"
NUMBER_BYTES = 4


class Forked:
    """A program that was started, with methods of subprocess.Popen."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = _number(self._connection)
            self._connection.close()
        return self.returncode

    async def ended(self) -> int:
        """As `wait`, while the event loop goes on."""
        if self.poll() is None:
            loop, is_over = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(self._connection, is_over.set)
            try:
                await is_over.wait()
            finally:
                loop.remove_reader(self._connection)
        return self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Request:
    module: str
    arguments: list[str]
    environment: dict[str, str]


def start(
    module: str, *arguments: str, env: Mapping[str, str], output: IO[bytes], errors: IO[bytes] | None = None
) -> Forked:
    """`python -m module arguments` in a session of its own. It reads nothing; without `errors` all is `output`."""
    with open(os.devnull, "rb") as nothing:
        files = (nothing.fileno(), output.fileno(), (errors or output).fileno())
        return start_with(files, module, *arguments, env=env)


def start_with(files: Sequence[int], module: str, *arguments: str, env: Mapping[str, str]) -> Forked:
    """As `start`, with these as its standard input, output and errors."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ.get(SOCKET) or _own_server())
    request = _Request(module, list(arguments), dict(env))
    socket.send_fds(connection, [b"\n"], files)
    connection.sendall(json.dumps(asdict(request)).encode() + b"\n")
    return Forked(_number(connection), connection)


class Ended(NamedTuple):
    status: int
    out: str
    err: str


async def run(
    module: str, *arguments: str, env: Mapping[str, str], apart: bool = False, timeout_s: float = 120
) -> Ended:
    """A program that ends by itself; `err` is empty unless it is kept `apart`."""
    with TemporaryFile() as output, TemporaryFile() as errors:
        process = start(module, *arguments, env=env, output=output, errors=errors if apart else None)
        try:
            async with asyncio.timeout(timeout_s):
                status = await process.ended()
        finally:
            process.terminate()  # when nobody waits for it any more
        return Ended(status, *(os.pread(file.fileno(), 100_000_000, 0).decode() for file in (output, errors)))


def _number(connection: socket.socket) -> int:
    """The pid, and in the end the status: both may have come already."""
    told = connection.recv(NUMBER_BYTES, socket.MSG_WAITALL)
    if len(told) < NUMBER_BYTES:
        raise ConnectionError("the process that programs are forked from has ended")
    return int.from_bytes(told, sys.byteorder, signed=True)


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # nobody wants to know any more
        connection.sendall(number.to_bytes(NUMBER_BYTES, sys.byteorder, signed=True))


# The process that others are forked from


@contextmanager
def server() -> Iterator[str]:
    """The path of its socket. It ends with the context, and with the process that has entered it."""
    with (
        TemporaryDirectory(prefix="chatrail-forked-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        path = f"{folder}/socket"
        listening.bind(path)
        listening.listen(100)
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("CHATRAIL_", "ANTHROPIC_"))}
        command = [sys.executable, "-m", "tests.forked", str(listening.fileno())]
        with subprocess.Popen(
            command,
            cwd=PROJECT,
            env=ours,
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        ):
            yield path  # leaving closes its standard input


_opened: list[Any] = []


def _own_server() -> str:
    """For a process that nobody has given one: until it ends."""
    opened = server()
    path = os.environ[SOCKET] = opened.__enter__()
    _opened.append(opened)
    atexit.register(opened.__exit__, None, None, None)
    return path


class _Server:
    """Gives each request to a new process, and tells the requester how that one has ended.

    What still runs when the tests are gone is told to stop.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._requesters: dict[int, socket.socket] = {}
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake.fileno())

    def next_request(self) -> _Request | None:
        """In the new process what it is to do; in this one None, once nobody is there any more to ask."""
        while True:
            ready = select.select([sys.stdin, self._listening, self._woken], [], [])[0]
            if self._woken in ready:
                self._woken.recv(1_000)
                self._tell_ends()
            if sys.stdin in ready:
                for pid in self._requesters:
                    os.kill(pid, signal.SIGTERM)
                return None
            if self._listening in ready:
                requester, _ = self._listening.accept()
                if request := self._forked(requester):
                    return request

    def _forked(self, requester: socket.socket) -> _Request | None:
        _, files, _, _ = socket.recv_fds(requester, 1, 3)
        told = b""
        while not told.endswith(b"\n"):
            chunk = requester.recv(65_536)
            if not chunk:  # it has ended before it had asked
                requester.close()
                return None
            told += chunk
        request = _Request(**json.loads(told))
        pid = os.fork()
        if not pid:
            self._leave([requester, *self._requesters.values()], files)
            return request
        for file in files:
            os.close(file)
        self._requesters[pid] = requester
        _tell(requester, pid)
        return None

    def _leave(self, requesters: Iterable[socket.socket], files: list[int]) -> None:
        """The new process keeps nothing of this one but what it has imported."""
        signal.set_wakeup_fd(-1)
        for each in (self._listening, self._woken, self._wake, *requesters):
            each.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.setsid()

    def _tell_ends(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                requester = self._requesters.pop(pid)
                _tell(requester, os.waitstatus_to_exitcode(status))
                requester.close()


def _serve(listening: socket.socket) -> None:
    gc.disable()
    for module in PRELOADED:
        importlib.import_module(module)
    # Or each process would soon copy all that it shares with the others.
    gc.collect()
    gc.freeze()
    gc.enable()
    request = _Server(listening).next_request()
    if request:
        _call_it(request.module)
        if request.module == "deploy.local":
            _fork_what_it_starts()
        _become_for_good(request.module, request.arguments, request.environment, PROJECT)


def _call_it(name: str) -> None:
    """What `ps` and `top` show of this process, as far as the kernel has room for it. Linux alone has this file."""
    with suppress(FileNotFoundError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")


def _become(module: str, arguments: Iterable[str], environment: Mapping[str, str], folder: Path) -> None:
    """As `python -m module`, in this process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        with suppress(OSError, ValueError):  # some belong to the C library
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


# The local stack: its supervisor is forked from deploy.local, and its programs from the supervisor


def name_of(process_name: str) -> str | None:
    """Which of the supervisor's programs is forked under this name."""
    return process_name.removeprefix(NAME_PREFIX) if process_name.startswith(NAME_PREFIX) else None


def _fork_what_it_starts() -> None:
    """In this process deploy.local starts its supervisor, and that one its programs, without an exec."""
    from supervisor.options import ServerOptions  # noqa: PLC0415

    from deploy import supervised  # noqa: PLC0415

    supervised.subprocess = SimpleNamespace(Popen=_Supervisord, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined, assignment]
    ServerOptions.execve = _execute


class _Supervisord:
    """What deploy.supervised uses of subprocess.Popen."""

    def __init__(
        self, command: list[Any], *, cwd: Path, env: Mapping[str, str], pass_fds: list[int], **_: Any
    ) -> None:
        self.returncode: int | None = None
        _python, _safe_path, script, *arguments = map(str, command)
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            _close_all_but({0, 1, 2, *pass_fds})
            signal.set_wakeup_fd(-1)
            _become_for_good(script, arguments, env, cwd)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def _execute(_options: Any, filename: str, argv: list[str], environment: dict[str, str]) -> None:
    """In place of supervisor's execve, in the process of a new program: what is no module of ours is executed."""
    _shell, _c, line = argv
    os.environ.clear()
    os.environ.update(environment)
    words = [os.path.expandvars(word) for word in shlex.split(line.removeprefix("exec "))]
    if words[0] == "env":
        del words[0]
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
    if words[0] != Path(sys.executable).name:
        os.execve(filename, argv, environment)  # noqa: S606
    _call_it(NAME_PREFIX + environment[NAMED])
    _python, _m, module, *arguments = words
    _become_for_good(module, arguments, environment, Path.cwd())


def _close_all_but(kept: set[int]) -> None:
    for file in [int(name) for name in os.listdir("/dev/fd")]:
        if file not in kept:
            with suppress(OSError):
                os.close(file)


def _become_for_good(module: str, arguments: list[str], environment: Mapping[str, str], folder: Path) -> NoReturn:
    """Nothing of what this process did before is gone back to; and in the end it is not taken apart, object by
    object, which takes twelve times as long as to start one."""
    gc.freeze()
    atexit._clear()  # what it would tidy up in the end is its own
    status = 1
    try:
        try:
            _become(module, arguments, environment, folder)
            status = 0
        except SystemExit as ending:
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)  # noqa: T201
            else:
                status = ending.code or 0
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
