"""A story in words, for people: what is known is said, and nothing else."""

from datetime import timedelta
from typing import Any

from shared.calls import CountedStory, Given, OnRecord, OpenHold, Place, RecordedStory, SealedBy
from shared.plans import Counts, Plans
from shared.story import counted, in_words, story
from shared.subscriptions import Change
from tests.builders import NOON, authorized

UNKNOWN_TO_LEDGER = RecordedStory(record=None)
UNKNOWN_TO_QUOTA = CountedStory(user_id=None, hold=None, settled=None)


def on_record(sequence: int | None = 7, *, is_sealed: bool = True, **given: Any) -> RecordedStory:
    usual = dict.fromkeys(Given.model_fields) | {
        "action_type": "chat_generation",
        "model": "claude-haiku-4-5",
        "input_tokens": 100,
        "output_tokens": 20,
        "cache_read_input_tokens": 3_000,
        "tokens_used": 3_120,
        "outcome": "completed",
        "usage_source": "provider",
        "completed_at": NOON,
        "metadata": {},
    }
    seal = SealedBy(tree_size=9, root_hash="00", sealed_at=NOON, key_id=None)
    place = Place(
        id="g",
        type="generation.completed",
        stream_sequence=sequence,
        leaf_hash=sequence and "ff",
        sealed_by=seal if is_sealed else None,
    )
    record = OnRecord(
        user_id="user_1",
        moment=NOON,
        authorized=authorized(output_tokens_granted=96, hold_tokens=4_096),
        given=Given.model_validate(usual | given),
        place=place,
    )
    return RecordedStory(record=record)


def at_quota(*, is_late: bool = False, tier: str = "free", top_up_tokens: int = 0) -> CountedStory:
    done = counted(
        Plans.load(),
        [Change(NOON, "e", tier, None)],
        at=NOON,
        counts=Counts(3_120, 100, 20, 0, 3_000),
        model=None,
        top_up_tokens=top_up_tokens,
        is_late=is_late,
    )
    return CountedStory(user_id="user_1", hold=None, settled=done)


def held(*, is_expired: bool = False) -> CountedStory:
    hold = OpenHold(
        user_id="user_1",
        tokens=4_096,
        started_at=NOON,
        expires_at=NOON + timedelta(minutes=15),
        is_expired=is_expired,
        authorized=authorized(hold_tokens=4_096),
    )
    return CountedStory(user_id="user_1", hold=hold, settled=None)


def words(recorded: RecordedStory, counts: CountedStory) -> list[str]:
    told = story("g", recorded, counts)
    assert told
    return list(in_words(told))


def test_a_settled_generation_is_told_from_beginning_to_end() -> None:
    assert words(on_record(metadata={"conversationId": "c"}), at_quota()) == [
        "g, user_1: settled",
        "  asked    at most 4,000 tokens of input, and 4,096 of output",
        "  granted  96 tokens of output, at 2026-11-22 12:00:00 UTC",
        "           by the plan free, in the month from 2026-11-01 00:00:00 UTC to 2026-12-01 00:00:00 UTC",
        "  held     4,096 tokens, until 2026-11-22 12:15:00 UTC at most; held no longer",
        "  given    3,120 tokens (100 input, 3,000 read from the cache, 20 output), as chat_generation",
        "           claude-haiku-4-5, completed, counted: provider",
        "           until 2026-11-22 12:00:00 UTC",
        "           conversationId: c",
        "  settled  3,120 tokens, by the plan free of 2026-11-22 12:00:00 UTC",
        "           in the month from 2026-11-01 00:00:00 UTC to 2026-12-01 00:00:00 UTC",
        "  event    generation.completed, message 7 of the stream",
        "           leaf ff",
        "           sealed with the first 9 messages at 2026-11-22 12:00:00 UTC",
    ]


def test_what_a_reporter_noted_stays_on_its_line_and_is_not_obeyed() -> None:
    noted = {"a\nb": "\x1b[2J\x9b1mü 🛤\u2028", "more": [1.5, None, {"c": "\t"}]}
    assert '           a\\nb: \\x1b[2J\\x9b1mü 🛤\\u2028, more: [1.5, null, {"c": "\\t"}]' in words(
        on_record(metadata=noted), at_quota()
    )


def test_of_one_under_way_nothing_is_told_that_has_not_happened() -> None:
    told = words(UNKNOWN_TO_LEDGER, held())
    assert told[0] == "g, user_1: under way"
    assert told[-1] == "  held     4,096 tokens, until 2026-11-22 12:15:00 UTC at most; held now"
    assert len(told) == 5


def test_a_hold_that_ran_out_is_told_as_such() -> None:
    told = words(UNKNOWN_TO_LEDGER, held(is_expired=True))
    assert told[0] == "g, user_1: its hold has expired, and nobody has settled it"
    assert told[-1].endswith("held no longer")


def test_what_is_not_sealed_yet_is_told_as_such() -> None:
    assert words(on_record(None, is_sealed=False), held())[-1] == "  event    generation.completed, not sealed yet"
    told = words(on_record(is_sealed=False), held())
    assert (told[0], told[-1]) == ("g, user_1: on record, and not counted by quota yet", "           not sealed yet")


def test_what_came_late_and_what_was_topped_up_are_told() -> None:
    assert any(line.endswith(", late: its hold had expired") for line in words(on_record(), at_quota(is_late=True)))
    topped_up = words(on_record(), at_quota(top_up_tokens=5_000))
    assert any("tokens, and a top-up of 5,000, by the plan" in line for line in topped_up)


def test_a_plan_that_is_gone_from_the_file_is_the_default_one() -> None:
    told = words(on_record(), at_quota(tier="discontinued"))
    assert any("settled" in line and "by the plan free" in line for line in told)


def test_of_what_neither_knows_there_is_no_story() -> None:
    assert story("g", UNKNOWN_TO_LEDGER, UNKNOWN_TO_QUOTA) is None
