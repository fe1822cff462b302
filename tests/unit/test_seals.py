"""Whatever is done to the record is found and named, by leaves and seals alone: no broker, no database."""

import base64
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.checkpoint import Keys, Signature, checkpoint
from services.ledger.merkle import Frontier, Head, leaf_hash
from services.ledger.seal_check import SealCheck
from services.ledger.seal_findings import Kind, Result
from services.ledger.seals import Leaf, Sealed, event_id
from services.ledger.seals_file import read_outside
from services.ledger.verify_record import Checkpoint, key_id, read_checkpoint
from shared import streams
from shared.database import iso
from shared.events import LedgerSealed, Seal, encode
from shared.recorded import Recorded
from tests.builders import NOON, generation_completed

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEYS = Keys(PRIVATE, {key_id(PRIVATE.public_key().public_bytes_raw()): PRIVATE.public_key()})


class Record:
    """A stream of `size` messages, its leaves and its seals: one after `every` messages, each told on the stream."""

    def __init__(self, size: int, *, every: int = 7, keys: Keys | None = None) -> None:
        self.messages: list[Recorded] = []
        self.seals: list[Sealed] = []
        frontier = Frontier()
        while len(self.messages) < size:
            n = len(self.messages)
            if n and n % every == 0 and self.last_sealed != n:
                head = Head(n, frontier.root)
                seal = Sealed(head, tuple(frontier.subtrees), iso(NOON), keys.sign(head) if keys else None)
                self.seals.append(seal)
                self.append(streams.LEDGER_SEALED, announcement(seal), frontier)
            else:
                self.append(streams.GENERATION_COMPLETED, encode(generation_completed(f"user_{n}")), frontier)
        self.leaves = [leaf_of(message) for message in self.messages]

    @property
    def last_sealed(self) -> int:
        return self.seals[-1].head.size if self.seals else 0

    def append(self, subject: str, body: bytes, frontier: Frontier | None = None) -> None:
        self.messages.append(Recorded(len(self.messages) + 1, subject, body, NOON))
        if frontier:
            frontier.append(leaf_hash(body))

    def check(
        self,
        *,
        keys: Keys | None = None,
        outside: Sequence[Checkpoint | str] = (),
        outside_up_to: int = 0,
        known_up_to: int | None = None,
    ) -> Result:
        check = SealCheck(
            leaves=self.leaves,
            sealed_up_to=self.last_sealed,
            seals=self.seals,
            outside=outside,
            outside_up_to=outside_up_to,
            keys=keys,
            known_up_to=len(self.messages) if known_up_to is None else known_up_to,
        )
        for start in range(0, len(self.messages), 5):
            check.take(self.messages[start : start + 5])
        return check.end()

    def numbered_anew(self) -> None:
        """As a stream that is written anew has it: no number is left out."""
        self.messages = [message._replace(sequence=n) for n, message in enumerate(self.messages, 1)]


def leaf_of(message: Recorded) -> Leaf:
    return Leaf(message.sequence, event_id(message.body), leaf_hash(message.body))


def announcement(seal: Sealed) -> bytes:
    signature = seal.signature
    data = Seal(
        tree_size=seal.head.size,
        root_hash=seal.head.root.hex(),
        sealed_at=NOON,
        signature=base64.b64encode(signature.signature).decode() if signature else None,
        key_id=signature.key_id if signature else None,
    )
    return encode(LedgerSealed(data=data))


def outside(record: Record) -> list[Checkpoint]:
    return [read_checkpoint(checkpoint(seal.head, seal.signature)) for seal in record.seals]


def edited(message: Recorded) -> Recorded:
    return message._replace(body=message.body.replace(b"5282", b"5283").replace(b"2026", b"2027"))


def named(result: Result) -> list[tuple[Kind, int]]:
    return [(difference.kind, difference.sequence) for difference in result.differences]


SIZES = st.integers(1, 60)


