"""Commands whose standard output takes no more: a disk that is full, a reader who has left."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import pytest

from tests import forked
from tests.people import rows
from tests.stack import Stack, environment

COMMANDS = [
    ("services.ledger", "explain --id {id}"),
    ("services.ledger", "explain --id {id} --json"),
    ("services.ledger", "export"),
    ("services.ledger", "export --format ndjson"),
    ("services.ledger", "audit"),
    ("services.ledger", "quarantine"),
    ("services.ledger", "archive --before 2026-01-01 --out {folder}"),
    ("services.ledger", "prove --user user_1 --out {folder}/proof.json"),
    ("services.ledger", "replay --dry-run"),
    ("services.quota", "quarantine"),
    ("services.quota", "replay --dry-run"),
    ("services.quota", "replay --weights shared/plans.toml"),
]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack beside which the commands work, with something to tell."""
    with Stack(tmp_path_factory.mktemp("commands") / "data", CHATRAIL_SEAL_EVERY_S="0.1") as stack:

        async def use() -> None:
            await stack.report("user_1", 8094)
            await stack.usage_reaches("user_1", 8094)

        asyncio.run(use())
        yield stack


@contextmanager
def full_disk() -> Iterator[IO[bytes]]:
    with Path("/dev/full").open("wb") as full:
        yield full


@contextmanager
def left_pipe() -> Iterator[IO[bytes]]:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as left:
        yield left


@pytest.mark.parametrize("output", [full_disk, left_pipe])
@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=[arguments for _, arguments in COMMANDS])
async def test_what_cannot_be_told_is_said_in_one_sentence_and_is_no_success(
    used: Stack, tmp_path: Path, module: str, arguments: str, output: object
) -> None:
    ((event_id,),) = rows(used.data / "ledger.db", "SELECT id FROM usage")
    named = arguments.format(id=event_id, folder=tmp_path).split()
    variables = environment(CHATRAIL_DATA=str(used.data))
    with TemporaryFile() as errors, output() as full:  # type: ignore[operator]
        process = forked.start(module, *named, env=variables, output=full, errors=errors)
        async with asyncio.timeout(60):
            status = await process.ended()
        said = os.pread(errors.fileno(), 10_000, 0).decode()
    # Of an audit 1 says that something differs.
    assert status == (2 if arguments == "audit" else 1)
    reason = "No space left on device" if output is full_disk else "Broken pipe"
    assert said.splitlines()[-1].endswith(f" cannot be written: {reason}.")
    assert "Traceback" not in said
