"""What a generation is said to have used, at each of its steps, whatever the provider does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chat.metering import NOTHING, Held, Meter
from shared.events import Outcome, TokenCounts

COUNT = st.integers(0, 10_000)
COUNTS = st.builds(
    TokenCounts,
    input_tokens=COUNT,
    output_tokens=COUNT,
    cache_creation_input_tokens=COUNT,
    cache_read_input_tokens=COUNT,
)
HELD = st.builds(Held, st.integers(1, 5_000), st.integers(1, 5_000))
OUTCOMES: list[Outcome] = ["completed", "disconnected", "provider_error", "interrupted"]
# What a provider may do, in any order and any number, sensible or not.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("started"), COUNTS),
        st.tuples(st.just("wrote"), st.text(st.characters(exclude_categories=["Cs"]), max_size=200)),
        st.tuples(st.just("counted"), COUNTS),
    ),
    max_size=8,
)


def metered(held: Held, steps: list[tuple[str, object]], *, estimate: int = 10) -> Meter:
    """A meter after these steps, none of which is the provider's last word."""
    meter = Meter(input_tokens_estimate=estimate)
    meter.asked(held)
    for name, value in steps:
        if name == "counted":
            assert isinstance(value, TokenCounts)
            meter.counted(value, is_last=False)
        else:
            getattr(meter, name)(value)
    return meter


@given(HELD, STEPS, st.integers(1, 10_000))
def test_what_a_process_leaves_that_dies_is_never_nothing_and_never_above_the_hold(
    held: Held, steps: list[tuple[str, object]], estimate: int
) -> None:
    for died_after in range(len(steps) + 1):
        left = metered(held, steps[:died_after], estimate=estimate).counts("interrupted")
        assert 0 < left.total <= held.tokens
        assert left.output_tokens <= held.output_tokens_max


@given(HELD, STEPS, COUNTS)
def test_the_input_that_the_provider_named_is_kept_where_the_hold_has_room_for_it(
    room: Held, steps: list[tuple[str, object]], named: TokenCounts
) -> None:
    inputs = named.model_copy(update={"output_tokens": 0, "input_tokens": named.input_tokens + 1})
    held = Held(inputs.total + room.input_tokens_max, room.output_tokens_max)
    texts = [step for step in steps if step[0] == "wrote"]
    for outcome in OUTCOMES:
        counts = metered(held, [("started", inputs), *texts]).counts(outcome)
        assert counts.model_copy(update={"output_tokens": 0}) == inputs


@given(HELD, STEPS, COUNTS, st.sampled_from(OUTCOMES))
def test_the_providers_last_count_is_the_truth_whatever_came_before_it_and_whatever_was_held(
    held: Held, steps: list[tuple[str, object]], last: TokenCounts, outcome: Outcome
) -> None:
    meter = metered(held, steps)
    meter.counted(last, is_last=True)
    assert (meter.counts(outcome), meter.source) == (last, "provider")
    meter = metered(held, [*steps, ("counted", last)])
    assert meter.source == "estimated"
    meter.ended()
    assert (meter.counts(outcome), meter.source) == (last, "provider")


@pytest.mark.parametrize(
    ("first", "text_bytes", "counted", "source"),
    [
        (TokenCounts(input_tokens=9, output_tokens=50), 28, 59, "provider"),
        (TokenCounts(input_tokens=9, output_tokens=50, cache_read_input_tokens=3), 28, 62, "provider"),
        (TokenCounts(input_tokens=9, output_tokens=50), 800, 59, "provider"),
        (TokenCounts(input_tokens=9, output_tokens=0), 0, 9, "provider"),
        (TokenCounts(input_tokens=9, output_tokens=50), 801, 9 + 201, "estimated"),
        (TokenCounts(input_tokens=9, output_tokens=1), 400, 9 + 100, "estimated"),
        (TokenCounts(output_tokens=50), 400, 10 + 100, "estimated"),
        (None, 400, 10 + 100, "estimated"),
    ],
)
def test_a_count_that_came_with_the_first_word_alone_stands_unless_it_is_a_placeholder(
    first: TokenCounts | None, text_bytes: int, counted: int, source: str
) -> None:
    meter = metered(Held(5_000, 5_000), [("started", first)] if first else [])
    meter.wrote("x" * text_bytes)
    assert meter.source == "estimated"
    meter.ended()
    assert (meter.counts("completed").total, meter.source) == (counted, source)


@given(HELD, STEPS)
def test_an_answer_that_ends_without_a_count_is_estimated(held: Held, steps: list[tuple[str, object]]) -> None:
    meter = metered(held, [step for step in steps if step[0] == "wrote"])
    meter.ended()
    assert meter.source == "estimated"
    assert meter.counts("completed").total > 0


@given(HELD)
def test_before_claude_is_asked_and_where_it_gave_nothing_nothing_was_used(held: Held) -> None:
    meter = Meter(input_tokens_estimate=10)
    assert (meter.counts("interrupted"), meter.source) == (NOTHING, "estimated")
    meter.asked(held)
    meter.gave_nothing()
    assert (meter.counts("provider_error"), meter.source) == (NOTHING, "provider")


def test_a_count_on_the_way_is_a_floor_and_text_that_came_after_it_adds() -> None:
    meter = metered(Held(100, 100), [("started", TokenCounts(input_tokens=7, output_tokens=1)), ("wrote", "x" * 40)])
    assert meter.counts("interrupted") == TokenCounts(input_tokens=7, output_tokens=10)
    meter.counted(TokenCounts(input_tokens=7, output_tokens=20), is_last=False)
    assert meter.counts("interrupted") == TokenCounts(input_tokens=7, output_tokens=20)
    meter.wrote("x" * 60)
    assert meter.counts("interrupted") == TokenCounts(input_tokens=7, output_tokens=25)
