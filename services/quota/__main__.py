"""Quota's commands: serve, migrate, quarantine."""

from pathlib import Path

import typer
from sqlalchemy import Connection

from services.quota import store
from services.quota.app import create_app
from services.quota.settings import Settings
from shared.database import Database
from shared.events import Event
from shared.plans import Plans
from shared.quarantine import command
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


@cli.command()
def quarantine(*, redrive: bool = False) -> None:
    """List what could not be handled; --redrive counts what can be read by now, after a fix."""
    with one_sentence("quota"):
        settings = Settings()
        plans = Plans.load(settings.plans)

        def apply(db: Connection, event: Event) -> list[Event]:
            return store.settle(db, plans, [event]).contradicting

        command("quota", settings.database_url, apply, redriving=redrive)


if __name__ == "__main__":
    cli()
