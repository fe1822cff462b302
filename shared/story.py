"""The story of one generation, as record and quota tell it: asked, granted, held, given, settled, in which event."""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, JsonValue

from shared.calls import Counted, CountedIn, CountedStory, Given, OnRecord, OpenHold, Place, RecordedStory, View
from shared.events import Authorized
from shared.periods import plan_and_calendar
from shared.plans import Counts, Plans, weighted_tokens
from shared.subscriptions import Change, subscribed
from shared.terminal import printable

# Of a hold: it stands, or its time is over and nobody settled it. Of a record: quota has not counted it yet, or has.
State = Literal["under_way", "expired", "recorded", "settled"]


class Asked(View):
    """What the generation could take at most, by a bound of its input and what its caller asked for."""

    input_tokens_max: int
    output_tokens: int


class Granted(View):
    """The output that fitted, when, and by which limit of which plan: the tightest, as it was then."""

    output_tokens: int
    at: datetime
    tier: str
    limit: CountedIn


class Held(View):
    """As the plan weighed it. A hold ends with its settlement, or when it expires."""

    tokens: int
    expires_at: datetime
    is_open: bool


class Story(View):
    """What nobody knows is null: a report was not asked for here, and of older records it was not noted down."""

    id: str
    user_id: str
    state: State
    asked: Asked | None
    granted: Granted | None
    held: Held | None
    given: Given | None
    settled: Counted | None
    event: Place | None = Field(description="null until the ledger has recorded it")


def story(event_id: str, on_record: RecordedStory, at_quota: CountedStory) -> Story | None:
    """None where neither knows it."""
    record, hold = on_record.record, at_quota.hold
    user_id = record.user_id if record else at_quota.user_id
    if user_id is None:
        return None
    authorized, at = _authorized(record, hold)
    return Story(
        id=event_id,
        user_id=user_id,
        state=_state(record, at_quota),
        asked=authorized
        and Asked(input_tokens_max=authorized.input_tokens_max, output_tokens=authorized.output_tokens_asked),
        granted=authorized and at and _granted(authorized, at),
        held=_held(authorized, hold),
        given=record.given if record else None,
        settled=at_quota.settled,
        event=record.place if record else None,
    )


def _authorized(record: OnRecord | None, hold: OpenHold | None) -> tuple[Authorized | None, datetime | None]:
    """The record is proved: where there is one, it is what is told."""
    if record:
        return record.authorized, record.moment
    return (hold.authorized, hold.started_at) if hold else (None, None)


def _state(record: OnRecord | None, at_quota: CountedStory) -> State:
    if at_quota.settled:
        return "settled"
    if record:
        return "recorded"
    return "expired" if at_quota.hold and at_quota.hold.is_expired else "under_way"


def _granted(authorized: Authorized, at: datetime) -> Granted:
    limit = CountedIn(period=authorized.period, period_start=authorized.period_start, resets_at=authorized.resets_at)
    return Granted(output_tokens=authorized.output_tokens_granted, at=at, tier=authorized.tier, limit=limit)


def _held(authorized: Authorized | None, hold: OpenHold | None) -> Held | None:
    is_open = hold is not None and not hold.is_expired
    if authorized:
        return Held(tokens=authorized.hold_tokens, expires_at=authorized.expires_at, is_open=is_open)
    return None if hold is None else Held(tokens=hold.tokens, expires_at=hold.expires_at, is_open=is_open)


def counted(
    plans: Plans,
    changes: Iterable[Change],
    *,
    at: datetime,
    counts: Counts,
    model: str | None,
    top_up_tokens: int,
    is_late: bool,
) -> Counted:
    """What a settlement at that moment counts, under the plan that the user had then."""
    then = subscribed(change for change in changes if change.changed_at <= at)
    plan, calendar = plan_and_calendar(plans, then)
    periods = [(limit.period, calendar.period(at, plan, limit)) for limit in plan.limits]
    return Counted(
        counts_at=at,
        tokens_counted=weighted_tokens(plan.weights, [(model, counts)]),
        top_up_tokens=top_up_tokens,
        is_late=is_late,
        tier=plan.tier,
        counted_in=tuple(
            CountedIn(period=kind, period_start=period.end and period.start, resets_at=period.end)
            for kind, period in periods
        ),
    )


_STATES: dict[State, str] = {
    "under_way": "under way",
    "expired": "its hold has expired, and nobody has settled it",
    "recorded": "on record, and not counted by quota yet",
    "settled": "settled",
}


def in_words(told: Story) -> Iterator[str]:
    """For people, line by line."""
    return map(printable, _lines(told))


def _lines(told: Story) -> Iterator[str]:
    yield f"{told.id}, {told.user_id}: {_STATES[told.state]}"
    if told.asked:
        asked = told.asked
        yield f"  asked    at most {asked.input_tokens_max:,} tokens of input, and {asked.output_tokens:,} of output"
    if told.granted:
        granted = told.granted
        yield f"  granted  {granted.output_tokens:,} tokens of output, at {_moment(granted.at)}"
        yield f"           by the plan {granted.tier}, {_period(granted.limit)}"
    if told.held:
        now = "held now" if told.held.is_open else "held no longer"
        yield f"  held     {told.held.tokens:,} tokens, until {_moment(told.held.expires_at)} at most; {now}"
    if told.given:
        yield from _given(told.given)
    if told.settled:
        yield from _settled(told.settled)
    if told.event:
        yield from _event(told.event)


def _given(given: Given) -> Iterator[str]:
    parts = {
        "input": given.input_tokens,
        "written to the cache": given.cache_creation_input_tokens,
        "read from the cache": given.cache_read_input_tokens,
        "output": given.output_tokens,
    }
    split = ", ".join(f"{tokens:,} {name}" for name, tokens in parts.items() if tokens)
    yield f"  given    {given.tokens_used:,} tokens{f' ({split})' if split else ''}, as {given.action_type}"
    ended = [given.model, given.outcome, given.usage_source and f"counted: {given.usage_source}"]
    if words := ", ".join(word for word in ended if word):
        yield f"           {words}"
    if given.completed_at:
        yield f"           until {_moment(given.completed_at)}"
    if given.metadata:
        yield f"           {', '.join(f'{_shown(name)}: {_shown(value)}' for name, value in given.metadata.items())}"


def _settled(done: Counted) -> Iterator[str]:
    top_up = f", and a top-up of {done.top_up_tokens:,}" if done.top_up_tokens else ""
    late = ", late: its hold had expired" if done.is_late else ""
    plan = f"the plan {done.tier} of {_moment(done.counts_at)}"
    yield f"  settled  {done.tokens_counted:,} tokens{top_up}, by {plan}{late}"
    for period in done.counted_in:
        yield f"           {_period(period)}"


def _event(event: Place) -> Iterator[str]:
    if event.stream_sequence is None:
        yield f"  event    {event.type}, not sealed yet"
        return
    yield f"  event    {event.type}, message {event.stream_sequence:,} of the stream"
    yield f"           leaf {event.leaf_hash}"
    if seal := event.sealed_by:
        yield f"           sealed with the first {seal.tree_size:,} messages at {_moment(seal.sealed_at)}"
    else:
        yield "           not sealed yet"


def _period(period: CountedIn) -> str:
    if period.period_start is None or period.resets_at is None:
        return "without a period"
    return f"in the {period.period} from {_moment(period.period_start)} to {_moment(period.resets_at)}"


def _shown(fact: JsonValue) -> str:
    return fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False)


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
