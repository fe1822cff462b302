"""The ledger's commands: serve, migrate, quarantine, audit, explain, prove, export, archive, trim, replay."""

import gc

# What is imported stays. Looked through meanwhile, again and again, it takes half as long again to start.
gc.disable()

from pathlib import Path

import typer
from sqlalchemy import Connection

from services.ledger import store
from services.ledger.app import create_app
from services.ledger.archive_command import archive, trim
from services.ledger.audit_command import audit
from services.ledger.explain import explain
from services.ledger.export_command import export
from services.ledger.prove import prove
from services.ledger.replay import RebuiltLedger, show_past
from services.ledger.settings import Settings
from shared.commands import command
from shared.database import Database
from shared.events import Event
from shared.quarantine_command import command as show_quarantine
from shared.replay_command import DespiteGaps, DryRun, Out, Until, check, into_place, past, without_a_change
from shared.replay_command import run as run_command
from shared.server import one_sentence
from shared.server import serve as run

gc.enable()

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False, rich_markup_mode=None)
MIGRATIONS = Path(__file__).with_name("migrations")

cli.command()(archive)
cli.command()(trim)
cli.command()(audit)
cli.command()(explain)
cli.command()(prove)
cli.command()(export)


@cli.command()
def serve() -> None:
    """Record events and answer calls until told to stop."""
    run("ledger", Settings.read, create_app)


@cli.command()
def migrate() -> None:
    """Bring the database to this release's schema; safe to repeat."""
    with one_sentence():
        Database(Settings.read().database_url).migrate(MIGRATIONS)


@cli.command()
def quarantine(*, redrive: bool = False) -> None:
    """List what could not be handled; --redrive counts what can be read by now, after a fix."""
    with command():
        settings = Settings.read()

        def apply(db: Connection, event: Event) -> list[Event]:
            return store.record(db, [event]).contradicting

        show_quarantine("ledger", settings, settings.database_url, apply, redriving=redrive)


@cli.command()
def replay(
    *, is_dry: DryRun = False, until: Until = None, out: Out = None, despite_gaps: DespiteGaps = False
) -> None:
    """Build every record anew from the stream, and switch to them in one transaction. Services may run."""
    at = None if until is None else past(until, "'--until'")
    check(is_dry=is_dry, looks_at_the_past=at is not None, out=out)
    with command():
        settings, rebuilt = Settings.read(), RebuiltLedger()
        if is_dry:
            run_command(without_a_change(settings, settings.database_url, rebuilt))
        elif at:
            run_command(show_past(settings, at, out=out))
        else:
            run_command(into_place(settings, settings.database_url, rebuilt, despite_gaps=despite_gaps))


if __name__ == "__main__":
    cli()