@given(SIZES, st.booleans())
def test_what_nobody_touched_is_as_it_was_sealed(size: int, is_signed: bool) -> None:
    keys = KEYS if is_signed else None
    record = Record(size, keys=keys)
    result = record.check(keys=keys, outside=outside(record), outside_up_to=record.last_sealed)
    assert result.differences == []
    assert (result.leaves, result.seals, result.outside) == (size, len(record.seals), len(record.seals))
    assert result.signed == (len(record.seals) if is_signed else 0)


@given(SIZES, st.integers(0, 20))
def test_what_has_no_leaf_yet_is_not_held_against_anybody(size: int, leaves: int) -> None:
    record = Record(size)
    record.leaves = record.leaves[: max(leaves, record.last_sealed)]
    assert record.check().differences == []


@given(st.data())
def test_a_message_that_was_edited_is_named(data: st.DataObject) -> None:
    record = Record(data.draw(SIZES))
    place = data.draw(st.integers(0, len(record.messages) - 1))
    expected = record.leaves[place]
    record.messages[place] = edited(record.messages[place])
    result = record.check()
    (difference,) = [each for each in result.differences if each.kind == Kind.EDITED]
    assert (difference.sequence, difference.event_id) == (place + 1, expected.event_id)
    assert {kind for kind, _ in named(result)} <= {Kind.EDITED, Kind.SEAL_OTHER}


@given(st.data(), st.booleans())
def test_messages_that_were_deleted_are_each_named_whether_numbers_are_missing_or_not(
    data: st.DataObject, is_numbered_anew: bool
) -> None:
    record = Record(data.draw(SIZES) + 1)
    places = data.draw(st.sets(st.integers(0, len(record.messages) - 2), min_size=1, max_size=4))
    record.messages = [message for place, message in enumerate(record.messages) if place not in places]
    if is_numbered_anew:
        record.numbered_anew()
    result = record.check()
    told = [difference for difference in result.differences if difference.kind == Kind.DELETED]
    assert [difference.sequence for difference in told] == sorted(place + 1 for place in places)
    assert [difference.event_id for difference in told] == [record.leaves[place].event_id for place in sorted(places)]
    assert {kind for kind, _ in named(result)} <= {Kind.DELETED, Kind.SEAL_UNANNOUNCED}


@given(st.data())
def test_a_message_that_was_inserted_is_named(data: st.DataObject) -> None:
    record = Record(data.draw(SIZES))
    place = data.draw(st.integers(0, len(record.messages) - 1))
    strange = encode(generation_completed("somebody"))
    record.messages.insert(place, Recorded(0, streams.GENERATION_COMPLETED, strange, NOON))
    record.numbered_anew()
    result = record.check()
    assert named(result) == [(Kind.INSERTED, place + 1)]
    assert result.differences[0].event_id == event_id(strange)


@given(st.data())
def test_two_messages_that_changed_places_are_named(data: st.DataObject) -> None:
    record = Record(data.draw(SIZES) + 1, every=100)
    one, other = sorted(
        data.draw(st.lists(st.integers(0, len(record.messages) - 1), min_size=2, max_size=2, unique=True))
    )
    record.messages[one], record.messages[other] = record.messages[other], record.messages[one]
    record.numbered_anew()
    result = record.check()
    assert {kind for kind, _ in named(result)} == {Kind.MOVED}
    assert {sequence for _, sequence in named(result)} & {one + 1, other + 1}
    assert len(result.differences) <= 2


@given(st.data())
def test_a_tail_that_was_cut_off_is_named_message_by_message(data: st.DataObject) -> None:
    record = Record(data.draw(SIZES) + 1)
    left = data.draw(st.integers(1, len(record.messages) - 1))
    cut = [(Kind.CUT, sequence) for sequence in range(left + 1, len(record.messages) + 1)]
    record.messages = record.messages[:left]
    assert named(record.check()) == cut


