"""What operators type: what makes no sense is refused in a sentence, before anything is read or changed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import typer
from typer.testing import CliRunner

from services.ledger import verify_record
from services.ledger.__main__ import cli as ledger
from services.ledger.audit_command import CANNOT, ended_by_a_sentence
from services.quota.__main__ import cli as quota
from tests.stack import PROJECT


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command logs to its own standard error, which is closed when it has ended."""
    yield
    structlog.reset_defaults()


NO_TIME = ["", "yesterday", "2026-13-01", "9999-12-31T23:59:59-14:00"]


@pytest.mark.parametrize("service", [ledger, quota])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        *((["--until", text], "is not a time") for text in NO_TIME),
        (["--out", "somewhere"], "add --until"),
        (["--dry-run", "--out", "somewhere"], "add --until"),
        (["--dry-run", "--until", "2026-11-20"], "leave out the other"),
        (["--until", "2099-01-01"], "2099-01-01 is still to come"),
        (["--out", "", "--until", "2026-11-20"], "the name is empty"),
    ],
)
def test_a_look_at_the_past_that_makes_no_sense_does_not_become_a_replay(
    service: object, options: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(service, ["replay", *options], told, monkeypatch)


@pytest.mark.parametrize(
    ("service", "arguments"),
    [
        (quota, ["replay", "--weights", ""]),
        (ledger, ["archive", "--before", "2026-11-20", "--out", ""]),
        (ledger, ["trim", "--out", ""]),
        (ledger, ["export", "--out", ""]),
        (ledger, ["prove", "--user", "user_1", "--out", ""]),
        (ledger, ["prove", "--user", "", "--out", "proof.json"]),
        (ledger, ["prove", "--user", "user_1", "--id", "", "--out", "proof.json"]),
        (ledger, ["explain", "--id", ""]),
        (ledger, ["explain", "--id", "x", "--user", ""]),
        (ledger, ["export", "--format", ""]),
    ],
)
def test_what_is_empty_is_neither_everything_nor_a_default(
    service: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(service, arguments, "Invalid value for", monkeypatch)


@pytest.mark.parametrize("variable", ["WEIGHTS", "UNTIL", "OUT"])
def test_make_hands_on_that_something_is_empty(variable: str) -> None:
    """WEIGHTS= replayed the ledger in earnest."""
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "--old-file=.venv/installed-run",
        "replay",
        f"{variable}=",
    ]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    first = next(line for line in said.splitlines() if line.strip() not in ("", ":"))
    assert f"--{variable.lower()}=''" in first


def test_a_reader_of_a_check_who_goes_away_is_told_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "proof.json").write_text("{}")
    reading, writing = os.pipe()
    os.close(reading)
    checking = [sys.executable, verify_record.__file__, str(tmp_path / "proof.json")]
    ended = subprocess.run(checking, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (2, b"")


def test_other_weights_are_no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(quota, ["replay", "--dry-run", "--weights", "plans.toml"], "leave out the other", monkeypatch)


@pytest.mark.parametrize("command", ["audit", "export"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--user", ""], "nobody's"),
        *(([option, text], "is neither a day") for option in ("--from", "--to") for text in NO_TIME),
        (["--from", "2026-11-30T12:00:00"], "is neither a day"),
        (["--from", "2026-12-01", "--to", "2026-11-30"], "is after --to"),
    ],
)
def test_nobody_is_looked_at_by_mistake(
    command: str, options: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(ledger, [command, *options], told, monkeypatch)


NO_UNICODE = os.fsdecode(b"\xff\xfe")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["audit", "--user", NO_UNICODE], "--user"),
        (["export", "--user", NO_UNICODE], "--user"),
        (["prove", "--out", "proof.json", "--user", NO_UNICODE], "--user"),
        (["prove", "--out", "proof.json", "--user", "user_1", "--id", NO_UNICODE], "--id"),
        (["explain", "--id", NO_UNICODE], "--id"),
        (["explain", "--id", "x", "--user", NO_UNICODE], "--user"),
    ],
)
def test_what_is_no_unicode_is_nobodys_name(
    arguments: list[str], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(ledger, arguments, f"Invalid value for '{option}': it is no UTF-8, and every name is", monkeypatch)


def test_an_audit_that_crashes_has_found_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, ended_by_a_sentence():
        raise LookupError("nobody thought of it")
    assert ended.value.exit_code == CANNOT
    assert "LookupError: nobody thought of it" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "0", "599.9"])
def test_no_trim_leaves_so_little_that_a_killed_one_might_come_to_what_is_not_archived(
    seconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(ledger, ["trim", "--overlap-s", seconds], "it is 600 seconds at least", monkeypatch)


@pytest.mark.parametrize("text", NO_TIME)
def test_what_is_archived_is_before_a_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(ledger, ["archive", "--before", text], "is not a time", monkeypatch)


@pytest.mark.parametrize(
    ("service", "arguments", "database"),
    [
        *((ledger, [command], "ledger") for command in ("migrate", "quarantine", "export")),
        *((quota, [command], "quota") for command in ("migrate", "quarantine")),
        (ledger, ["explain", "--id", "any"], "ledger"),
    ],
)
def test_a_damaged_database_is_named_with_what_to_do(
    tmp_path: Path, service: object, arguments: list[str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{database}.db"
    file.write_bytes(b"no database " * 1_000)
    monkeypatch.setenv("CHATRAIL_DATA", str(tmp_path))
    ended = CliRunner().invoke(service, arguments)  # type: ignore[arg-type]
    assert ended.exit_code == 1
    told = f"The database {file} is damaged, or is none. Move it away and start ChatRail: "
    assert ended.output == f"{told}it makes another from the stream.\n"


def refused(service: object, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    ended = CliRunner().invoke(service, arguments)  # type: ignore[arg-type]
    assert ended.exit_code == 2
    assert told in ended.stderr
    assert ended.stdout == ""
