"""The bus of a data folder, for commands: the running stack's, else a broker started on its store for the occasion.

    async with bus_of_folder(settings, name="audit") as nc: ...

Where CHATRAIL_NATS_URL is set, it is that one.
"""

import asyncio
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import TextIO

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from shared.broker import close, connect
from shared.errors import Misconfigured
from shared.settings import ServiceSettings
from shared.streams import STREAM

CONNECT_S = 10.0
# A stack that was just started names its endpoints before anything else; one that stops withdraws them at its end.
ENDPOINTS_S = 5.0
# The supervisor gives each program 20 seconds to stop.
PREDECESSOR_S = 60.0
# It reads its whole store when it was not stopped in order.
BROKER_START_S = 60.0
LOOK_EVERY_S = 0.05
LOOPBACK = "127.0.0.1"
PR_SET_PDEATHSIG = 1


@asynccontextmanager
async def bus_of_folder(settings: ServiceSettings, *, name: str) -> AsyncIterator[Client]:
    """A client of the bus, which has the stream.

    While a broker runs for the occasion, no stack can start on the folder. Raises Misconfigured when there is no bus.
    """
    if "nats_url" in settings.model_fields_set:
        async with _client(settings.nats_url, name) as nc:
            yield nc
        return
    data = settings.data.absolute()
    if not any((data / left).exists() for left in ("nats", "nats-1", "endpoints.json")):
        raise Misconfigured(
            f"There is no stream in the data folder {data}. Start ChatRail there once (make run), name another "
            "folder (CHATRAIL_DATA=/another/folder), or the broker that has the stream (CHATRAIL_NATS_URL=nats://…)."
        )
    with _locked(data / "stack.lock") as ours:
        if ours is None:
            async with _client(await _endpoint(data), name) as nc:
                yield nc
        else:
            async with _broker_on(data, ours) as url, _client(url, name) as nc:
                yield nc


@asynccontextmanager
async def _client(url: str, name: str) -> AsyncIterator[Client]:
    where = url.rpartition("@")[2]
    try:
        async with asyncio.timeout(CONNECT_S):
            nc = await connect(url, name=name)
    except (NatsError, OSError) as error:
        reason = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        raise Misconfigured(f"The broker at {where} cannot be used: {reason}.") from error
    try:
        await nc.jetstream().stream_info(STREAM)
        yield nc
    except NotFoundError as error:
        raise Misconfigured(
            f"The broker at {where} has no stream {STREAM}. Start ChatRail there once, or try again in a moment "
            "where it is starting."
        ) from error
    finally:
        await close(nc)


async def _endpoint(data: Path) -> str:
    """Of the stack that runs."""
    deadline = monotonic() + ENDPOINTS_S
    while not (file := data / "endpoints.json").exists():
        if monotonic() > deadline:
            raise Misconfigured(
                f"The data folder {data} is in use, and no broker answers there: ChatRail starts or stops, or "
                "another command reads it. Try again in a moment."
            )
        await asyncio.sleep(LOOK_EVERY_S)
    url: str = json.loads(file.read_bytes())["nats"]
    return url


@asynccontextmanager
async def _broker_on(data: Path, ours: TextIO) -> AsyncIterator[str]:
    """The address of a broker on the store of a stack that does not run."""
    if (data / "nats-1").is_dir():
        raise Misconfigured(f"The stream in {data} is kept by three nodes: start them first, with make run-cluster.")
    with (data / "supervisord.lock").open("a+") as supervisors, tempfile.TemporaryDirectory("-chatrail") as folder:
        deadline = monotonic() + PREDECESSOR_S
        while not _try_lock(supervisors):
            if monotonic() > deadline:
                raise Misconfigured(f"What another ChatRail started still runs on the data folder {data}.")
            await asyncio.sleep(LOOK_EVERY_S)
        process = _start_broker(data / "nats", folder, locks=[ours.fileno(), supervisors.fileno()])
        try:
            yield await _address(process, Path(folder))
        finally:
            process.terminate()
            await asyncio.to_thread(process.wait)


def _start_broker(store: Path, folder: str, *, locks: list[int]) -> subprocess.Popen[bytes]:
    listen = ["--addr", LOOPBACK, "--port", "-1", "--ports_file_dir", folder]
    keep = ["--jetstream", "--store_dir", str(store), "--log", f"{folder}/log"]
    # Installed with this interpreter, as the stack's own.
    executable = shutil.which("nats-server", path=os.fspath(Path(sys.executable).parent)) or "nats-server"
    return subprocess.Popen(  # noqa: S603
        [executable, *listen, *keep],
        # Ctrl-C is for us, who stop it in order. It holds the locks as we do, and ends with us.
        start_new_session=True,
        pass_fds=locks,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, no lock
    )


async def _address(process: subprocess.Popen[bytes], folder: Path) -> str:
    ports, deadline = folder / f"nats-server_{process.pid}.ports", monotonic() + BROKER_START_S
    while not (ports.exists() and (told := ports.read_text())):
        if process.poll() is not None or monotonic() > deadline:
            log = folder / "log"
            end = log.read_text(errors="replace")[-1000:] if log.exists() else ""
            raise Misconfigured(f"The broker does not start on the store of the data folder: {end}")
        await asyncio.sleep(LOOK_EVERY_S)
    url: str = json.loads(told)["nats"][0]
    return url


def _end_with_parent() -> None:
    """Called in the broker's process before its exec: nobody else would stop it after a SIGKILL of ours."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _locked(path: Path) -> Iterator[TextIO | None]:
    """The lock that a running stack has; None when it is taken."""
    with path.open("a+") as file:
        if not _try_lock(file):
            yield None
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
