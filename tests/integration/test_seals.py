"""The tamper evidence on real parts: sealed, told, written down, signed, proven, and found to be right or wrong."""

import asyncio
import json
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from nats.aio.client import Client
from sqlalchemy import Connection, make_url, select, text

from services.ledger import store, verify_record
from services.ledger.app import create_app
from services.ledger.checkpoint import Keys, load_keys
from services.ledger.merkle import Frontier, leaf_hash
from services.ledger.seal_check import seal_check
from services.ledger.seal_findings import Kind, Result
from services.ledger.seal_store import Damaged
from services.ledger.sealer import Sealer
from services.ledger.seals import event_id
from services.ledger.seals_file import read_outside
from services.ledger.settings import Settings
from services.ledger.store import leaves, seals
from services.ledger.verify_record import notes_in
from services.quota.app import create_app as create_quota
from services.quota.settings import Settings as QuotaSettings
from shared import streams
from shared.broker import connect
from shared.calls import ExplainQuery
from shared.database import Database, table_of
from shared.errors import Misconfigured, Unavailable
from shared.events import Event, decode_seal, encode
from shared.quarantine import Poison, Quarantined
from shared.recorded import Recorded, bounds, recorded
from shared.settings import sqlite_url
from tests import forked
from tests.builders import generation_completed, publish, publish_raw, subscription_changed, usage_reported
from tests.fixtures import MIB, broker_in, eventually, migrate
from tests.stack import environment

OFTEN_S = 0.05
SELDOM_S = 3600.0


@pytest.fixture
async def database(ledger_url: str) -> AsyncIterator[Database]:
    database = Database(ledger_url)
    yield database
    await database.close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return new_key(tmp_path / "seal.pem")


