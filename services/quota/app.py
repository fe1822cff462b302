"""Quota, put together: read from top to bottom."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import structlog
from nats.errors import Error as NatsError
from nats.js.errors import APIError
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette

from services.quota import store
from services.quota.handlers import Handlers
from services.quota.settings import Settings
from shared import streams
from shared.answering import missing, running
from shared.broker import Connection, cancelled
from shared.database import Database
from shared.plans import Plans
from shared.telemetry import install_probes

log = structlog.get_logger()

# Holds that nobody settled, and alerts that a process took along when it died.
LOOK_AFTER_EVERY_S = 30


def create_app(settings: Settings) -> Starlette:
    plans = Plans.load(settings.plans)
    database = Database(settings.database_url)
    nc = Connection()
    handlers = Handlers(nc, database, plans)

    async def look_after() -> None:
        while True:
            try:
                await handlers.report_expired_holds()
                await handlers.publish_alerts()
            except (SQLAlchemyError, NatsError, APIError, OSError) as error:
                log.warning("not_looked_after", error=repr(error))
            await asyncio.sleep(LOOK_AFTER_EVERY_S)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with running(
            nc,
            settings.nats_url,
            streams.QUOTA,
            database,
            calls=handlers.calls,
            handle=handlers.on_usage,
            archive=settings.archive_folder,
        ):
            looking_after = asyncio.create_task(look_after())
            try:
                yield
            finally:
                await cancelled(looking_after)
        await database.close()

    app = Starlette(lifespan=lifespan)
    install_probes(app, partial(missing, nc, streams.QUOTA, database, store.ping))
    return app
