"""`archive` and `trim`, the commands: what they are asked, and what they say."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from nats.js.errors import APIError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.ledger.archive import Reach, alone_in
from services.ledger.archive import archive as archive_before
from services.ledger.checkpoint import load_keys
from services.ledger.settings import Settings
from services.ledger.snapshots import snapshot
from services.ledger.trim import TRIM_WITHIN, Trimmed
from services.ledger.trim import trim as trim_archived
from shared.archive import Archive, Manifest
from shared.bus_of_folder import bus_of_folder
from shared.commands import command
from shared.errors import Misconfigured
from shared.replay_command import named, past, run
from shared.streams import LEDGER
from shared.terminal import printable

TABLES = ("leaves", "seals")
DAY_S = 24 * 3600
# A trim that was killed goes on for the minute that services bear it; then they notice within 15 s, start again,
# and put it back, or somebody has to. Whatever is not archived by then must be younger than what it deletes.
OVERLAP_S_MIN = 10 * TRIM_WITHIN.total_seconds()
OVERLAP_S_MAX = 36_500 * DAY_S

Folder = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", parser=named, help="The archive's folder; CHATRAIL_ARCHIVE without it."),
]


def archive(
    *,
    before: Annotated[
        str, typer.Option(metavar="TIME", help="What was stored before (RFC 3339, or a day in UTC: its beginning).")
    ],
    out: Folder = None,
) -> None:
    """Write down what the stream had before, behind what is archived already, and check both. Services may run."""
    until = past(before, "'--before'")
    with command():
        settings = Settings.read()
        run(_archive(settings, out or settings.archive_folder, until))


async def _archive(settings: Settings, folder: Path, before: datetime) -> None:
    async with bus_of_folder(settings, name="archive") as nc:
        with alone_in(folder), snapshot(LEDGER, settings.database_url, TABLES) as ledger, _progress() as advance:
            written, reach = await archive_before(
                nc,
                ledger.rows,
                folder,
                before=before,
                keys=load_keys(settings.seal_key_file),
                advance=advance,
            )
    for line in _written_in_words(folder, written, reach):
        typer.echo(printable(line))


def _written_in_words(folder: Path, written: Sequence[Manifest], reach: Reach) -> Iterator[str]:
    kept = Archive.at(folder)
    for manifest in written:
        yield f"Archived messages {manifest.first:,} to {manifest.last:,} in {kept.path(manifest)}"
    if not written:
        so_far = f"has all up to message {kept.last:,}" if kept.last else "is empty"
        yield f"Nothing new is archived: the archive {folder} {so_far}."
    if (left := reach.stored_before - kept.last) > 0:
        is_handled = reach.handled >= reach.stored_before
        why = "the next seal covers them" if is_handled else "ledger and quota have not handled them all yet"
        yield f"Of what was stored before, {left:,} at the end wait for a later archive: {why}."
    if written:
        yield "Each message written now was read back, and is as it was sealed."
    if earlier := len(kept.manifests) - len(written):
        yield (
            f"{earlier:,} of its files {'was' if earlier == 1 else 'were'} there before, with the SHA-256 of the "
            "manifest; make audit and make trim compare each message with what was sealed."
        )
    if kept.last:
        yield (
            f"Keep a copy of {folder} elsewhere; then make trim takes off the stream what is archived, but for its "
            "last day."
        )


def trim(
    *,
    out: Folder = None,
    overlap_s: Annotated[
        float,
        typer.Option(
            max=OVERLAP_S_MAX, help="So much of the archive's end stays on the stream, too; less is a risk."
        ),
    ] = DAY_S,
) -> None:
    """Take off the stream what is archived, once both are compared with what was sealed. Services may run."""
    overlap = _overlap(overlap_s)
    with command():
        settings = Settings.read()
        run(_trim(settings, out or settings.archive_folder, overlap))


def _overlap(seconds: float) -> timedelta:
    if seconds < OVERLAP_S_MIN:
        raise typer.BadParameter(
            f"it is {OVERLAP_S_MIN:g} seconds at least: a trim that is killed goes on deleting until that is put "
            "right, and must not come to what is not archived",
            param_hint="'--overlap-s'",
        )
    return timedelta(seconds=seconds)


async def _trim(settings: Settings, folder: Path, overlap: timedelta) -> None:
    async with bus_of_folder(settings, name="trim") as nc:
        with alone_in(folder), snapshot(LEDGER, settings.database_url, TABLES) as ledger:
            keys = load_keys(settings.seal_key_file)
            try:
                trimmed = await trim_archived(nc, ledger.rows, folder, overlap=overlap, keys=keys)
            except APIError as error:
                raise Misconfigured(f"The broker refuses to trim the stream: {error.description}.") from error
    for line in _trimmed_in_words(folder, trimmed):
        typer.echo(printable(line))


def _trimmed_in_words(folder: Path, trimmed: Trimmed) -> Iterator[str]:
    if trimmed.messages:
        yield f"{trimmed.messages:,} messages left the stream, which begins at message {trimmed.begins:,} now."
        yield f"Audits and replays read what was before it from {folder}: keep it, and keep a copy of it."
        if trimmed.keys:
            yield f"Of all that is archived, {trimmed.keys:,} have an Idempotency-Key, which is known as before."
    else:
        yield f"Nothing was trimmed: what is archived in {folder} is off the stream already, or of its last day."


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A count on the terminal, where there is one."""
    console = Console(stderr=True)
    columns = (TextColumn("Archiving"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        archiving = bar.add_task("", total=None)
        yield lambda messages: bar.advance(archiving, messages)