@given(st.data())
def test_a_leaf_that_was_edited_is_told_apart_from_a_message_that_was(data: st.DataObject) -> None:
    record = Record(data.draw(st.integers(8, 60)))
    place = data.draw(st.integers(0, record.last_sealed - 1))
    record.leaves[place] = record.leaves[place]._replace(hash=leaf_hash(b"another"))
    assert named(record.check()) == [(Kind.LEAF_EDITED, place + 1)]


@given(st.data())
def test_leaves_that_were_deleted_are_named(data: st.DataObject) -> None:
    record = Record(data.draw(st.integers(8, 60)))
    record.leaves = record.leaves[: record.last_sealed]
    places = data.draw(st.sets(st.integers(0, len(record.leaves) - 1), min_size=1, max_size=5))
    record.leaves = [leaf for place, leaf in enumerate(record.leaves) if place not in places]
    assert named(record.check()) == [(Kind.LEAF_DELETED, place + 1) for place in sorted(places)]


OF_LEAVES = {Kind.LEAF_EDITED, Kind.LEAF_DELETED, Kind.LEAF_INSERTED, Kind.LEAF_MOVED}
Rewritten = tuple[Kind, set[int]]


def moved_on(leaves: Sequence[Leaf]) -> list[Leaf]:
    """As somebody writes them who leaves no number out."""
    return [leaf._replace(sequence=n) for n, leaf in enumerate(leaves, 1)]


def swap_leaves(record: Record, place: int, _data: st.DataObject) -> Rewritten:
    one, other = record.leaves[place : place + 2]
    record.leaves[place : place + 2] = [other._replace(sequence=place + 1), one._replace(sequence=place + 2)]
    return Kind.LEAF_MOVED, {place + 1, place + 2}


def swap_hashes(record: Record, place: int, _data: st.DataObject) -> Rewritten:
    one, other = record.leaves[place : place + 2]
    record.leaves[place : place + 2] = [one._replace(hash=other.hash), other._replace(hash=one.hash)]
    return Kind.LEAF_MOVED, {place + 1, place + 2}


def move_leaf(record: Record, place: int, data: st.DataObject) -> Rewritten:
    """Those between move up or down, also past seals."""
    to = data.draw(st.integers(0, record.last_sealed - 1).filter(lambda to: to != place))
    record.leaves.insert(to, record.leaves.pop(place))
    record.leaves = moved_on(record.leaves)
    # Of neighbours either was moved.
    return Kind.LEAF_MOVED, {place + 1, to + 1} if abs(place - to) == 1 else {place + 1}


def delete_leaves(record: Record, place: int, data: st.DataObject) -> Rewritten:
    number = min(data.draw(st.integers(1, 4)), record.last_sealed - place)
    del record.leaves[place : place + number]
    record.leaves = moved_on(record.leaves)
    return Kind.LEAF_DELETED, {*range(place + 1, place + number + 1)}


def insert_leaves(record: Record, place: int, data: st.DataObject) -> Rewritten:
    number = min(data.draw(st.integers(1, 4)), record.last_sealed - place)
    record.leaves[place:place] = [Leaf(0, f"strange_{n}", leaf_hash(b"%d" % n)) for n in range(number)]
    record.leaves = moved_on(record.leaves)
    return Kind.LEAF_INSERTED, {*range(place + 1, place + number + 1)}


def edit_leaf(record: Record, place: int, _data: st.DataObject) -> Rewritten:
    record.leaves[place] = record.leaves[place]._replace(hash=leaf_hash(b"another"))
    return Kind.LEAF_EDITED, {place + 1}


REWRITTEN = [swap_leaves, swap_hashes, move_leaf, delete_leaves, insert_leaves, edit_leaf]


def sealed_over(record: Record, seal: Sealed) -> Sealed:
    """The seal as it would be of the leaves as they are now."""
    frontier = Frontier()
    for leaf in record.leaves[: seal.head.size]:
        frontier.append(leaf.hash or b"")
    return seal._replace(head=Head(seal.head.size, frontier.root), subtrees=tuple(frontier.subtrees))


