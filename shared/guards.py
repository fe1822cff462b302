"""What a process notices about itself: what it needs is away or has changed, or its event loop does not turn."""

import asyncio
import faulthandler
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
from nats.aio.client import Client
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError

from shared.broker import end_process
from shared.errors import Misconfigured
from shared.streams import STREAM, Origin, check
from shared.telemetry import PART_TIMEOUT_S, Missing, look

log = structlog.get_logger()

READINESS_EVERY_S = 3.0
BUS_EVERY_S = 3.0
BUS_TIMEOUT_S = 1.0
SECOND_LOOK_AFTER_S = 2.0
BEAT_EVERY_S = 1.0
# Nothing that we do keeps the loop for a second; what keeps it for ten does not come back.
BEATS_MISSED_MAX = 10


@asynccontextmanager
async def beating() -> AsyncIterator[None]:
    """While this lasts, a process whose event loop is stuck ends, with its stacks in the log."""
    heart = _Heart()
    heart.start()
    try:
        yield
    finally:
        heart.stop()


@asynccontextmanager
async def readiness_logged(missing: Callable[[], Awaitable[Missing]]) -> AsyncIterator[None]:
    """While this lasts, the log says when the service becomes ready or stops being so: a line for each change."""
    watching = essential(asyncio.create_task(_log_readiness(missing), name="the guard of readiness"))
    try:
        yield
    finally:
        watching.cancel()


async def _log_readiness(missing: Callable[[], Awaitable[Missing]]) -> None:
    known: Missing | None = None
    while True:
        absent = await look(missing)
        if absent != known:
            if absent:
                log.warning("not_ready", missing=absent)
            else:
                log.info("ready")
        known = absent
        await asyncio.sleep(READINESS_EVERY_S)


def essential(task: asyncio.Task[None]) -> asyncio.Task[None]:
    """One that the process cannot do without: when it fails, the process ends. By itself nobody would notice."""
    task.add_done_callback(_essential_ended)
    return task


def _essential_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        end_process(f"{task.get_name()} failed: {error!r}")


async def watch_bus(nc: Client, durable: str | None = None, known: Origin | None = None) -> None:
    """Ends the process once its connection is closed for good, or the bus is not what this release needs any more.

    Nothing else tells: a pull of a durable that was deleted is never answered, and what was made anew under the same
    name delivers something else, with sequences of its own.
    """
    while True:
        try:
            known = await agree_on_bus(nc, durable, known)
        except Misconfigured as problem:
            return end_process(str(problem))
        except ConnectionClosedError:
            return end_process("the connection to the broker is closed for good")
        await asyncio.sleep(BUS_EVERY_S)


async def agree_on_bus(nc: Client, durable: str | None = None, known: Origin | None = None) -> Origin:
    """Returns once the bus was seen to be what this release needs; waits while the broker does not answer.

    Raises Misconfigured when it is something else, or not the one that was `known`, and still is so at a second look:
    in a cluster, a node that has only just started may not know of everything yet.
    """
    is_doubted, is_told = False, False
    while True:
        try:
            origin = await check(nc.jetstream(timeout=BUS_TIMEOUT_S), durable)
            if known and origin != known:
                raise Misconfigured(f"The stream {STREAM} or its consumer was deleted and made anew meanwhile.")
            return origin
        except Misconfigured:
            if is_doubted:
                raise
            is_doubted = True
        except ConnectionClosedError:
            raise
        except (NatsError, OSError) as error:
            if not is_told:
                log.warning("bus_not_seen", error=repr(error))
            is_told = True
        await asyncio.sleep(SECOND_LOOK_AFTER_S)


async def bus_missing(nc: Client, durable: str | None = None) -> str | None:
    """Why the bus cannot be used, if so.

    Asked of JetStream: nats-py's flush would not do. One that is given up ends the client's reading when its answer
    comes late, and from then on every flush returns at once, as if all were well. So it does while reconnecting.
    """
    try:
        async with asyncio.timeout(PART_TIMEOUT_S):
            await check(nc.jetstream(timeout=PART_TIMEOUT_S), durable)
    except Misconfigured as problem:
        return str(problem)
    except (NatsError, OSError):
        return "the broker does not answer"
    return None


class _Heart:
    """Beats in the event loop, and is listened to in a thread. A loop that is stuck cannot say so itself."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._beats = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="heart", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._timer.cancel()

    def _beat(self) -> None:
        self._beats += 1
        self._timer = self._loop.call_later(BEAT_EVERY_S, self._beat)

    def _listen(self) -> None:
        heard, missed = 0, 0
        # Counted, not timed: a process that was stopped and continues has missed nothing.
        while not self._stopped.wait(BEAT_EVERY_S):
            missed = 0 if self._beats != heard else missed + 1
            heard = self._beats
            if missed >= BEATS_MISSED_MAX:
                log.critical("event_loop_blocked", seconds=missed * BEAT_EVERY_S)
                faulthandler.dump_traceback(file=sys.stderr)
                sys.stdout.flush()
                os._exit(1)  # nothing less ends a process whose main thread does not listen
