"""What a process notices about itself: that what it needs is away, and that its event loop does not turn."""

import asyncio
import faulthandler
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from shared.telemetry import Missing

log = structlog.get_logger()

READINESS_EVERY_S = 5.0
READINESS_TIMEOUT_S = 5.0
BEAT_EVERY_S = 1.0
# Nothing that we do keeps the loop for a second; what keeps it for ten does not come back.
BEATS_MISSED_MAX = 10


@asynccontextmanager
async def guarded(missing: Callable[[], Awaitable[Missing]]) -> AsyncIterator[None]:
    """While this lasts, the log says when the service becomes ready or stops being so, and a stuck process ends."""
    heart = _Heart()
    heart.start()
    watching = asyncio.create_task(_watch_readiness(missing))
    try:
        yield
    finally:
        watching.cancel()
        heart.stop()


async def _watch_readiness(missing: Callable[[], Awaitable[Missing]]) -> None:
    """A line for each change, not for each look."""
    known: Missing | None = None
    while True:
        absent = await _look(missing)
        if absent != known:
            if absent:
                log.warning("not_ready", missing=absent)
            else:
                log.info("ready")
        known = absent
        await asyncio.sleep(READINESS_EVERY_S)


async def _look(missing: Callable[[], Awaitable[Missing]]) -> Missing:
    try:
        async with asyncio.timeout(READINESS_TIMEOUT_S):
            return await missing()
    except TimeoutError:
        return {"readiness": f"cannot be told within {READINESS_TIMEOUT_S:.0f} s"}


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