@pytest.mark.parametrize("change", REWRITTEN)
@given(data=st.data())
def test_leaves_that_were_written_anew_are_named_and_no_message_is(
    change: Callable[[Record, int, st.DataObject], Rewritten], data: st.DataObject
) -> None:
    """Nor a seal, nor the file outside: all of them fit the messages."""
    keys = data.draw(st.sampled_from([None, KEYS]))
    record = Record(data.draw(st.integers(10, 60)), keys=keys)
    published = outside(record) if data.draw(st.booleans()) else []
    if data.draw(st.booleans()):
        record.leaves = record.leaves[: record.last_sealed]
    kind, places = change(record, data.draw(st.integers(0, record.last_sealed - 2)), data)
    result = record.check(keys=keys, outside=published)
    told = [sequence for each, sequence in named(result) if each == kind]
    assert {*told} <= places
    assert told if kind == Kind.LEAF_MOVED else {*told} == places
    assert {each for each, _ in named(result)} <= ({kind, Kind.LEAF_EDITED} if change == swap_hashes else {kind})
    assert {sequence for _, sequence in named(result)} <= places
    assert result.signed == (len(record.seals) if keys else 0)


@pytest.mark.parametrize("change", REWRITTEN)
@given(data=st.data())
def test_leaves_that_were_written_anew_together_with_their_seals_are_named_and_no_message_is(
    change: Callable[[Record, int, st.DataObject], Rewritten], data: st.DataObject
) -> None:
    """One seal, or all that there are; also where only the root is another, and the tree in it is not."""
    keys = data.draw(st.sampled_from([None, KEYS]))
    record = Record(data.draw(st.integers(10, 60)), keys=keys)
    published = outside(record) if data.draw(st.booleans()) else []
    kind, places = change(record, data.draw(st.integers(0, record.last_sealed - 2)), data)
    over = [n for n, seal in enumerate(record.seals) if seal.head.size >= min(places)]
    changed = data.draw(st.sampled_from([over[:1], over]))
    for n in changed:
        seal = sealed_over(record, record.seals[n])
        is_whole = data.draw(st.booleans())
        record.seals[n] = seal if is_whole else seal._replace(subtrees=record.seals[n].subtrees)
    result = record.check(keys=keys, outside=published)
    of_seals = {Kind.SEAL_EDITED, Kind.SEAL_OTHER, Kind.SEAL_SUBTREES, Kind.SIGNATURE}
    assert {each for each, _ in named(result)} <= OF_LEAVES | of_seals
    assert {sequence for each, sequence in named(result) if each == kind} <= places
    assert {sequence for each, sequence in named(result) if each in OF_LEAVES} & places
    assert {sequence for each, sequence in named(result) if each in of_seals} <= {
        record.seals[n].head.size for n in changed
    }


@pytest.mark.parametrize("is_told", [True, False])
def test_nobody_is_accused_where_two_say_this_and_two_say_that(is_told: bool) -> None:
    """Leaf and newest seal against message and the seal's event, which has no leaf yet; a signature decides."""
    record = Record(8, keys=KEYS)
    record.leaves = record.leaves[: record.last_sealed]
    record.leaves[3] = record.leaves[3]._replace(hash=leaf_hash(b"another"))
    record.seals[-1] = sealed_over(record, record.seals[-1])
    kinds = {kind for kind, _ in named(record.check(keys=KEYS if is_told else None))}
    decided = {Kind.LEAF_EDITED, Kind.SEAL_EDITED, Kind.SIGNATURE}
    assert kinds == {Kind.SEAL_OTHER} | (decided if is_told else {Kind.UNDECIDED})


def test_nobody_is_accused_where_leaves_and_messages_are_too_far_apart_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.ledger.seal_check.APART_MAX", 3)
    record = Record(60)
    record.leaves, all_leaves = record.leaves[: record.last_sealed], record.leaves
    assert record.check().differences == []
    record.leaves = all_leaves
    del record.leaves[10:15]
    record.leaves = moved_on(record.leaves)
    assert named(record.check()) == [(Kind.UNDECIDED, sequence) for sequence in range(11, 16)]


