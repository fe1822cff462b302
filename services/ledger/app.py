"""The ledger, put together: read from top to bottom."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette

from services.ledger import store
from services.ledger.handlers import Handlers
from services.ledger.settings import Settings
from shared import streams
from shared.database import Database
from shared.plans import Plans
from shared.subscribers import create_broker, running
from shared.telemetry import Missing, probes


def create_app(settings: Settings) -> Starlette:
    plans = Plans.load(settings.plans)
    database = Database(settings.database_url)
    broker = create_broker(settings.nats_url, "ledger")
    handlers = Handlers(broker, database, plans)

    async def missing() -> Missing:
        absent: Missing = {}
        if not await broker.ping(timeout=1):
            absent["nats"] = "the broker does not answer"
        try:
            await database.read(store.ping)
        except (SQLAlchemyError, OSError) as error:
            absent["database"] = type(error).__name__
        return absent

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with running(broker, streams.LEDGER, handlers.on_usage):
            yield
        await database.close()

    return Starlette(routes=probes(missing), lifespan=lifespan)
