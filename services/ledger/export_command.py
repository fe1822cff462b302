"""`export`, the command: what it is asked, and where the records are written to."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from services.ledger import export as exporting
from services.ledger import store
from services.ledger.export import Format
from services.ledger.scope import asked
from services.ledger.settings import Settings
from shared.database import snapshot
from shared.errors import Misconfigured
from shared.server import one_sentence, without_standard_output


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
    with _in_one_sentence(), snapshot(Settings.read().database_url, store.usage) as db:
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
def _in_one_sentence() -> Iterator[None]:
    with one_sentence():
        try:
            yield
        except OSError as error:
            without_standard_output()
            raise Misconfigured(f"The export cannot be written: {error.strerror}.") from error