def new_key(path: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def public_key(key_file: Path) -> Path:
    signing = load_keys(key_file).signing
    assert signing
    path = key_file.with_suffix(".pub")
    path.write_bytes(signing.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.fixture
def settings(own_nats_server: str, ledger_url: str, tmp_path: Path, key_file: Path) -> Settings:
    return Settings(
        nats_url=own_nats_server,
        ledger_database_url=ledger_url,
        seal_every_s=OFTEN_S,
        seal_key_file=key_file,
        seals_file=tmp_path / "seals.txt",
    )


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[None]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield


async def handled(nats: Client, *, durable: str = streams.LEDGER) -> None:
    """As if the ledger had: every message that there is is acknowledged."""
    js = nats.jetstream()
    pulling = await js.pull_subscribe_bind(durable, streams.STREAM)
    # What was published a moment ago may not be counted as pending yet.
    last = (await js.stream_info(streams.STREAM)).state.last_seq
    while (floor := (await js.consumer_info(streams.STREAM, durable)).ack_floor) is None or floor.stream_seq < last:
        for message in await pulling.fetch(500, timeout=5):
            await message.ack_sync()
    await pulling.unsubscribe()


def sealer(nats: Client, database: Database, **changed: Any) -> Sealer:
    return Sealer(nats, database, **{"keys": Keys(None, {}), "every_s": 1e-9, **changed})


async def sealed(nats: Client, database: Database, *events: Event, **changed: Any) -> None:
    """One round of the sealer, after these events were handled."""
    await publish(nats, *events)
    await handled(nats)
    await sealer(nats, database, **changed).seal()


async def stored(nats: Client) -> list[Recorded]:
    first, last = await bounds(nats)
    return [message async for batch in recorded(nats, first=first, last=last) for message in batch]


async def announced(nats: Client) -> list[tuple[int, int]]:
    """Where on the stream which size was sealed."""
    messages = [message for message in await stored(nats) if message.subject == streams.LEDGER_SEALED]
    return [(message.sequence, decode_seal(message.body).data.tree_size) for message in messages]


async def kept(database: Database) -> list[int]:
    return list(
        await database.read(lambda db: db.execute(select(seals.c.tree_size).order_by("tree_size")).scalars().all())
    )


async def audited(nats: Client, url: str, **more: Any) -> Result:
    """As `make audit` does it: the database as it is, beside the whole stream."""
    _, known = await bounds(nats)
    with rows_of(url) as rows:
        check = seal_check(rows, known_up_to=known, **more)
        first, last = await bounds(nats)
        async for batch in recorded(nats, first=first, last=last):
            check.take(batch)
        return check.end()


@contextmanager
def rows_of(url: str) -> Iterator[Callable[..., Any]]:
    if url.startswith("sqlite"):
        lite = sqlite3.connect(make_url(url).database or "")
        try:
            yield lambda statement, *values: lite.execute(statement, values)
        finally:
            lite.close()
    else:
        with psycopg.connect(url) as connection:
            yield lambda statement, *values: connection.execute(statement.replace("?", "%s"), values)


def named(result: Result) -> list[tuple[Kind, int]]:
    return [(difference.kind, difference.sequence) for difference in result.differences]


async def test_a_running_ledger_seals_tells_and_writes_down_and_all_of_it_fits(
    settings: Settings, nats: Client, database: Database, ledger_url: str, key_file: Path
) -> None:
    events = [generation_completed(f"user_{n}") for n in range(20)]
    await publish(nats, *events)

    async def all_told() -> list[tuple[int, int]] | None:
        told = await announced(nats)
        return told if told and told[-1][1] >= 20 else None

    async with serving(settings):
        told = await eventually(all_told)
        last = told[-1][0]

        async def written() -> bool:
            assert settings.seals_file
            return len(list(read_outside(settings.seals_file))) == len(told)

        await eventually(written)

    result = await audited(nats, ledger_url, keys=load_keys(key_file), seals_file=settings.seals_file)
    assert result.differences == []
    assert (result.seals, result.signed, result.outside) == (len(told),) * 3
    frontier = Frontier()
    for message in (await stored(nats))[: told[-1][1]]:
        frontier.append(leaf_hash(message.body))
    last_seal = decode_seal((await stored(nats))[last - 1].body)
    assert last_seal.data.root_hash == frontier.root.hex()
    assert result.leaves == told[-1][1]


async def test_consumers_pass_a_seal_over(
    settings: Settings, nats: Client, database: Database, quota_url: str
) -> None:
    quota_settings = QuotaSettings(nats_url=settings.nats_url, quota_database_url=quota_url)
    quota_database = Database(quota_url)
    await publish(nats, generation_completed())
    quota = create_quota(quota_settings)
    async with serving(settings), quota.router.lifespan_context(quota):
        for durable in (streams.LEDGER, streams.QUOTA):

            async def seal_is_acknowledged(durable: str = durable) -> bool:
                floor = (await nats.jetstream().consumer_info(streams.STREAM, durable)).ack_floor
                return bool(floor and floor.stream_seq == 2)

            await eventually(seal_is_acknowledged)
    for each in (database, quota_database):
        assert await each.read(lambda db: db.execute(select(table_of(Quarantined))).all()) == []
    await quota_database.close()


async def test_an_idle_stream_comes_to_rest_and_the_next_event_seals_the_last_seal_too(
    nats: Client, database: Database
) -> None:
    await sealed(nats, database, generation_completed())
    for _ in range(3):
        await sealed(nats, database)
    assert await announced(nats) == [(2, 1)]
    await sealed(nats, database, generation_completed())
    assert await announced(nats) == [(2, 1), (4, 3)]


async def test_nothing_is_sealed_before_its_time_or_before_the_ledger_has_handled_it(
    nats: Client, database: Database
) -> None:
    await sealed(nats, database, generation_completed(), every_s=SELDOM_S)
    pause_s = await sealer(nats, database, every_s=SELDOM_S).seal()
    assert SELDOM_S - 60 < pause_s <= SELDOM_S
    await publish(nats, generation_completed())
    await sealer(nats, database).seal()
    assert await kept(database) == [1]
    await sealed(nats, database)
    assert await kept(database) == [1, 3]


async def test_replicas_seal_everything_once(
    nats: Client, database: Database, ledger_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "seals.txt"
    replicas = [sealer(nats, database, seals_file=file) for _ in range(4)]
    for _ in range(5):
        await publish(nats, *(generation_completed() for _ in range(30)))
        await handled(nats)
        done = await asyncio.gather(*(replica.seal() for replica in replicas), return_exceptions=True)
        assert all(isinstance(each, float | Unavailable) for each in done)
        await replicas[0].seal()
    told = [size for _, size in await announced(nats)]
    assert told == await kept(database)
    assert len(set(told)) == len(told)
    result = await audited(nats, ledger_url, seals_file=file)
    assert (result.differences, result.outside) == ([], len(told))


async def test_a_seal_that_was_not_told_when_the_process_died_is_told_by_the_next_once(
    nats: Client, database: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(_self: Sealer) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(Sealer, "_tell", dies)
        with pytest.raises(ConnectionError):
            await sealed(nats, database, generation_completed())
    assert (await announced(nats), await kept(database)) == ([], [1])
    await asyncio.gather(*(sealer(nats, database).seal() for _ in range(3)))
    assert await announced(nats) == [(2, 1)]
    assert (await audited(nats, ledger_url)).differences == []


async def test_a_ledger_that_was_lost_gets_leaves_and_seals_back_from_the_stream(
    nats: Client, database: Database, ledger_url: str, tmp_path: Path, key_file: Path
) -> None:
    keys = load_keys(key_file)
    for _ in range(4):
        await sealed(nats, database, *(generation_completed() for _ in range(5)), keys=keys)
    before = await database.read(lambda db: db.execute(select(seals).order_by("tree_size")).all())

    migrate(sqlite_url(tmp_path, "anew.db"), "ledger")
    anew = Database(sqlite_url(tmp_path, "anew.db"))
    for _ in range(2):  # the stream's last seal is behind what was handled, at first
        await sealer(nats, anew, keys=keys).seal()
        await handled(nats)
    after = await anew.read(lambda db: db.execute(select(seals).order_by("tree_size")).all())
    assert after[: len(before)] == before
    assert (await audited(nats, sqlite_url(tmp_path, "anew.db"), keys=keys)).differences == []
    await anew.close()


def run(db: Connection, statement: str) -> None:
    db.execute(text(statement))


def both_tables(db: Connection) -> list[Any]:
    return [*db.execute(select(leaves)), *db.execute(select(seals))]


async def test_both_tables_refuse_changes(nats: Client, database: Database) -> None:
    await sealed(nats, database, generation_completed(), generation_completed())
    before = await database.read(both_tables)
    for statement in (
        "UPDATE leaves SET event_id = 'another'",
        "DELETE FROM leaves WHERE stream_sequence = 1",
        "UPDATE seals SET key_id = 'another'",
        "DELETE FROM seals",
        "INSERT OR REPLACE INTO leaves SELECT stream_sequence, 'another', leaf_hash FROM leaves",
    ):
        with pytest.raises(Exception, match=r"append-only|syntax"):
            await database.write(run, statement)
    assert await database.read(both_tables) == before


async def unlocked(database: Database, *statements: str) -> None:
    """What somebody does who has all rights: the triggers go first."""

    def change(db: Connection) -> None:
        for table in ("leaves", "seals"):
            if db.dialect.name == "sqlite":
                for verb in ("update", "delete", "replace"):
                    db.execute(text(f"DROP TRIGGER IF EXISTS {table}_refuses_{verb}"))
            else:
                db.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
        for statement in statements:
            db.execute(text(statement))

    await database.write(change)


@asynccontextmanager
async def another_stream(folder: Path, messages: list[tuple[str, bytes]]) -> AsyncIterator[Client]:
    """The stream as somebody who has the broker's store would write it anew."""
    folder.mkdir()  # noqa: ASYNC240 - of a moment
    with broker_in(folder) as url:
        client = await connect(url, name="test")
        await streams.create(client.jetstream(), max_bytes=64 * MIB)
        for subject, body in messages:
            await publish_raw(client, body, subject=subject)
        yield client
        await client.close()


Change = Callable[[list[tuple[str, bytes]]], object]


def edit(messages: list[tuple[str, bytes]]) -> None:
    messages[3] = (messages[3][0], messages[3][1].replace(b"5282", b"5283"))


def insert_one(messages: list[tuple[str, bytes]]) -> None:
    messages.insert(3, (streams.GENERATION_COMPLETED, encode(generation_completed("somebody"))))


def delete(messages: list[tuple[str, bytes]]) -> None:
    del messages[3]


def swap(messages: list[tuple[str, bytes]]) -> None:
    messages[3], messages[4] = messages[4], messages[3]


def cut_three(messages: list[tuple[str, bytes]]) -> None:
    del messages[-3:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edit, [(Kind.EDITED, 4)]),
        (insert_one, [(Kind.INSERTED, 4)]),
        (delete, [(Kind.DELETED, 4)]),
        (swap, [(Kind.MOVED, 4)]),
        (cut_three, [(Kind.CUT, 11), (Kind.CUT, 12), (Kind.CUT, 13)]),
    ],
)
async def test_a_stream_that_was_written_anew_is_found_out_message_by_message(  # noqa: PLR0917 - fixtures
    change: Change,
    expected: list[tuple[Kind, int]],
    nats: Client,
    database: Database,
    ledger_url: str,
    tmp_path: Path,
) -> None:
    for _ in range(2):
        await sealed(nats, database, *(generation_completed() for _ in range(6)))
    await sealed(nats, database)
    ids = [event_id(message.body) for message in await stored(nats)]
    messages = [(message.subject, message.body) for message in (await stored(nats))[:13]]
    change(messages)
    async with another_stream(tmp_path / "another", messages) as other:
        result = await audited(other, ledger_url)
        assert named(result) == expected
        if change is not insert_one:
            assert [each.event_id for each in result.differences] == [ids[sequence - 1] for _, sequence in expected]


async def test_nothing_is_sealed_on_top_of_a_stream_that_was_written_anew(
    nats: Client, database: Database, tmp_path: Path
) -> None:
    await sealed(nats, database, *(generation_completed() for _ in range(3)))
    messages = [(message.subject, message.body) for message in await stored(nats)]
    edited = [*messages[:2], (messages[2][0], encode(generation_completed("somebody"))), *messages[2:]]
    for name, written in (("shorter", messages[:2]), ("edited", edited)):
        async with another_stream(tmp_path / name, written) as other:
            await handled(other)
            with pytest.raises(Damaged, match=r"ends at 2, and had 3|message 3 of the stream is not what it was"):
                await sealer(other, database).seal()
    assert await kept(database) == [3]


@pytest.mark.parametrize(
    ("statement", "expected", "damage"),
    [
        ("UPDATE leaves SET leaf_hash = {} WHERE stream_sequence = 2", [(Kind.LEAF_EDITED, 2)], None),
        ("DELETE FROM leaves WHERE stream_sequence = 2", [(Kind.LEAF_DELETED, 2)], None),
        (
            "DELETE FROM leaves WHERE stream_sequence > 5",
            [(Kind.LEAF_DELETED, n) for n in (6, 7, 8, 9)],
            "leaves end",
        ),
        ("UPDATE seals SET root_hash = {} WHERE tree_size = 4", [(Kind.SEAL_EDITED, 4), (Kind.SEAL_OTHER, 4)], None),
        (
            "UPDATE seals SET root_hash = {} WHERE tree_size = 9",
            [(Kind.SEAL_EDITED, 9), (Kind.SEAL_OTHER, 9)],
            "itself",
        ),
        ("DELETE FROM seals WHERE tree_size = 4", [(Kind.SEAL_UNKNOWN, 4)], None),
        ("UPDATE seals SET sealed_at = 'infinity' WHERE tree_size = 4", [(Kind.SEAL_OTHER, 4)], None),
        ("UPDATE seals SET sealed_at = 'infinity' WHERE tree_size = 9", [(Kind.SEAL_OTHER, 9)], "newest seal is"),
        ("UPDATE leaves SET event_id = 'another' WHERE stream_sequence = 2", [(Kind.LEAF_EDITED, 2)], None),
        ("INSERT INTO leaves VALUES (100000, 'another', {})", [(Kind.LEAF_STRAY, 100_000)], "leaf 10 is missing"),
        ("UPDATE leaves SET leaf_hash = 'no hash' WHERE stream_sequence = 2", [(Kind.LEAF_EDITED, 2)], None),
        ("INSERT INTO leaves VALUES (0, 'another', {})", [(Kind.LEAF_STRAY, 0)], None),
    ],
)
async def test_leaves_and_seals_that_were_changed_are_found_and_not_built_upon(  # noqa: PLR0917 - fixtures
    statement: str,
    expected: list[tuple[Kind, int]],
    damage: str | None,
    nats: Client,
    database: Database,
    ledger_url: str,
) -> None:
    for _ in range(2):
        await sealed(nats, database, *(generation_completed() for _ in range(4)))
    another = "zeroblob(32)" if ledger_url.startswith("sqlite") else "decode(repeat('00', 32), 'hex')"
    await unlocked(database, statement.format(another))
    assert sorted(named(await audited(nats, ledger_url))) == sorted(expected)
    if damage:
        with pytest.raises(Damaged, match=damage):
            await sealer(nats, database).seal()


async def test_a_leaf_that_somebody_added_behind_the_last_is_not_sealed(
    nats: Client, database: Database, ledger_url: str
) -> None:
    await sealed(nats, database, generation_completed())
    (size,) = await kept(database)
    another = "zeroblob(32)" if ledger_url.startswith("sqlite") else "decode(repeat('00', 32), 'hex')"
    await unlocked(database, f"INSERT INTO leaves VALUES ({size + 1}, 'another', {another})")  # noqa: S608
    await sealer(nats, database).seal()  # before the message with that number is handled
    await handled(nats)
    with pytest.raises(Damaged, match=f"message {size + 1} of the stream is not what it was"):
        await sealer(nats, database).seal()
    assert await kept(database) == [size]


@pytest.fixture
async def proven(settings: Settings, nats: Client, database: Database, tmp_path: Path) -> dict[str, Any]:
    """What `prove` writes of a user with three records among others, one of them not sealed yet."""
    more = {"keys": load_keys(settings.seal_key_file), "seals_file": settings.seals_file}
    mine: list[Event] = [generation_completed("me"), generation_completed("me"), subscription_changed("me")]
    others: list[Event] = [generation_completed(f"user_{n}") for n in range(8)]
    late = generation_completed("me")
    for event in (*mine, late):
        await database.write(store.record, [event])
    await sealed(nats, database, *others[:2], mine[0], mine[1], *others[2:], mine[2], **more)
    await publish(nats, late)
    status, said = await ledger(settings, "prove", "--user", "me", "--out", str(tmp_path / "proof.json"))
    assert (status, "Wrote 3 records" in said, "1 are not sealed yet" in said) == (0, True, True), said
    written: dict[str, Any] = json.loads((tmp_path / "proof.json").read_text())
    assert [record["record"].encode() for record in written["records"]] == [encode(event) for event in mine]
    return written


async def ledger(settings: Settings, *arguments: str) -> tuple[int | None, str]:
    variables = {"CHATRAIL_NATS_URL": settings.nats_url, "CHATRAIL_LEDGER_DATABASE_URL": settings.database_url}
    ended = await forked.run("services.ledger", *arguments, env=environment(**variables))
    return ended.status, ended.out


async def finished(*command: str, **more: Any) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, **more
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def verified(document: Any, folder: Path, *arguments: str | Path, bare: bool = True) -> tuple[int | None, str]:
    """By a copy of the program, alone in a folder, without any package unless told."""
    shutil.copy(verify_record.__file__, folder / "verify_record.py")
    (folder / "given.json").write_text(document if isinstance(document, str) else json.dumps(document))
    flags = ["-I", "-S"] if bare else ["-I"]
    return await finished(sys.executable, *flags, "verify_record.py", "given.json", *map(str, arguments), cwd=folder)


async def test_anybody_can_check_a_users_records_with_one_file_and_python_alone(
    proven: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    # Of nothing else could the program tell whether it is so.
    assert proven.keys() == {"format", "userId", "checkpoint", "records"}
    status, said = await verified(proven, tmp_path)
    assert (status, "3 records are as they were sealed" in said, "compared with nothing" in said) == (0, True, True)
    assert settings.seals_file
    assert settings.seal_key_file
    # Crashes leave lines that are cut off, and they say nothing of any checkpoint.
    (torn := tmp_path / "torn.txt").write_bytes(
        b"chatrail/usage\n1\n\n" + settings.seals_file.read_bytes() + b"chatrail/usage\n12\n\n\xe2"
    )
    status, said = await verified(proven, tmp_path, "--seals", torn)
    assert (status, "the file of checkpoints has it" in said) == (0, True), said
    # What others add to a note, each in a way of their own, takes nothing away from it.
    witnessed = proven | {"checkpoint": proven["checkpoint"] + f"— witness.example/1 {'AAAA' * 25}\n"}
    for proof in (proven, witnessed):
        status, said = await verified(proof, tmp_path, "--key", public_key(settings.seal_key_file), bare=False)
        assert (status, "the key has signed it" in said) == (0, True), said


async def test_the_signature_is_checked_by_openssl_where_the_package_is_missing(
    proven: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    assert settings.seal_key_file
    key = public_key(settings.seal_key_file)
    status, said = await verified(proven, tmp_path, "--key", key)
    assert status == 2
    commands = "\n".join(said.splitlines()[-2:])
    assert await finished("sh", "-c", commands, cwd=tmp_path) == (0, "Signature Verified Successfully\n")


def change_record(proof: dict[str, Any]) -> None:
    proof["records"][1]["record"] = proof["records"][1]["record"].replace("5282", "5283")


def change_index(proof: dict[str, Any]) -> None:
    proof["records"][1]["leafIndex"] -= 1


def change_path(proof: dict[str, Any]) -> None:
    proof["records"][0]["path"][1] = "00" * 32


def shorten_path(proof: dict[str, Any]) -> None:
    proof["records"][0]["path"].pop()


def change_root(proof: dict[str, Any]) -> None:
    origin, size, _, *rest = proof["checkpoint"].split("\n")
    proof["checkpoint"] = "\n".join([origin, size, "A" * 43 + "=", *rest])


def change_user(proof: dict[str, Any]) -> None:
    proof["userId"] = "somebody"


def leave_out_the_path(proof: dict[str, Any]) -> None:
    del proof["records"][0]["path"]


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize(
    "change",
    [change_record, change_index, change_path, shorten_path, change_root, change_user, leave_out_the_path],
)
async def test_a_proof_that_was_changed_proves_nothing(
    change: Callable[[dict[str, Any]], None], proven: dict[str, Any], tmp_path: Path
) -> None:
    change(proven)
    status, said = await verified(proven, tmp_path)
    assert (status, said.startswith("NOT PROVEN"), "Traceback" in said) == (1, True, False), said


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_checkpoint_that_is_not_the_operators_proves_nothing(
    proven: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    assert settings.seals_file
    assert settings.seal_key_file
    key, another = public_key(settings.seal_key_file), public_key(new_key(tmp_path / "another.pem"))
    origin, _, root, *rest = proven["checkpoint"].split("\n")
    resized = proven | {"checkpoint": "\n".join([origin, "12", root, *rest])}
    renamed = proven | {"checkpoint": proven["checkpoint"].replace(f"— {origin}", "— somebody/else")}
    unsigned = proven | {"checkpoint": proven["checkpoint"].partition("\n\n")[0] + "\n"}
    (elsewhere := tmp_path / "elsewhere.txt").write_text("\n".join([origin, "11", "A" * 43 + "=", ""]))
    (empty := tmp_path / "empty.txt").touch()
    for document, arguments in (
        (proven, ("--seals", elsewhere)),
        (proven, ("--seals", empty)),
        (resized, ("--seals", settings.seals_file)),
        (resized, ("--key", key)),
        (unsigned, ("--key", key)),
        (renamed, ("--key", key)),
        (proven, ("--key", another)),
        ("{", ()),
        ("[]", ()),
    ):
        status, said = await verified(document, tmp_path, *arguments, bare=False)
        assert (status, said.startswith("NOT PROVEN")) == (1, True), said


async def test_what_counted_is_proven_and_explained_and_not_what_was_set_aside_under_the_same_id(
    settings: Settings, nats: Client, database: Database, tmp_path: Path
) -> None:
    mine: list[Event] = [usage_reported("me"), usage_reported("me"), subscription_changed("me")]
    ids = (mine[0].id, mine[1].id, mine[1].id)
    unreadable, another, change = (
        event.model_copy(update={"id": each}) for each, event in zip(ids, others(), strict=True)
    )
    set_aside = [encode(unreadable).replace(b":7,", b":-5,"), encode(another)]
    # Nothing keeps a change of plan and a use from having one id: both count, each for its own user.
    for body in (set_aside[0], *map(encode, (change, *mine[:2])), set_aside[1]):
        await publish_raw(nats, body)
    await sealed(nats, database, mine[2])
    poison = [Poison("usage", body, "unreadable") for body in set_aside]
    await database.write(store.record, [change, *mine], poison)

    status, said = await ledger(settings, "prove", "--user", "me", "--out", str(tmp_path / "proof.json"))

    assert (status, "Wrote 3 records" in said) == (0, True), said
    document = json.loads((tmp_path / "proof.json").read_text())
    assert [record["record"].encode() for record in document["records"]] == [*map(encode, mine)]
    status, said = await verified(document, tmp_path)
    assert (status, "3 records are as they were sealed" in said) == (0, True), said
    told = await database.read(store.explain, ExplainQuery(event_id=mine[0].id))
    assert told.record
    assert told.record.place.leaf_hash == leaf_hash(encode(mine[0])).hex()


def others() -> list[Event]:
    return [usage_reported("other_user", tokens_used=7), usage_reported("other_user"), subscription_changed("you")]


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_what_cannot_be_proven_is_said_in_a_sentence(
    settings: Settings, nats: Client, database: Database, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "proof.json")]
    assert (await ledger(settings, "prove", "--user", "me", *out))[1].startswith("Nothing is sealed yet")
    await database.write(store.record, [event := generation_completed("me")])
    await sealed(nats, database, event)
    for arguments in (["--user", "you"], ["--user", "me", "--id", "none"]):
        status, said = await ledger(settings, "prove", *arguments, *out)
        assert (status, said.count("\n"), "has no" in said) == (1, 1, True), said
    await unlocked(database, "UPDATE leaves SET leaf_hash = zeroblob(32)")
    status, said = await ledger(settings, "prove", "--user", "me", *out)
    assert (status, "Message 1 is not what was sealed" in said) == (1, True)
    await unlocked(database, "UPDATE seals SET sealed_at = 'never'")
    status, said = await ledger(settings, "prove", "--user", "me", *out)
    assert (status, said.count("\n"), "make audit tells" in said) == (1, 1, True), said


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n"])
async def test_a_key_that_cannot_be_used_stops_the_start_with_a_sentence_that_does_not_repeat_it(
    content: bytes | None, settings: Settings, tmp_path: Path
) -> None:
    (file := tmp_path / "bad.pem").write_bytes(content or b"")
    if content is None:
        file.unlink()
    with pytest.raises(Misconfigured, match="CHATRAIL_SEAL_KEY_FILE") as problem:
        create_app(settings.model_copy(update={"seal_key_file": file}))
    assert "secret" not in str(problem.value)
    assert settings.seal_key_file
    with pytest.raises(Misconfigured, match="no private key"):
        create_app(settings.model_copy(update={"seal_key_file": public_key(settings.seal_key_file)}))
    with pytest.raises(Misconfigured, match="CHATRAIL_SEALS_FILE"):
        create_app(settings.model_copy(update={"seals_file": tmp_path / "missing" / "seals.txt"}))


async def test_a_new_key_seals_at_once_and_the_one_before_is_still_believed(
    nats: Client, database: Database, ledger_url: str, key_file: Path, tmp_path: Path
) -> None:
    await sealed(nats, database, generation_completed(), keys=load_keys(key_file))
    await handled(nats)
    newer = new_key(tmp_path / "newer.pem")
    newer.write_bytes(newer.read_bytes() + public_key(key_file).read_bytes())
    keys = load_keys(newer)
    for _ in range(3):
        await sealer(nats, database, keys=keys, every_s=SELDOM_S).seal()
        await handled(nats)
    assert await kept(database) == [1, 2]
    result = await audited(nats, ledger_url, keys=keys)
    assert (result.differences, result.signed) == ([], 2)
    lonely = await audited(nats, ledger_url, keys=load_keys(new_key(tmp_path / "newest.pem")))
    assert [kind for kind, _ in named(lonely)] == [Kind.SIGNATURE, Kind.SIGNATURE]


async def test_what_the_file_outside_lacks_is_written_behind_what_a_crash_left(
    nats: Client, database: Database, ledger_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "seals.txt"
    for _ in range(3):
        await sealed(nats, database, generation_completed(), seals_file=file)
    whole = file.read_text()
    for left in (0, 20, len(whole) // 2, len(whole) - 1, len(whole)):
        file.write_text(whole[:left])
        await sealed(nats, database, seals_file=file)
        result = await audited(nats, ledger_url, seals_file=file)
        assert (result.differences, result.outside) == ([], 3)


async def test_a_file_outside_that_was_taken_away_is_written_again_as_a_whole(
    nats: Client, database: Database, ledger_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "seals.txt"
    writing = sealer(nats, database, seals_file=file)
    for _ in range(3):
        await publish(nats, generation_completed())
        await handled(nats)
        await writing.seal()
        file.rename(tmp_path / "taken")
    await writing.seal()
    result = await audited(nats, ledger_url, seals_file=file)
    assert (result.differences, result.outside) == ([], result.seals)


async def test_heads_that_replicas_wrote_twice_still_fit(
    nats: Client, database: Database, ledger_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "seals.txt"
    for _ in range(4):
        await sealed(nats, database, generation_completed(), seals_file=file)
    first, second, *others = (f"{note}\n\n" for note in notes_in(file.read_text().splitlines(keepends=True)))
    file.write_text("".join((first, first, second, *others, second, *others)))
    assert (await audited(nats, ledger_url, seals_file=file)).differences == []
