"""`quarantine`, the command of each service: what could not be handled, and what can be by now."""

import hashlib
from collections.abc import Set
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import make_url

from shared.bus_of_folder import bus_of_folder
from shared.database import Database, usable
from shared.errors import Misconfigured
from shared.quarantine import Apply, digests, listed, redrive
from shared.record import Record
from shared.replay_command import run
from shared.settings import ServiceSettings
from shared.terminal import printable


def command(service: str, settings: ServiceSettings, database_url: str, apply: Apply, *, redriving: bool) -> None:
    """What an operator sees of a service's quarantine: a line a message, never its content."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise Misconfigured(f"{service} has no database yet at {url.database}")
    console = Console(highlight=False)
    database = Database(database_url)

    async def work() -> None:
        try:
            if redriving:
                told = await database.write(redrive, apply, await _on_record(settings, database))
                console.print(f"{service}: {told.counted} messages are counted now")
                if told.doubted:
                    stays = "are not what the stream has, and stay: make audit names them"
                    console.print(f"{service}: {told.doubted} {stays}")
            rows = await database.read(listed)
        finally:
            await database.close()
        table = Table("received", "subject", "bytes", "SHA-256", "reason", box=None, pad_edge=False)
        for row in rows:
            received, size = row.received_at.isoformat(timespec="seconds"), str(len(row.body))
            subject, reason = Text(printable(row.subject)), Text(printable(row.reason))
            table.add_row(received, subject, size, row.body_sha256[:12], reason)
        console.print(f"{service}: {len(rows)} messages in quarantine")
        if rows:
            console.print(table)

    with usable(url):
        run(work())


async def _on_record(settings: ServiceSettings, database: Database) -> Set[str]:
    """Of what is in quarantine, what the record has, too: nothing else is counted. Reads all of it, if need be."""
    wanted, found = await database.read(digests), set[str]()
    if not wanted:
        return found
    async with bus_of_folder(settings, name="quarantine") as nc:
        record = Record(nc, settings.archive_folder)
        first, last = await record.bounds()
        async for batch in record.read(first=first, last=last):
            found |= wanted & {hashlib.sha256(message.body).hexdigest() for message in batch}
    return found
