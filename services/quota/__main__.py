"""Quota's commands: serve, migrate, quarantine, replay."""

import gc

# What is imported stays. Looked through meanwhile, again and again, it takes half as long again to start.
gc.disable()

from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import Connection

from services.quota import store
from services.quota.app import create_app
from services.quota.replay import RebuiltQuota
from services.quota.replay_command import compare_weights, show_past
from services.quota.settings import Settings
from shared.commands import command
from shared.database import Database
from shared.events import Event
from shared.plans import Plans
from shared.quarantine_command import command as show_quarantine
from shared.replay_command import DespiteGaps, DryRun, Out, Until, check, into_place, named, past, without_a_change
from shared.replay_command import run as run_command
from shared.server import one_sentence
from shared.server import serve as run

gc.enable()

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False, rich_markup_mode=None)
MIGRATIONS = Path(__file__).with_name("migrations")


@cli.command()
def serve() -> None:
    """Answer calls and settle events until told to stop."""
    run("quota", Settings.read, create_app)


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
        plans = Plans.load(settings.plans)

        def apply(db: Connection, event: Event) -> list[Event]:
            return store.settle(db, plans, [event]).contradicting

        show_quarantine("quota", settings, settings.database_url, apply, redriving=redrive)


@cli.command()
def replay(
    *,
    is_dry: DryRun = False,
    until: Until = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="PLANS", parser=named, help="What all usage would come to under this plans file."),
    ] = None,
    out: Out = None,
    despite_gaps: DespiteGaps = False,
) -> None:
    """Build totals and plans anew from the stream, and switch to them in one transaction. Services may run."""
    at = None if until is None else past(until, "'--until'")
    check(is_dry=is_dry, looks_at_the_past=at is not None or weights is not None, out=out)
    with command():
        settings = Settings.read()
        plans = Plans.load(settings.plans)
        others = Plans.load(weights) if weights else None
        rebuilt = RebuiltQuota(plans)
        if is_dry:
            run_command(without_a_change(settings, settings.database_url, rebuilt))
        elif others:
            run_command(compare_weights(settings, plans, others, until=at, out=out))
        elif at:
            run_command(show_past(settings, plans, at, out=out))
        else:
            run_command(into_place(settings, settings.database_url, rebuilt, despite_gaps=despite_gaps))


if __name__ == "__main__":
    cli()