@given(st.data(), st.sampled_from([None, KEYS]))
def test_a_message_and_a_leaf_that_were_changed_are_told_apart_in_one_record(
    data: st.DataObject, keys: Keys | None
) -> None:
    """Below two seals, each with a verdict of its own."""
    record = Record(data.draw(st.integers(24, 60)), keys=keys)
    sizes = [0, *(seal.head.size for seal in record.seals)]
    one, other = data.draw(st.lists(st.integers(0, len(sizes) - 3), min_size=2, max_size=2, unique=True))
    message = data.draw(st.integers(sizes[one], sizes[one + 1] - 1))
    record.messages[message] = edited(record.messages[message])
    place = data.draw(st.integers(sizes[other], sizes[other + 1] - 1))
    edit_leaf(record, place, data)
    told = [difference for difference in named(record.check(keys=keys)) if difference[0] != Kind.SEAL_OTHER]
    assert sorted(told) == sorted([(Kind.EDITED, message + 1), (Kind.LEAF_EDITED, place + 1)])


@given(st.data(), st.booleans())
def test_leaves_of_no_message_are_named_and_nothing_else(data: st.DataObject, is_being_written: bool) -> None:
    """Also while the last messages have no leaves yet."""
    record = Record(data.draw(st.integers(8, 60)))
    size = len(record.leaves)
    if is_being_written:
        record.leaves = record.leaves[: record.last_sealed]
    strays = data.draw(st.sets(st.integers(-5, 0) | st.integers(size + 2, 2**62), min_size=1, max_size=3))
    record.leaves += [Leaf(stray, None, leaf_hash(b"stray")) for stray in strays]
    record.leaves.sort(key=lambda leaf: leaf.sequence)
    assert named(record.check()) == [(Kind.LEAF_STRAY, stray) for stray in sorted(strays)]


@given(st.data())
def test_a_leaf_that_tells_of_another_event_is_named(data: st.DataObject) -> None:
    record = Record(data.draw(st.integers(8, 60)))
    place = data.draw(st.integers(0, len(record.leaves) - 1))
    told = data.draw(st.sampled_from([None, "", "another", record.leaves[place - 1].event_id]))
    record.leaves[place] = record.leaves[place]._replace(event_id=told)
    assert named(record.check()) == [(Kind.LEAF_EDITED, place + 1)]


@given(st.data())
def test_a_message_that_was_changed_together_with_its_leaf_is_found_by_the_seals(data: st.DataObject) -> None:
    record = Record(data.draw(st.integers(16, 60)))
    place = data.draw(st.integers(0, record.seals[-2].head.size - 1))
    record.messages[place] = edited(record.messages[place])
    record.leaves[place] = leaf_of(record.messages[place])
    result = record.check()
    sizes = [seal.head.size for seal in record.seals]
    over = next(size for size in sizes if size > place)
    assert (Kind.REWRITTEN, over) in named(result)
    assert {kind for kind, _ in named(result)} <= {Kind.REWRITTEN, Kind.SEAL_OTHER}


def resealed(record: Record) -> None:
    """All of it written anew, seals and what the stream says of them: no contradiction is left inside."""
    frontier, seals = Frontier(), {seal.head.size: seal for seal in record.seals}
    record.seals = []
    for n, message in enumerate(record.messages):
        body = message.body
        if message.subject == streams.LEDGER_SEALED and record.seals[-1].head != seals[record.last_sealed].head:
            body = announcement(record.seals[-1])
        record.messages[n] = message._replace(body=body)
        frontier.append(leaf_hash(body))
        if frontier.size in seals:
            head = Head(frontier.size, frontier.root)
            record.seals.append(seals[frontier.size]._replace(head=head, subtrees=tuple(frontier.subtrees)))
    record.leaves = [leaf_of(message) for message in record.messages]


