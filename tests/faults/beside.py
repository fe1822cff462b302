"""Another chat beside that of a running stack, with a data folder of its own: one to do harm to."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests import forked
from tests.fixtures import eventually
from tests.forked import Forked
from tests.people import rows
from tests.stack import Stack, environment, free_port


@dataclass
class Chat:
    process: Forked
    folder: Path
    port: int
    http: httpx2.AsyncClient

    @property
    def pid(self) -> int:
        return self.process.pid

    async def is_ready(self) -> bool:
        with suppress(httpx2.TransportError):
            return (await self.http.get("/readyz")).is_success
        return False

    async def outbox_is_empty(self) -> bool:
        return not rows(self.folder / "outbox.db", "SELECT event_id FROM outbox")


@asynccontextmanager
async def chat_beside(stack: Stack, folder: Path, **variables: str) -> AsyncIterator[Chat]:
    """Ready. In the end it is told to stop, unless it has ended."""
    port = free_port()
    variables = {
        "CHATRAIL_NATS_URL": stack.endpoints["nats"],
        "CHATRAIL_DATA": str(folder),
        "CHATRAIL_PORT": str(port),
        "ANTHROPIC_BASE_URL": stack.endpoints["claude"],
        **variables,
    }
    with (folder / "chat.log").open("ab") as log:
        process = forked.start("services.chat", "serve", env=environment(**variables), output=log)
    limits = httpx2.Limits(max_connections=200)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx2.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=60, limits=limits) as http:
            chat = Chat(process, folder, port, http)
            await eventually(chat.is_ready)
            yield chat
    finally:
        process.terminate()
        process.wait(30)
