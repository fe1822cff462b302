"""The ledger's commands: serve, migrate."""

from pathlib import Path

import typer

from services.ledger.app import create_app
from services.ledger.settings import Settings
from shared.database import Database
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


if __name__ == "__main__":
    cli()