@given(st.data())
def test_a_record_that_was_written_anew_altogether_is_found_by_signatures_and_by_the_file_outside(
    data: st.DataObject,
) -> None:
    record = Record(data.draw(st.integers(8, 60)), keys=KEYS)
    published = outside(record)
    events = [place for place in range(record.last_sealed) if record.messages[place].subject != streams.LEDGER_SEALED]
    place = data.draw(st.sampled_from(events))
    record.messages[place] = edited(record.messages[place])
    resealed(record)
    over = next(seal.head.size for seal in record.seals if seal.head.size > place)
    assert named(record.check()) == []
    assert (Kind.SIGNATURE, over) in named(record.check(keys=KEYS))
    assert (Kind.OUTSIDE, over) in named(record.check(outside=published))


@given(st.data())
def test_whatever_the_file_outside_lacks_is_named_but_for_what_may_be_on_its_way(data: st.DataObject) -> None:
    record = Record(data.draw(st.integers(8, 60)))
    published = outside(record)
    taken = data.draw(st.sets(st.integers(0, len(published) - 1), min_size=1))
    left = [head for n, head in enumerate(published) if n not in taken]
    due = data.draw(st.sampled_from(record.seals)).head.size
    # A file that several replicas wrote to may tell of a seal twice, also later.
    result = record.check(outside=[*left, *left], outside_up_to=due)
    lacking = [published[n].tree_size for n in sorted(taken) if published[n].tree_size <= due]
    assert named(result) == [(Kind.OUTSIDE_LACKS, size) for size in lacking]


def test_a_record_that_was_cut_back_altogether_is_found_by_the_file_outside() -> None:
    record, shorter = Record(40), Record(0)
    published = outside(record)
    shorter.messages, shorter.leaves = record.messages[:20], record.leaves[:20]
    shorter.seals = [seal for seal in record.seals if seal.head.size <= 20]
    assert named(shorter.check()) == []
    (difference,) = shorter.check(outside=published).differences
    assert (difference.kind, difference.sequence, difference.found) == (Kind.OUTSIDE, 21, "only 20 leaves")


@pytest.mark.parametrize("change", ["root", "root and subtrees", "time"])
def test_a_seal_that_was_edited_is_named_and_the_others_still_fit(change: str) -> None:
    record = Record(40)
    seal = record.seals[2]
    root = leaf_hash(b"another")
    if change == "time":
        record.seals[2] = seal._replace(sealed_at=iso(datetime(2026, 1, 1, tzinfo=UTC)))
        expected = {(Kind.SEAL_OTHER, seal.head.size)}
    else:
        subtrees = seal.subtrees if change == "root" else (root,)
        record.seals[2] = seal._replace(head=Head(seal.head.size, root), subtrees=subtrees)
        expected = {(Kind.SEAL_OTHER, seal.head.size), (Kind.SEAL_EDITED, seal.head.size)}
    assert set(named(record.check())) == expected


def test_a_seal_that_was_taken_out_of_the_ledger_is_named() -> None:
    record = Record(40)
    size = record.seals.pop(2).head.size
    assert named(record.check()) == [(Kind.SEAL_UNKNOWN, size)]


def test_a_seal_that_came_onto_the_stream_after_the_ledger_was_read_is_not_missed() -> None:
    record = Record(23)
    record.seals.pop()
    assert record.check(known_up_to=21).differences == []
    assert named(record.check(known_up_to=22)) == [(Kind.SEAL_UNKNOWN, 21)]


def test_what_is_no_seal_on_the_seals_subject_is_named() -> None:
    record = Record(40)
    record.append(streams.LEDGER_SEALED, encode(generation_completed()))
    assert named(record.check()) == [(Kind.SEAL_UNKNOWN, 41)]


def test_the_last_seal_that_the_stream_does_not_have_yet_is_waited_for() -> None:
    record = Record(21)
    frontier = Frontier()
    for leaf in record.leaves:
        frontier.append(leaf.hash or b"")
    record.seals.append(Sealed(Head(21, frontier.root), tuple(frontier.subtrees), iso(NOON), None))
    assert record.check().differences == []


