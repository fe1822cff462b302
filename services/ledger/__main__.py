"""The ledger's commands: serve, migrate, quarantine, audit, explain, prove, export, archive, trim, replay."""

import gc

# What is imported stays. Looked through meanwhile, again and again, it takes half as long again to start.
gc.disable()

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import Connection

from services.ledger import export as exporting
from services.ledger import store
from services.ledger.app import create_app
from services.ledger.archive_command import archive, trim
from services.ledger.audit_command import audit
from services.ledger.explain import explain
from services.ledger.export import Format
from services.ledger.prove import prove
from services.ledger.replay import RebuiltLedger, show_past
from services.ledger.scope import asked
from services.ledger.settings import Settings
from shared.commands import command
from shared.database import Database, snapshot
from shared.errors import Misconfigured
from shared.events import Event
from shared.quarantine_command import command as show_quarantine
from shared.replay_command import DespiteGaps, DryRun, Out, Until, check, into_place, past, without_a_change
from shared.replay_command import run as run_command
from shared.server import one_sentence, without_standard_output
from shared.server import serve as run

gc.enable()

cli = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False, rich_markup_mode=None)
MIGRATIONS = Path(__file__).with_name("migrations")

cli.command()(archive)
cli.command()(trim)
cli.command()(audit)
cli.command()(explain)
cli.command()(prove)


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
def export(
    *,
    file_format: Annotated[Format, typer.Option("--format")] = Format.CSV,
    out: Annotated[str, typer.Option(help="The file, replaced if it is there; - is standard output.")] = "-",
    user: Annotated[str | None, typer.Option(help="This user's records alone.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="The first day in UTC, or moment (RFC 3339).")] = None,
    last: Annotated[str | None, typer.Option("--to", help="The last day in UTC, or moment; included.")] = None,
) -> None:
    """Write down every record, as they all are at this moment: CSV, NDJSON or Parquet."""
    file = None if out == "-" else _file(out)
    if file is None and sys.stdout is None:
        raise typer.BadParameter("standard output is closed; name a file", param_hint="'--out'")
    if file is None and file_format is Format.PARQUET:
        raise typer.BadParameter("Parquet is written to a file only; name one", param_hint="'--out'")
    scope = asked(user, first, last)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as on Ctrl-C: what is half-written is removed
    with _export_in_one_sentence(), snapshot(Settings.read().database_url, store.usage) as db:
        exporting.check(db)
        # On the terminal that shows the records themselves, a bar would be in their way.
        watched = sys.stderr.isatty() and (file is not None or not sys.stdout.isatty())
        total = exporting.count(db, scope) if watched else None
        whole = exporting.replacing(file) if file else nullcontext(sys.stdout.buffer)
        with Progress(console=Console(stderr=True), disable=not watched) as progress, whole as written:
            task = progress.add_task("Exporting", total=total)
            exporting.export(db, scope, file_format, written, lambda rows: progress.advance(task, rows))
            written.flush()


def _file(name: str) -> Path:
    if not name:
        raise typer.BadParameter("the name is empty; - is standard output", param_hint="'--out'")
    try:
        file = Path(name).resolve()
        if file.exists() and not file.is_file():
            raise typer.BadParameter(f"{name!r} is there, and is not a file", param_hint="'--out'")
    except OSError as error:
        raise typer.BadParameter(f"{name[:128]!r} cannot be used: {error.strerror}", param_hint="'--out'") from None
    return file


@contextmanager
def _export_in_one_sentence() -> Iterator[None]:
    with one_sentence():
        try:
            yield
        except OSError as error:
            without_standard_output()
            raise Misconfigured(f"The export cannot be written: {error.strerror}.") from error


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
