"""The ledger, put together: read from top to bottom."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette

from services.ledger import store
from services.ledger.checkpoint import signing_keys
from services.ledger.handlers import Handlers
from services.ledger.partitions import keep_ahead
from services.ledger.sealer import Sealer
from services.ledger.settings import Settings
from shared import streams
from shared.answering import missing, running
from shared.broker import Connection, cancelled
from shared.database import Database
from shared.guards import essential
from shared.plans import Plans
from shared.telemetry import install_probes


def create_app(settings: Settings) -> Starlette:
    plans = Plans.load(settings.plans)
    database = Database(settings.database_url)
    nc = Connection()
    handlers = Handlers(database, plans)
    keys = signing_keys(settings.seal_key_file)
    sealer = Sealer(
        nc,
        database,
        keys=keys,
        seals_file=settings.seals_file,
        every_s=settings.seal_every_s,
        archive=settings.archive_folder,
    )

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with running(
            nc,
            settings.nats_url,
            streams.LEDGER,
            database,
            calls=handlers.calls,
            handle=handlers.on_usage,
            archive=settings.archive_folder,
        ):
            sealing = essential(asyncio.create_task(sealer.run(), name="the sealer"))
            parting = essential(asyncio.create_task(keep_ahead(database), name="the maker of partitions"))
            try:
                yield
            finally:
                await cancelled(sealing, parting)
        await database.close()

    app = Starlette(lifespan=lifespan)
    install_probes(app, partial(missing, nc, streams.LEDGER, database, store.ping))
    return app
