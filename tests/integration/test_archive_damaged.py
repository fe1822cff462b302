"""Whatever was changed in an archive, or is gone from it, is named; nothing is trimmed or made of it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.ledger import trim as trimming
from services.ledger.archive import altered, archive
from services.ledger.checkpoint import load_keys
from services.ledger.sealer import Sealer
from services.ledger.snapshots import snapshot
from shared import streams
from shared.archive import Archive, Manifest, sha256_of, writing
from shared.errors import Misconfigured
from shared.recorded import Recorded, bounds
from tests.builders import publish
from tests.integration import test_archive
from tests.integration.test_archive import OVERLAP, Archiving, archived_and_trimmed, grown_old, some_events, stored
from tests.integration.test_seals import new_key

system = test_archive.system  # a fixture here, too


class Damage:
    """What somebody may do to an archive's file, and how it is named."""

    def __init__(self, folder: Path) -> None:
        self.archive = Archive.at(folder)
        (self.manifest,) = self.archive.manifests
        self.path = self.archive.path(self.manifest)

    def messages(self) -> list[Recorded]:
        return [message for batch in self.archive.read(first=1, last=10**9) for message in batch]

    def rewrite(self, messages: list[Recorded], *, is_covered_up: bool = False) -> None:
        with self.path.open("wb") as out, writing(out) as add:
            add(messages)
        if is_covered_up:
            told = {"sha256": sha256_of(self.path), "size_bytes": self.path.stat().st_size}
            text = self.manifest.model_copy(update=told).model_dump_json(by_alias=True)
            self.path.with_suffix(".json").write_text(text)


def edited(damage: Damage) -> None:
    first, second, *rest = damage.messages()
    damage.rewrite([first, second._replace(body=second.body.replace(b"5282", b"5283")), *rest])


def edited_and_covered_up(damage: Damage) -> None:
    first, second, *rest = damage.messages()
    damage.rewrite([first, second._replace(body=second.body.replace(b"5282", b"5283")), *rest], is_covered_up=True)


def reordered(damage: Damage) -> None:
    first, second, third, *rest = damage.messages()
    damage.rewrite([first, third, second, *rest], is_covered_up=True)


def moved(damage: Damage) -> None:
    first, second, third, *rest = damage.messages()
    damage.rewrite([first, third._replace(sequence=2), second._replace(sequence=3), *rest], is_covered_up=True)


def shortened(damage: Damage) -> None:
    damage.rewrite(damage.messages()[:-1], is_covered_up=True)


def truncated(damage: Damage) -> None:
    damage.path.write_bytes(damage.path.read_bytes()[:-100])


