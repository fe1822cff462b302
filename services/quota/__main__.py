"""Quota's commands: serve, migrate."""

from pathlib import Path

import typer

from services.quota.app import create_app
from services.quota.settings import Settings
from shared.database import Database
from shared.server import one_sentence
from shared.server import serve as run

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
MIGRATIONS = Path(__file__).with_name("migrations")


@cli.command()
def serve() -> None:
    """Answer calls and settle events until told to stop."""
    run("quota", Settings, create_app)


@cli.command()
def migrate() -> None:
    """Bring the database to this release's schema; safe to repeat."""
    with one_sentence("quota"):
        Database(Settings().database_url).migrate(MIGRATIONS)


if __name__ == "__main__":
    cli()
