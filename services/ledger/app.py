"""The ledger, put together: read from top to bottom."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette

from services.ledger import store
from services.ledger.handlers import Handlers
from services.ledger.settings import Settings
from shared import streams
from shared.database import Database
from shared.plans import Plans
from shared.subscribers import create_broker, missing, running
from shared.telemetry import probes


def create_app(settings: Settings) -> Starlette:
    plans = Plans.load(settings.plans)
    database = Database(settings.database_url)
    broker = create_broker(settings.nats_url, "ledger")
    handlers = Handlers(broker, database, plans)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with running(broker, streams.LEDGER, handlers.on_usage):
            yield
        await database.close()

    return Starlette(routes=probes(partial(missing, broker, database, store.ping)), lifespan=lifespan)
