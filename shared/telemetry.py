"""Logs as JSON lines on standard output, and the three routes an operator asks: alive, ready, metrics."""

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

# What is missing, by part: {} when everything that the service needs can be reached.
Missing = dict[str, str]
# An orchestrator's probe does not wait for long, and what takes longer is not there for callers either.
LOOK_TIMEOUT_S = 1.8
# For each of the parts, which are asked at the same time.
PART_TIMEOUT_S = 1.5


class _Output:
    """Standard output as far as it goes: a disk that is full takes no line, and must not take the service along."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stdout.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()


def configure_logging_of_a_command(level: int = logging.ERROR) -> None:
    """Standard output is the report's; what must be told besides goes to standard error."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def configure_logging(service: str) -> None:
    """JSON lines for our own events and for what libraries log from WARNING up."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer(serializer=json.dumps)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _Output())),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer(), foreign_pre_chain=shared)
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


async def look(missing: Callable[[], Awaitable[Missing]]) -> Missing:
    """What is missing, in time, also where what is asked hangs."""
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            return await missing()
    except TimeoutError:
        return {"readiness": f"cannot be told within {LOOK_TIMEOUT_S:.1f} s"}


def install_probes(app: Starlette, missing: Callable[[], Awaitable[Missing]]) -> None:
    """`/healthz`: the process answers. `/readyz`: so does all it needs. `/metrics`: Prometheus text.

    `app.state.missing` is what the server watches while it runs.
    """

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        absent = await look(missing)
        if absent:
            return JSONResponse({"status": "not ready", "missing": absent}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    app.state.missing = missing
    app.router.routes += [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
