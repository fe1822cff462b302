"""The export of the ledger from SQLite and from PostgreSQL: what was recorded is what others read, and all of it."""

import asyncio
import csv
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from sqlalchemy import Connection, Date, Integer, Text, select, text
from typer.testing import CliRunner

from services.ledger import store
from services.ledger.__main__ import cli
from services.ledger.export import Format, export, replacing
from services.ledger.scope import Scope, asked
from shared.database import Database, UtcDateTime, snapshot
from shared.errors import Misconfigured
from shared.events import Event, small
from tests.builders import (
    NOON,
    USER_IDS,
    authorized,
    generation_completed,
    subscription_changed,
    topped_up,
    usage_adjusted,
    usage_reported,
)
from tests.fixtures import MIB, eventually
from tests.stack import PROJECT, environment

Records = list[dict[str, Any]]

COLUMNS = store.usage.c.keys()
DAY = timedelta(days=1)
FORMATS = pytest.mark.parametrize("file_format", Format)


@pytest.fixture
async def database(ledger_url: str) -> AsyncIterator[Database]:
    database = Database(ledger_url)
    yield database
    await database.close()


async def record(database: Database, *events: Event) -> None:
    await database.write(store.record, events)


async def ledger(database: Database) -> Records:
    """Every record by its columns, in the order of an export."""
    rows = await database.read(lambda db: db.execute(select(store.usage)).mappings().all())
    return sorted(map(dict, rows), key=lambda row: (row["created_at"], row["id"]))


def exported(
    url: str, file_format: Format, scope: Scope, on_rows: Callable[[int], object] = lambda _: None
) -> Records:
    """What a reader of the format makes of an export."""
    out = io.BytesIO()
    with snapshot(url, store.usage) as db:
        export(db, scope, file_format, out, on_rows)
    return READ[file_format](out.getvalue())


def read_csv(body: bytes) -> Records:
    rows = list(csv.DictReader(io.StringIO(body.decode(), newline=""), strict=True))
    return [{name: _from_cell(name, cell) for name, cell in row.items()} for row in rows]


def _from_cell(name: str, cell: str) -> Any:
    column = store.usage.c[name]
    if cell == "":
        return None
    if isinstance(column.type, Integer):
        return int(cell)
    return cell.removeprefix("'") if isinstance(column.type, Text) else _from_text(name, cell)


def _from_text(name: str, told: str) -> Any:
    """Moments, days and JSON, which CSV and NDJSON have as text."""
    column = store.usage.c[name]
    if isinstance(column.type, UtcDateTime):
        assert told.endswith("Z")
        return datetime.fromisoformat(told)
    return date.fromisoformat(told) if isinstance(column.type, Date) else json.loads(told)


def read_ndjson(body: bytes) -> Records:
    lines = body.decode().split("\n")
    assert lines.pop() == ""
    return [{name: _from_json(name, value) for name, value in json.loads(line).items()} for line in lines]


def _from_json(name: str, value: JsonValue) -> Any:
    is_told = isinstance(store.usage.c[name].type, UtcDateTime | Date) and isinstance(value, str)
    return _from_text(name, str(value)) if is_told else value


def read_parquet(body: bytes) -> Records:
    rows: Records = pyarrow.parquet.read_table(pyarrow.BufferReader(body)).to_pylist()
    return [row | {name: row[name] and json.loads(row[name]) for name in ("metadata", "authorized")} for row in rows]


READ: dict[Format, Callable[[bytes], Records]] = {
    Format.CSV: read_csv,
    Format.NDJSON: read_ndjson,
    Format.PARQUET: read_parquet,
}


def told(url: str, *arguments: str) -> tuple[int, str]:
    """How the command ends, and all that it says."""
    result = CliRunner().invoke(cli, ["export", *arguments], env={"CHATRAIL_LEDGER_DATABASE_URL": url})
    return result.exit_code, result.output


def do(statement: str) -> Callable[[Connection], None]:
    def work(db: Connection) -> None:
        db.execute(text(statement))

    return work