def signed_by_another(seal: Sealed) -> Signature:
    stranger = Ed25519PrivateKey.generate()
    public: Ed25519PublicKey = stranger.public_key()
    signature = Keys(stranger, {key_id(public.public_bytes_raw()): public}).sign(seal.head)
    assert signature
    return signature


def spoiled(seal: Sealed) -> Signature:
    assert seal.signature
    return seal.signature._replace(signature=seal.signature.signature[::-1])


def removed(_seal: Sealed) -> None:
    return None


@pytest.mark.parametrize("change", [signed_by_another, spoiled, removed])
def test_a_signature_that_is_not_right_is_named(change: Callable[[Sealed], Signature | None]) -> None:
    record = Record(40, keys=KEYS)
    seal = record.seals[2]
    record.seals[2] = seal._replace(signature=change(seal))
    assert (Kind.SIGNATURE, seal.head.size) in named(record.check(keys=KEYS))


def test_with_a_key_seals_without_any_signature_are_not_believed() -> None:
    assert [kind for kind, _ in named(Record(40).check(keys=KEYS))] == [Kind.UNSIGNED]


def test_very_many_differences_are_counted_and_the_first_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.ledger.seal_findings.DIFFERENCES_MAX", 10)
    record = Record(60)
    record.messages = [edited(message) for message in record.messages]
    result = record.check()
    assert len(result.differences) < 60
    assert result.more > 0


def test_a_long_stretch_that_was_deleted_is_named_though_nothing_near_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.ledger.seal_check.LOOKAHEAD", 8)
    record = Record(60, every=100)
    record.messages = [*record.messages[:20], *record.messages[50:]]
    assert [sequence for kind, sequence in named(record.check()) if kind == Kind.DELETED] == list(range(21, 51))


@given(SIZES)
def test_the_file_outside_is_read_as_it_was_written_also_behind_what_a_crash_cut_off(size: int) -> None:
    record = Record(size + 8, keys=KEYS)
    notes = [checkpoint(seal.head, seal.signature) for seal in record.seals]
    torn = [note[: 1 + (size * 31) % (len(note) - 1)] for note in notes]
    text = "".join(f"{part}\n\n{note}\n" for part, note in zip(torn, notes, strict=True))
    assert outside_of(text) == outside(record)
    broken = outside_of(text.replace(notes[0], notes[0].replace("A", "-")))
    assert "A" not in notes[0] or any(isinstance(each, str) for each in broken)


@given(st.data())
def test_what_a_crash_left_of_the_newest_head_is_told_as_that_and_nothing_else_is(data: st.DataObject) -> None:
    record = Record(data.draw(st.integers(8, 60)), keys=KEYS)
    *whole, newest = (checkpoint(seal.head, seal.signature) for seal in record.seals)
    before = [0, *(seal.head.size for seal in record.seals)][-2]
    written = "".join(f"{note}\n" for note in whole).encode()
    torn = newest.encode()[: data.draw(st.integers(1, len(newest) - 1))]

    def checked(end: bytes) -> Result:
        return record.check(keys=KEYS, outside=outside_of(written + end), outside_up_to=before)

    result = checked(torn)
    assert result.differences == []
    # Of a line's end nobody needs to know, and the head is there without its signature, too.
    text = newest.partition("\n\n")[0]
    is_there = torn.decode(errors="replace").strip("\n") in (text, newest.strip("\n"))
    assert result.outside_up_to == (record.last_sealed if is_there else before)
    assert result.is_outside_torn != is_there
    # No seal is of so many messages.
    assert named(checked(b"chatrail/usage\n0")) == [(Kind.OUTSIDE, len(record.messages))]


def outside_of(content: str | bytes) -> list[Checkpoint | str]:
    with TemporaryDirectory() as folder:
        (file := Path(folder) / "seals.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_outside(file))
