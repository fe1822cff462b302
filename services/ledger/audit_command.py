"""`audit`, the command: what it is asked, what it shows and says, and the status with which it ends."""

import asyncio
import gc
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.ledger.audit import READING, Databases, Evidence
from services.ledger.audit import audit as run
from services.ledger.checkpoint import load_keys
from services.ledger.findings import as_json, in_words
from services.ledger.scope import Scope, asked
from services.ledger.scratch import scratch
from services.ledger.settings import Settings
from shared.bus_of_folder import bus_of_folder
from shared.errors import Misconfigured, Unavailable
from shared.plans import Plans
from shared.server import one_sentence, without_standard_output
from shared.telemetry import configure_logging_of_a_command

AGREE, DIFFER, CANNOT = 0, 1, 2


def audit(
    *,
    user: Annotated[str | None, typer.Option(help="This user alone.")] = None,
    first: Annotated[str | None, typer.Option("--from", help="The first day in UTC, or moment (RFC 3339).")] = None,
    last: Annotated[str | None, typer.Option("--to", help="The last day in UTC, or moment; included.")] = None,
    as_document: Annotated[bool, typer.Option("--json", help="One JSON document with every difference.")] = False,
) -> None:
    """Compare the stream with ledger and totals, and name every difference. Reads all, and changes nothing.

    Ends with 0 when all agree, with 1 when there is a difference, with 2 when it cannot be done. Services may run.
    """
    scope = asked(user, first, last)
    configure_logging_of_a_command(logging.CRITICAL)
    # What is loaded stays; of what is read nothing is left after each batch.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with ended_by_a_sentence():
        settings = Settings.read()
        agrees = asyncio.run(_audit(settings, scope, as_document=as_document))
    raise typer.Exit(AGREE if agrees else DIFFER)


async def _audit(settings: Settings, scope: Scope, *, as_document: bool) -> bool:
    """Whether all agree, once it is told."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - this is one
    # As on Ctrl-C: what was started for the occasion is stopped in order.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    databases, plans = Databases(settings.database_url, settings.quota_url), Plans.load(settings.plans)
    evidence = Evidence(load_keys(settings.seal_key_file), settings.seals_file)
    with scratch() as kept:
        async with bus_of_folder(settings, name="audit") as nc:
            with _progress() as show:
                report = await run(
                    nc,
                    databases,
                    plans,
                    scope,
                    kept,
                    evidence=evidence,
                    archive=settings.archive_folder,
                    progress=show,
                )
        # Of some days there may be nothing; of all time only where the name is wrong.
        if scope == Scope(scope.user_id) != Scope() and report.agrees and not report.has_records:
            raise Misconfigured(f"Nothing is known of {scope.user_id}: no event, no record, no total.")
        try:
            for part in as_json(report) if as_document else (f"{line}\n" for line in in_words(report)):
                sys.stdout.write(part)
            sys.stdout.flush()
        except OSError as problem:
            without_standard_output()
            raise Misconfigured(f"What was found cannot be written: {problem.strerror}.") from problem
        return report.agrees


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal, where there is one; elsewhere a sentence tells what is waited for."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, told = Console(stderr=True), {READING}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(READING, total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if what not in told and not console.is_terminal:
                typer.echo(f"{what}: the audit waits for it.", err=True)
            told.add(what)

        yield show


@contextmanager
def ended_by_a_sentence() -> Iterator[None]:
    """Whatever keeps the audit from its end must not look as if it had found a difference."""
    try:
        with one_sentence():
            yield
    except SystemExit as problem:
        if isinstance(problem.code, str):
            typer.echo(problem.code, err=True)
            raise typer.Exit(CANNOT) from None
        raise
    except Unavailable as problem:
        typer.echo(problem.detail, err=True)
        raise typer.Exit(CANNOT) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("The audit was stopped before its end.", err=True)
        raise typer.Exit(CANNOT) from None
    except Exception:  # noqa: BLE001 - it is told, and ends the process
        traceback.print_exc()
        raise typer.Exit(CANNOT) from None