ODD = st.sampled_from(
    ["=1+1", "'=1+1", "'", "-94", "+49 30", "@x", 'say "hi", you', "a,b;c", " ", "null", "überall 🛤"]
)
NAMES = USER_IDS | ODD
MOMENTS = st.datetimes(datetime(1970, 1, 1), datetime(9998, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20) | ODD
FACTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
METADATA = st.dictionaries(TEXTS | st.just("line\r\nend"), FACTS, max_size=3).map(small)
GENERATIONS = st.builds(
    generation_completed,
    NAMES,
    input_tokens=st.integers(0, 10**7),
    outcome=st.sampled_from(["completed", "disconnected", "provider_error", "interrupted"]),
    on_disconnect=st.sampled_from([None, "stop", "drain"]),
    authorized=st.none() | st.builds(authorized, tier=NAMES, resets_at=st.none() | MOMENTS),
    action_type=NAMES,
    model=st.none() | NAMES,
    provider_request_id=st.none() | NAMES,
    started_at=MOMENTS,
    completed_at=MOMENTS,
    metadata=METADATA,
)
REPORTS = st.builds(usage_reported, NAMES, tokens_used=st.integers(0, 10**8), started_at=MOMENTS, metadata=METADATA)
ADJUSTMENTS = st.builds(usage_adjusted, NAMES, st.integers(-(10**8), 10**8), reason=NAMES, effective_at=MOMENTS)
TOP_UPS = st.builds(topped_up, NAMES, effective_at=st.just(NOON))  # many at one moment


@given(events=st.lists(GENERATIONS | REPORTS | ADJUSTMENTS | TOP_UPS, max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_what_was_recorded_is_what_is_read_back_from_each_format_in_order(
    database: Database, ledger_url: str, events: list[Event]
) -> None:
    await record(database, *events)
    expected = await ledger(database)
    for file_format in Format:
        assert exported(ledger_url, file_format, Scope()) == expected


@FORMATS
async def test_an_empty_ledger_is_a_file_without_records(
    database: Database, ledger_url: str, file_format: Format, tmp_path: Path
) -> None:
    await record(database, subscription_changed())
    out = tmp_path / "out"

    assert told(ledger_url, "--format", file_format, "--out", str(out)) == (0, "")

    assert READ[file_format](out.read_bytes()) == []
    if file_format is Format.CSV:
        assert out.read_text() == f"{','.join(COLUMNS)}\n"


async def test_metadata_that_stands_on_several_lines_is_one_line_of_ndjson(
    database: Database, ledger_url: str
) -> None:
    await record(database, generation_completed())
    values = ", ".join({"id": "'by hand'", "metadata": "'{\n\"a\"\\: 1}'"}.get(name, name) for name in COLUMNS)
    await database.write(do(f"INSERT INTO usage ({', '.join(COLUMNS)}) SELECT {values} FROM usage"))  # noqa: S608

    records = exported(ledger_url, Format.NDJSON, Scope())

    assert records == await ledger(database)
    assert [row["metadata"] for row in records if row["id"] == "by hand"] == [{"a": 1}]


async def test_parquet_has_the_types_that_the_table_has(database: Database, ledger_url: str, tmp_path: Path) -> None:
    await record(database, generation_completed())
    told(ledger_url, "--format", "parquet", "--out", str(tmp_path / "out.parquet"))
    schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet")

    assert schema.names == COLUMNS
    types = {name: str(schema.field(name).type) for name in ("tokens_used", "created_at", "usage_date", "metadata")}
    assert types == {
        "tokens_used": "int64",
        "created_at": "timestamp[us, tz=UTC]",
        "usage_date": "date32[day]",
        "metadata": "string",
    }
    assert [field.nullable for field in schema] == [column.nullable for column in store.usage.c]


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_cell_of_csv_is_never_run_as_a_formula(database: Database, ledger_url: str) -> None:
    await record(database, generation_completed("=1+1", model="@SUM(A1)"), usage_adjusted("=1+1", -94))

    _, body = told(ledger_url)

    for row in csv.DictReader(io.StringIO(body, newline="")):
        assert row["user_id"] == "'=1+1"
        assert row["model"] in ("'@SUM(A1)", "")
        assert row["tokens_used"] in ("8094", "-94")  # a number stays a number


@FORMATS
async def test_a_user_and_days_choose_records_both_days_included(
    database: Database, ledger_url: str, file_format: Format
) -> None:
    midnight = datetime(2026, 11, 22, tzinfo=UTC)
    moments = [midnight - timedelta(microseconds=1), midnight, NOON, midnight + 2 * DAY - timedelta(microseconds=1)]
    events = [generation_completed(user, started_at=at) for at in [*moments, midnight + 2 * DAY] for user in "ab"]
    await record(database, *events)

    def chosen(
        user: str | None = None, first: str | None = None, last: str | None = None
    ) -> list[tuple[str, datetime]]:
        scope = asked(user, first, last)
        return [(row["user_id"], row["created_at"]) for row in exported(ledger_url, file_format, scope)]

    assert chosen("a") == [("a", at) for at in [*moments, midnight + 2 * DAY]]
    assert chosen("a", "2026-11-22", "2026-11-23") == [("a", at) for at in moments[1:]]
    assert chosen("a", first="2026-11-24") == [("a", midnight + 2 * DAY)]
    assert chosen("b", last="2026-11-21") == [("b", moments[0])]
    assert chosen("b", "2026-11-22T13:00:00+01:00", "2026-11-22T12:00:00Z") == [("b", NOON)]
    assert len(chosen(first="2026-11-22", last="2026-11-22")) == 4
    assert chosen("nobody") == []


async def test_standard_output_takes_the_records_and_nothing_else(database: Database, ledger_url: str) -> None:
    await record(database, generation_completed())
    for arguments in (["--format", "ndjson"], ["--format", "ndjson", "--out", "-"]):
        status, body = told(ledger_url, *arguments)
        assert status == 0
        assert read_ndjson(body.encode()) == await ledger(database)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--format", "xml"], "'xml' is not one of 'csv', 'ndjson', 'parquet'"),
        (["--from", "yesterday"], "'yesterday' is neither a day, as 2026-11-30, nor a moment"),
        (["--to", "2026-02-30"], "'2026-02-30' is neither a day"),
        (["--to", "2026-11-30T12:00:00"], "neither a day"),  # of which time zone?
        (["--from", "0001-01-01T00:00:00+14:00"], "neither a day"),
        (["--to", ""], "neither a day"),
        (["--from", "2026-12-01", "--to", "2026-11-30"], "2026-12-01 is after --to, 2026-11-30"),
        (["--user", ""], "an empty name is nobody's"),
        (["--format", "parquet"], "Parquet is written to a file only"),
        (["--out", "/dev/null"], "'/dev/null' is there, and is not a file"),
        (["--out", ""], "the name is empty"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    status, said = told(f"sqlite:///{tmp_path / 'none.db'}", *arguments)
    assert status == 2
    assert sentence in said


def test_where_there_is_no_database_none_is_made(tmp_path: Path) -> None:
    ended = CliRunner().invoke(cli, ["export"], env={"CHATRAIL_DATA": str(tmp_path / "data")})
    assert ended.exit_code == 1
    assert ended.output == f"There is no database {tmp_path / 'data' / 'ledger.db'}\n"
    assert list(tmp_path.iterdir()) == []


async def test_a_database_that_an_older_release_left_is_told(
    database: Database, ledger_url: str, tmp_path: Path
) -> None:
    await database.write(do("ALTER TABLE usage DROP COLUMN on_disconnect"))
    status, said = told(ledger_url, "--out", str(tmp_path / "out.csv"))
    assert status == 1
    assert "python -m services.ledger migrate" in said
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("backend", ["postgresql"])
def test_a_database_without_a_ledger_is_told(database_url: str) -> None:
    status, said = told(database_url)
    assert status == 1
    assert 'relation "usage" does not exist' in said


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(Misconfigured, match="cannot be written: No such file or directory"),
        replacing(tmp_path / "no" / "out"),
    ):
        pass


NO_UTF_8 = "model = CAST(X'736563726574FF' AS TEXT)"


@pytest.mark.parametrize(
    ("file_format", "changed"),
    [
        *((each, NO_UTF_8) for each in Format),
        (Format.NDJSON, "metadata = 'a secret {'"),
        (Format.NDJSON, "tokens_used = X'736563726574'"),
        (Format.PARQUET, "created_at = 'a secret'"),
        (Format.PARQUET, "tokens_used = 'a secret'"),
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_record_that_somebody_changed_is_told_as_that_and_is_not_repeated(
    database: Database, ledger_url: str, file_format: Format, changed: str, tmp_path: Path
) -> None:
    await record(database, generation_completed())
    for statement in ("DROP TRIGGER usage_refuses_update", f"UPDATE usage SET {changed}"):  # noqa: S608
        await database.write(do(statement))
    status, said = told(ledger_url, "--format", file_format, "--out", str(tmp_path / "out"))
    assert status == 1
    assert "has a record that was changed, and cannot be read: make audit names it" in said
    assert (said.count("\n"), "secret" in said) == (1, False)
    assert not (tmp_path / "out").exists()


@FORMATS
async def test_an_export_that_breaks_off_leaves_what_was_there_and_nothing_else(
    database: Database, ledger_url: str, file_format: Format, tmp_path: Path
) -> None:
    await record(database, generation_completed())
    out = tmp_path / "exports" / "out"
    out.parent.mkdir()
    out.write_text("of yesterday")

    def interrupt(_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(out) as file, snapshot(ledger_url, store.usage) as db:
        export(db, Scope(), file_format, file, interrupt)

    assert [file.read_text() for file in out.parent.iterdir()] == ["of yesterday"]


async def test_an_export_replaces_the_file_that_a_link_names(
    database: Database, ledger_url: str, tmp_path: Path
) -> None:
    (tmp_path / "real").write_text("of yesterday")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    told(ledger_url, "--out", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text().startswith("id,")


@FORMATS
async def test_what_is_recorded_meanwhile_waits_for_no_export_and_is_not_in_it(
    database: Database, ledger_url: str, file_format: Format
) -> None:
    await fill(database, 1500)
    expected = await ledger(database)
    is_under_way, is_recorded = threading.Event(), threading.Event()

    def on_rows(_rows: int) -> None:
        is_under_way.set()
        assert is_recorded.wait(20)

    exporting = asyncio.create_task(asyncio.to_thread(exported, ledger_url, file_format, Scope(), on_rows))
    await asyncio.to_thread(is_under_way.wait, 20)
    await record(database, generation_completed(started_at=NOON + 300 * DAY))
    is_recorded.set()

    assert await exporting == expected
    assert len(await ledger(database)) == len(expected) + 1


async def fill(database: Database, number: int) -> None:
    """So many records, a second apart."""
    events = [generation_completed(f"user_{n % 7}", started_at=NOON + timedelta(seconds=n)) for n in range(number)]
    for first in range(0, number, 5000):
        await record(database, *events[first : first + 5000])


async def multiply(database: Database, times: int) -> None:
    """Each record so many times, under ids of its own."""
    columns = ", ".join("id || '-' || {n}" if name == "id" else name for name in COLUMNS)
    for n in range(1, times):
        statement = f"INSERT INTO usage ({', '.join(COLUMNS)}) SELECT {columns.format(n=n)} FROM usage"  # noqa: S608
        await database.write(do(f"{statement} WHERE length(id) = 36"))


# What is gathered before it is written is small enough here for both sizes to have it many times.
MEASURED = """\
import sys
from pathlib import Path
from services.ledger import export
from services.ledger.__main__ import cli

export.BATCH_ROWS, export.ROW_GROUP_ROWS = 100, 500
for file_format in export.Format:
    cli(["export", "--format", file_format, *sys.argv[1:]], standalone_mode=False)
print(Path("/proc/self/status").read_text())
"""


def peak_memory_mib(url: str, *arguments: str) -> float:
    """Of a process that exports to all formats."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    variables = environment(CHATRAIL_LEDGER_DATABASE_URL=url)
    said = subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, check=True, text=True).stdout
    (peak,) = (line.split()[1] for line in said.splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024 / MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process's memory")
async def test_memory_does_not_grow_with_the_ledger(database: Database, ledger_url: str, tmp_path: Path) -> None:
    await fill(database, 3000)
    await multiply(database, 10)
    out = tmp_path / "out"

    few_mib = peak_memory_mib(ledger_url, "--out", str(out), "--to", (NOON + timedelta(seconds=299)).isoformat())
    few = pyarrow.parquet.read_metadata(out).num_rows
    many_mib = peak_memory_mib(ledger_url, "--out", str(out))
    many = pyarrow.parquet.read_metadata(out).num_rows

    assert (few, many) == (3000, 30_000)
    assert many_mib < few_mib + 12


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_an_export_that_is_told_to_stop_leaves_no_file(
    database: Database, ledger_url: str, tmp_path: Path
) -> None:
    await fill(database, 5000)
    await multiply(database, 10)
    out = tmp_path / "exports" / "out.csv"
    out.parent.mkdir()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.ledger", "export", "--out", str(out)),
        cwd=PROJECT,
        env=environment(CHATRAIL_LEDGER_DATABASE_URL=ledger_url),
        stderr=subprocess.DEVNULL,
    )

    async def has_begun() -> bool:
        return any(out.parent.iterdir())

    await eventually(has_begun)
    process.send_signal(signal.SIGTERM)

    assert await asyncio.wait_for(process.wait(), 20) != 0
    assert list(out.parent.iterdir()) == []


def test_make_hands_on_what_it_was_told_and_not_whose_shell_it_is() -> None:
    def runs(*arguments: str) -> str:
        command = ["make", "--dry-run", "export", *arguments]
        said = subprocess.run(
            command, cwd=PROJECT, env=environment(USER="root"), capture_output=True, check=True, text=True
        )
        return said.stdout

    assert "--user" not in runs("OUT=ledger.csv")
    for user, quoted in {
        "o'hara & sons": r"'o'\''hara & sons'",
        '$(id) ${HOME} "#': """'$(id) ${HOME} "#'""",
    }.items():
        assert f"--user={quoted}" in runs("OUT=ledger.csv", f"USER={user}")
