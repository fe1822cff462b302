"""What people read on a terminal has ids of others in it, and nothing that the terminal would obey."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from services.ledger import findings, verify_record
from services.ledger.__main__ import MIGRATIONS, cli
from services.ledger.findings import Difference, Group, Proven, Read, Report
from shared.calls import RecordedStory
from shared.database import Database
from shared.differences import Difference as WouldChange
from shared.errors import Misconfigured
from shared.quarantine import Poison, quarantine
from shared.replay_command import would_change_in_words
from shared.replaying import Told
from shared.server import one_sentence
from shared.settings import sqlite_url
from shared.story import in_words, story
from shared.terminal import printable
from tests.unit.test_story import held

# Turns the rest of a line around; joins what is beside it; is none that could be written as UTF-8.
ID, SHOWN = "user\u202e_\u200d1\udcff", "user\\u202e_\\u200d1\\udcff"


@given(st.text())
def test_all_that_is_printed_is_printable_and_what_is_printable_stays(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown


def explained() -> Iterator[str]:
    told = story(ID, RecordedStory(record=None), held().model_copy(update={"user_id": ID}))
    assert told
    return in_words(told)


class _Found:
    def groups(self) -> list[Group]:
        return [Group("ledger.usage", "changed", 1)]

    def differences(self, where: str, kind: str) -> Iterator[Difference]:
        yield Difference(where, kind, ID, ID, {"model": ID}, {"model": None})


def audited() -> Iterator[str]:
    proven = Proven(0, 0, [], None, 0, None, unguarded=[ID])
    return findings.in_words(Report(Read(1, 1, 1, 0, 0, {}), {"ledger.usage": 1}, proven, _Found(), 0.1))


def replayed() -> Iterator[str]:
    difference = WouldChange("usage", 1, 0, 0, [f"id {ID}: model {ID} becomes None"])
    return would_change_in_words("ledger", Told(beside=[f"{ID} lacks triggers"]), [difference])


@pytest.mark.parametrize(("told", "times"), [(explained, 2), (audited, 4), (replayed, 3)])
def test_ids_are_told_so_that_a_terminal_obeys_nothing(told: Callable[[], Iterator[str]], times: int) -> None:
    lines = list(told())
    assert all(line.isprintable() for line in lines)
    assert "".join(lines).count(SHOWN) == times


def test_a_sentence_that_ends_a_command_repeats_an_id_in_the_same_way() -> None:
    with pytest.raises(SystemExit) as ended, one_sentence():
        raise Misconfigured(f"{ID} has no records.")
    assert ended.value.code == f"{SHOWN} has no records."


def test_the_program_that_checks_a_proof_does_the_same_alone(capsys: pytest.CaptureFixture[str]) -> None:
    verify_record.say(ID, "two\nlines")
    assert capsys.readouterr().out == f"{SHOWN}\ntwo\nlines\n"


def test_a_subject_in_quarantine_is_told_as_it_is_and_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATRAIL_DATA", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    database = Database(sqlite_url(tmp_path, "ledger.db"))
    database.migrate(MIGRATIONS)

    async def arrive() -> None:
        await database.write(quarantine, [Poison("usage.[red]\u202e", b"", "[/red]")])
        await database.close()

    asyncio.run(arrive())
    ended = CliRunner().invoke(cli, ["quarantine"])
    assert "usage.[red]\\u202e" in ended.output
    assert "[/red]" in ended.output
