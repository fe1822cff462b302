"""Quota, put together: read from top to bottom."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import structlog
from nats.aio.client import Client
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette

from services.quota import store
from services.quota.handlers import Handlers
from services.quota.settings import Settings
from shared import streams
from shared.answering import missing, running
from shared.database import Database
from shared.plans import Plans
from shared.telemetry import probes

log = structlog.get_logger()

EXPIRY_REPORT_EVERY_S = 30


def create_app(settings: Settings) -> Starlette:
    plans = Plans.load(settings.plans)
    database = Database(settings.database_url)
    nc = Client()
    handlers = Handlers(nc, database, plans)

    async def report_expired_holds() -> None:
        while True:
            try:
                await handlers.report_expired_holds()
            except (SQLAlchemyError, OSError) as error:
                log.warning("expired_holds_not_reported", error=type(error).__name__)
            await asyncio.sleep(EXPIRY_REPORT_EVERY_S)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        bus = running(nc, settings.nats_url, streams.QUOTA, calls=handlers.calls, handle=handlers.on_usage)
        async with bus:
            reporting = asyncio.create_task(report_expired_holds())
            yield
            reporting.cancel()
        await database.close()

    return Starlette(routes=probes(partial(missing, nc, database, store.ping)), lifespan=lifespan)
