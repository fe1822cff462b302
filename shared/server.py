"""The HTTP server that every service shares."""

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import uvicorn

from shared.errors import Misconfigured
from shared.guards import beating, readiness_logged
from shared.protocol import Protocol
from shared.settings import ServiceSettings
from shared.telemetry import configure_logging
from shared.terminal import printable

Settings = TypeVar("Settings", bound=ServiceSettings)


class _Server(uvicorn.Server):
    """Tells the application that it is stopping before it waits for open streams. Told twice, it does not wait."""

    _starting: asyncio.Task[Any] | None = None

    async def _serve(self, sockets: Any = None) -> None:
        # The lifespan is entered here: uvicorn would turn what keeps it from starting into a traceback.
        app: Any = self.config.app
        self._loop, app.state.hurry = asyncio.get_running_loop(), asyncio.Event()
        self._starting = asyncio.current_task()
        async with beating(), app.router.lifespan_context(app), readiness_logged(app.state.missing):
            self._starting = None
            await super()._serve(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._starting:  # perhaps it waits for a broker that is away, for as long as that takes
            self._loop.call_soon_threadsafe(self._starting.cancel)
        if self.should_exit:
            self.force_exit = True
            app: Any = self.config.app
            self._loop.call_soon_threadsafe(app.state.hurry.set)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        state = getattr(self.config.app, "state", None)
        if end_streams := getattr(state, "end_streams", None):
            end_streams()
        await super().shutdown(sockets)


def serve(service: str, read: Callable[[], Settings], create_app: Callable[[Settings], Any]) -> None:
    """Run the service until it is told to stop. What is misconfigured ends it at once, with one clear sentence."""
    configure_logging(service)
    with one_sentence():
        settings = read()
        config = uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            loop="uvloop" if sys.platform != "win32" else "asyncio",
            http=Protocol,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            # Longer than clients keep an idle connection: whoever closes first must not be the one that is asked.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=15,
        )
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            # What is loaded stays for good: collecting it again and again only costs time.
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 50)
            _Server(config).run()


def without_standard_output() -> None:
    """Once it has failed: else Python fails once more when it ends, in words of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def one_sentence() -> Iterator[None]:
    """What an operator can put right ends the process at once, with what to do about it."""
    try:
        yield
    except Misconfigured as problem:
        # What a database says of an error has several lines.
        sys.exit("\n".join(map(printable, str(problem).split("\n"))))
