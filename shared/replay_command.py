"""`replay`, the command of each service that has tables to replay: what it is asked, and what it says."""

import asyncio
import gc
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from nats.errors import Error as NatsError
from rich.console import Console

from shared.bus_of_folder import bus_of_folder
from shared.differences import Difference
from shared.errors import Misconfigured, Unavailable
from shared.replaying import Rebuilt, Told, dry_run, rebuild_into, replay
from shared.settings import ServiceSettings
from shared.telemetry import configure_logging_of_a_command
from shared.terminal import printable


def named(text: str) -> Path:
    """A file or folder. An empty name would be the folder in which somebody happens to be."""
    if not text:
        raise typer.BadParameter("the name is empty; leave the option out, or name something")
    return Path(text)


DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]
DespiteGaps = Annotated[
    bool, typer.Option("--despite-gaps", help="Replay what is left of a stream that has lost messages.")
]
Until = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Rebuild what the stream had then (RFC 3339, or a day in UTC), to look at."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", parser=named, help="Where what is rebuilt to look at stays, as a SQLite database."
    ),
]


def moment(given: str, option: str) -> datetime:
    """A moment as RFC 3339 has it; without a zone it is UTC's, and a day alone is its beginning."""
    try:
        found = datetime.fromisoformat(given)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{given!r} is not a time such as 2026-11-30T18:00:00Z", param_hint=option) from None


def past(given: str, option: str) -> datetime:
    """As `moment`. Of what is still to come nobody knows what there will be."""
    if (found := moment(given, option)) > datetime.now(UTC):
        raise typer.BadParameter(f"{given} is still to come", param_hint=option)
    return found


def check(*, is_dry: bool, looks_at_the_past: bool, out: Path | None) -> None:
    """Refuse options that do not go together: what was meant as a look must not become a replay."""
    if is_dry and looks_at_the_past:
        raise typer.BadParameter("it is about the present; leave out the other", param_hint="'--dry-run'")
    if out is not None and not looks_at_the_past:
        raise typer.BadParameter("it is for what is rebuilt to look at: add --until", param_hint="'--out'")


def run(work: Coroutine[Any, Any, None]) -> None:
    """Ends in order on Ctrl-C and on SIGTERM, with nothing left behind, and in a sentence where it cannot be done."""

    async def stoppable() -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is one
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    configure_logging_of_a_command()
    # Millions of rows come and go: nothing that the program is made of is looked at among them.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    try:
        asyncio.run(stoppable())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("Stopped; what is in use has not changed.")
    except Unavailable as problem:
        sys.exit(problem.detail)
    except (NatsError, OSError) as error:
        raise Misconfigured(f"The broker cannot be used: {error!r}") from error


async def into_place(settings: ServiceSettings, url: str, rebuilt: Rebuilt, *, despite_gaps: bool) -> None:
    async with bus_of_folder(settings, name="replay") as nc:
        told = await replay(nc, url, rebuilt, archive=settings.archive_folder, despite_gaps=despite_gaps)
    ended = f"writers waited {told.locked_s * 1000:.0f} ms" if told.is_exchanged else "all was as it should be"
    out = console()
    out.print(f"{rebuilt.service}: {told.messages:,} messages replayed; {ended}{_set_aside(told)}")
    for line in told.beside:
        out.print(f"{rebuilt.service}: {printable(line)}", markup=False)


async def without_a_change(settings: ServiceSettings, url: str, rebuilt: Rebuilt) -> None:
    async with bus_of_folder(settings, name="replay") as nc:
        told, differences = await dry_run(nc, url, rebuilt, archive=settings.archive_folder)
    for line in would_change_in_words(rebuilt.service, told, differences):
        console().print(line, markup=False)


def would_change_in_words(service: str, told: Told, differences: Sequence[Difference]) -> Iterator[str]:
    """For people, line by line: whether a replay would change something, and what."""
    found = [difference for difference in differences if difference.rows]
    would = "a replay would change this" if found or told.beside else "a replay would change nothing"
    yield f"{service}: {told.messages:,} messages read; {would}{_set_aside(told)}"
    for difference in found:
        yield f"{service}: a replay would change {difference.table}: {_counts(difference)}"
        yield from (f"    {printable(example)}" for example in difference.examples)
    yield from (f"{service}: {printable(line)}" for line in told.beside)


@asynccontextmanager
async def as_of(
    settings: ServiceSettings, rebuilt: Rebuilt, *, until: datetime | None, out: Path | None
) -> AsyncIterator[Path]:
    """A SQLite database with what the stream had at `until`; it is gone afterwards unless `out` names a folder."""
    with tempfile.TemporaryDirectory("-chatrail-replay") as folder:
        file = (out or Path(folder)).absolute() / f"{rebuilt.service}.db"
        async with bus_of_folder(settings, name="replay") as nc:
            told = await rebuild_into(nc, file, rebuilt, until=until, archive=settings.archive_folder)
        when = f" up to {until.isoformat()}" if until else ""
        kept = f"; kept in {file}" if out else ""
        line = f"{rebuilt.service}: {told.messages:,} messages read{when}{kept}{_set_aside(told)}"
        console(stderr=True).print(printable(line), markup=False)
        yield file


def console(*, stderr: bool = False) -> Console:
    """As wide as what is written, where nobody looks at it on a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if stream.isatty() else 400)


def _counts(difference: Difference) -> str:
    named = {
        "changed": difference.changed,
        "missing": difference.missing,
        "not on the stream": difference.unknown,
    }
    return ", ".join(f"{number:,} {what}" for what, number in named.items() if number)


def _set_aside(told: Told) -> str:
    parts = (
        (told.lacking, "are missing, the stream is damaged (make audit)"),
        (told.poison, "cannot be read (make quarantine)"),
        (told.contradicting, "repeat an id with another body (make quarantine)"),
    )
    return "".join(f"; {number:,} {what}" for number, what in parts if number)
