"""The ledger's commands: serve, migrate, quarantine."""

from pathlib import Path

import typer
from sqlalchemy import Connection

from services.ledger import store
from services.ledger.app import create_app
from services.ledger.settings import Settings
from shared.database import Database
from shared.events import Event
from shared.quarantine import command
from shared.server import one_sentence
from shared.server import serve as run

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
MIGRATIONS = Path(__file__).with_name("migrations")


@cli.command()
def serve() -> None:
    """Record events and answer calls until told to stop."""
    run("ledger", Settings, create_app)


@cli.command()
def migrate() -> None:
    """Bring the database to this release's schema; safe to repeat."""
    with one_sentence("ledger"):
        Database(Settings().database_url).migrate(MIGRATIONS)


@cli.command()
def quarantine(*, redrive: bool = False) -> None:
    """List what could not be handled; --redrive counts what can be read by now, after a fix."""
    with one_sentence("ledger"):
        settings = Settings()

        def apply(db: Connection, event: Event) -> list[Event]:
            return store.record(db, [event]).contradicting

        command("ledger", settings.database_url, apply, redriving=redrive)


if __name__ == "__main__":
    cli()
