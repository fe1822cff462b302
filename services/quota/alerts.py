"""Alerts on their way from the table, in which each is once, to the stream."""

import asyncio

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import APIError
from sqlalchemy.exc import SQLAlchemyError

from services.quota import store
from shared import streams
from shared.database import Database
from shared.events import CONTENT_TYPE

log = structlog.get_logger()


class Alerts:
    """What is not published now is published later: each until the stream has it."""

    def __init__(self, nc: Client, database: Database) -> None:
        self._nc, self._database = nc, database
        self._publishing: asyncio.Task[None] | None = None
        self._is_due = False

    def publish_soon(self) -> None:
        self._is_due = True
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish_all())

    async def _publish_all(self) -> None:
        while self._is_due:
            self._is_due = False
            try:
                await self.publish()
            except (SQLAlchemyError, NatsError, APIError, OSError) as error:
                log.warning("alerts_not_published_yet", error=repr(error))
        self._publishing = None

    async def publish(self) -> None:
        """All that wait. Their ids are their own, so the stream takes each once, whoever publishes it."""
        waiting = await self._database.read(store.alerts_to_publish)
        for event_id, event in waiting:
            headers = {"Content-Type": CONTENT_TYPE, "Nats-Msg-Id": event_id}
            await self._nc.jetstream().publish(
                streams.THRESHOLD_REACHED, event, stream=streams.ALERTS, headers=headers
            )
        if waiting:
            await self._database.write(store.alerts_published, [event_id for event_id, _ in waiting])