def another_bit(damage: Damage) -> None:
    content = bytearray(damage.path.read_bytes())
    content[len(content) // 3] ^= 1
    damage.path.write_bytes(content)


def missing(damage: Damage) -> None:
    damage.path.unlink()


def another_root(damage: Damage) -> None:
    told = damage.manifest.checkpoint.splitlines()
    told[2] = "A" * 43 + "="
    manifest = damage.manifest.model_copy(update={"checkpoint": "\n".join([*told, ""])})
    damage.path.with_suffix(".json").write_text(manifest.model_dump_json(by_alias=True))


def of_another_kind(damage: Damage) -> None:
    """A usage event that is to be passed over as a seal is."""
    first, second, *rest = damage.messages()
    damage.rewrite([first, second._replace(subject=streams.LEDGER_SEALED), *rest], is_covered_up=True)


def no_seal(damage: Damage) -> None:
    """A seal that is to be read as an event."""
    changed = [
        each._replace(subject=streams.USAGE_ADJUSTED) if each.subject == streams.LEDGER_SEALED else each
        for each in damage.messages()
    ]
    damage.rewrite(changed, is_covered_up=True)


def tells(**fields: Any) -> Callable[[Damage], None]:
    """A manifest that says something else of a file which is as it was."""

    def changed(damage: Damage) -> None:
        manifest = damage.manifest.model_copy(update=fields)
        damage.path.with_suffix(".json").write_text(manifest.model_dump_json(by_alias=True))

    changed.__name__ = f"tells_another_{'_'.join(fields)}"
    return changed


DAMAGES = [
    edited,
    edited_and_covered_up,
    reordered,
    moved,
    shortened,
    truncated,
    another_bit,
    missing,
    another_root,
    tells(last_stored_at=datetime.now(UTC) + timedelta(minutes=12)),
    tells(first_stored_at=datetime(2026, 1, 1, tzinfo=UTC)),
    tells(stream="OTHER"),
    tells(size_bytes=5),
]
# Only who reads every message again finds these.
COVERED_UP = (edited_and_covered_up, moved, another_root)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_an_archive_that_was_changed_is_named_and_nothing_is_trimmed(
    system: Archiving, damage: Callable[[Damage], None]
) -> None:
    await system.happened(*some_events())
    await grown_old(system)
    await system.happened(*some_events())
    await system.archive()
    assert (await system.audit()).agrees
    damage(file := Damage(system.folder))

    found = await system.audit()

    assert {difference.kind for difference in found.differences} == {"archive"}
    assert file.path.name in found.words
    assert "\n  \n" not in found.words
    assert "null" not in found.words
    sequences = {difference.expected.get("sequence") for difference in found.differences if difference.expected}
    if damage in (edited, edited_and_covered_up):
        assert 2 in sequences
    elif damage in (reordered, moved):
        assert {2, 3} <= sequences
    with pytest.raises(
        Misconfigured, match=f"{file.path.name} is not {'there' if damage is missing else 'what was sealed'}"
    ):
        await system.trim()
    assert (await bounds(system.nats))[0] == 1
    if damage not in COVERED_UP:
        with pytest.raises(Misconfigured, match=f"{file.path.name} .*[Rr]estore"):
            await system.archive()
    # Nobody needs it while the stream has all.
    await system.replay()


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_no_manifest_makes_a_trim_delete_what_is_not_archived(
    system: Archiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where nobody has compared it with its file: the stream itself is asked."""

    async def finds_nothing(*_: Any, **__: Any) -> list[Any]:
        return []

    await system.happened(*some_events())
    await system.archive()
    await system.happened(*some_events())
    await grown_old(system)
    await system.happened(*some_events())
    everything = await stored(system.nats)
    tells(last_stored_at=datetime.now(UTC) + OVERLAP - timedelta(seconds=0.2))(Damage(system.folder))
    monkeypatch.setattr(trimming, "altered", finds_nothing)
    monkeypatch.setattr(Archive, "check", lambda *_: None)

    with pytest.raises(Misconfigured, match=r"The archive's last message, 6, was stored at .* by the stream, and at"):
        await system.trim()

    assert await stored(system.nats) == everything


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_head_of_a_file_is_signed_as_seals_are_and_no_other_signature_will_do(
    system: Archiving, tmp_path: Path
) -> None:
    keys, others = (load_keys(new_key(tmp_path / name)) for name in ("seal.pem", "other.pem"))
    await publish(system.nats, *some_events())
    await system.deliver()
    await Sealer(system.nats, system.ledger, keys=keys, every_s=1e-9).seal()
    with snapshot(streams.LEDGER, system.urls.ledger_url, ("leaves", "seals")) as ledger:
        (manifest,), _ = await archive(
            system.nats, ledger.rows, system.folder, before=datetime.now(UTC), keys=keys, advance=lambda _: None
        )
        path = system.folder / manifest.name
        unsigned = manifest.model_copy(update={"checkpoint": "".join(manifest.checkpoint.partition("=\n")[:2])})

        assert "— chatrail/usage " in manifest.checkpoint
        assert await altered(path, manifest, ledger.rows, before=None, keys=keys) == []
        for told, believed in ((manifest, others), (unsigned, keys)):
            found = await altered(path, told, ledger.rows, before=None, keys=believed)
            assert [each.expected for each in found] == [
                "a signature by a key that is believed",
                "a manifest signed by a key that is believed",
            ]

        # What is in no leaf: subjects, headers, times. The file's digest in the manifest holds them.
        damage = Damage(system.folder)
        first, *rest = damage.messages()
        damage.rewrite([first._replace(headers={"Other": "1"}), *rest], is_covered_up=True)
        for stripped in ({}, {"signature": None}, {"signature": None, "key_id": None}):
            (told,) = Archive.at(system.folder).manifests
            told = told.model_copy(update=stripped)
            found = await altered(path, told, ledger.rows, before=None, keys=keys)
            assert [each.expected for each in found] == ["a manifest signed by a key that is believed"]
        with pytest.raises(Misconfigured, match="Seals are signed, and manifests are to be, too"):
            await archive(
                system.nats,
                ledger.rows,
                tmp_path / "other",
                before=datetime.now(UTC),
                keys=None,
                advance=lambda _: None,
            )


@pytest.mark.parametrize("damage", [edited, truncated, another_bit, missing])
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_nothing_is_read_from_an_archive_that_was_changed(
    system: Archiving, damage: Callable[[Damage], None]
) -> None:
    await archived_and_trimmed(system)
    before = await system.figures()
    damage(file := Damage(system.folder))
    with pytest.raises(Misconfigured, match=f"{file.path.name}.*Restore it|{file.path.name}.*restore it"):
        await system.replay()
    assert await system.figures() == before


@pytest.mark.parametrize("damage", [edited_and_covered_up, reordered, moved])
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_of_trimmed_messages_that_were_changed_with_their_manifest_the_audit_tells(
    system: Archiving, damage: Callable[[Damage], None]
) -> None:
    await archived_and_trimmed(system)
    damage(Damage(system.folder))
    found = await system.audit()
    named = {(difference.where, difference.kind) for difference in found.differences}
    assert any(where.startswith("archive usage-0") and kind == "archive" for where, kind in named)
    assert any(where.startswith("evidence, message ") and kind == "broken" for where, kind in named)


@pytest.mark.parametrize("damage", [of_another_kind, no_seal])
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_message_is_what_its_content_says_and_not_what_somebody_made_of_its_subject(
    system: Archiving, damage: Callable[[Damage], None]
) -> None:
    await archived_and_trimmed(system)
    before = await system.figures()
    damage(Damage(system.folder))

    found = await system.audit()

    # Of the services' records, which are right, nothing is said.
    assert {difference.kind for difference in found.differences} == {"archive"}
    assert any("subject" in str(difference.expected) for difference in found.differences)
    with pytest.raises(Misconfigured, match=r"its subject is .*, and its content is not"):
        await system.replay()
    assert await system.figures() == before


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_what_is_neither_archived_nor_on_the_stream_is_named(system: Archiving) -> None:
    await system.happened(*some_events())
    await system.archive()
    await archived_and_trimmed(system)
    begins = (await bounds(system.nats))[0]
    first, second = Archive.at(system.folder).manifests

    def takes_away(manifest: Manifest) -> None:
        for suffix in (".json", ".parquet"):
            path = (system.folder / manifest.name).with_suffix(suffix)
            path.rename(path.with_name(f"away-{path.name}"))

    takes_away(second)
    for asked in (system.replay, system.audit, system.trim):
        with pytest.raises(Misconfigured, match=f"Messages 7 to {begins - 1} are neither on the stream nor in"):
            await asked()
    with pytest.raises(Misconfigured, match=f"Messages 7 to {begins - 1} are neither on the stream nor in"):
        await system.archive()
    takes_away(first)
    with pytest.raises(Misconfigured, match=f"Messages 1 to {begins - 1} are neither .*CHATRAIL_ARCHIVE"):
        await system.replay()
    (system.folder / f"away-{second.name}").rename(system.folder / second.name)
    json_name = second.name.replace(".parquet", ".json")
    (system.folder / f"away-{json_name}").rename(system.folder / json_name)
    with pytest.raises(Misconfigured, match="lacks messages 1 to 6: restore the files"):
        await system.replay()


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_archive_of_another_stream_is_refused(system: Archiving) -> None:
    await archived_and_trimmed(system)
    for path in system.folder.glob("*.json"):
        manifest = Manifest.model_validate_json(path.read_bytes())
        for told in ({}, {"last": 5}):  # as it is, and too short for this stream
            other = {"stream_created": manifest.stream_created - timedelta(days=1), **told}
            path.write_text(manifest.model_copy(update=other).model_dump_json(by_alias=True))
            for asked in (system.replay, system.archive, system.trim, system.audit):
                with pytest.raises(Misconfigured, match="is of another stream"):
                    await asked()


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_a_stream_whose_joint_with_the_archive_does_not_fit_is_not_read(system: Archiving) -> None:
    await archived_and_trimmed(system)
    damage, begins = Damage(system.folder), (await bounds(system.nats))[0]
    damage.rewrite(
        [each._replace(body=b"other") if each.sequence == begins else each for each in damage.messages()],
        is_covered_up=True,
    )
    with pytest.raises(
        Misconfigured, match=f"Message {begins} is one thing on the stream and another in the archive"
    ):
        await system.replay()
