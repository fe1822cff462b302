"""How chat asks quota, with a quota that behaves as no real one does on demand."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from sqlalchemy.exc import OperationalError

from services.chat import deadline
from services.chat.applied import applied
from services.chat.claude import Claude, Prompt
from services.chat.deadline import Deadline
from services.chat.generation import Generation, Parts, Policies, is_doubtful
from services.chat.metering import Held
from services.chat.outbox import Outbox
from services.chat.problems import Problem
from services.chat.publisher import Publisher
from services.chat.quota import Quota
from shared import calls
from shared.answering import Answering, Call
from shared.calls import Authorization, Authorize, Granted, Refused, UsageAnswer, UsageQuery
from shared.database import CommitUnknown
from shared.errors import Unanswered, Unavailable
from shared.events import GenerationCompleted, decode, new_id
from tests.builders import NOON, usage_reported
from tests.fixtures import eventually
from tests.people import rows
from tests.unit.test_claude import answer as answered
from tests.unit.test_claude import provider, refusal
from tests.unit.test_quota_domain import account

PROMPT = Prompt("claude-haiku-4-5", [{"role": "user", "content": "Hello"}], None, 1_000)
REFUSED = Refused(reason="tokens", tokens_available=0, retry_after_s=60, usage=account(108_000).usage)
GRANTED = Granted(output_tokens_max=1_000, started_at=NOON)


@pytest.fixture
async def claude() -> AsyncIterator[Claude]:
    claude = Claude(api_key="simulated", base_url="http://127.0.0.1:9")
    yield claude
    await claude.close()


async def answering(nats: Client, *answers: Authorization | None) -> list[Authorize]:
    """Quota gives these answers, one after the other; None is a question that it keeps to itself."""
    heard: list[Authorize] = []

    async def answer(message: Msg) -> None:
        heard.append(Authorize.model_validate_json(message.data))
        if given := answers[len(heard) - 1]:
            await message.respond(given.model_dump_json().encode())

    await nats.subscribe(calls.AUTHORIZE, cb=answer)
    return heard


def counted(input_tokens: int) -> bytes:
    return answered(200, "application/json", json.dumps({"input_tokens": input_tokens}))


async def nobody_left() -> bool:
    return False


async def test_who_waits_until_quota_has_applied_something_stops_in_time(
    nats: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Now and then the time is up in the very moment of an answer: among so many it is.
    monkeypatch.setattr(deadline, "WITHIN_S", deadline.MOMENT_S)
    async with asyncio.timeout(30):
        for _ in range(20):
            await asyncio.gather(*(applied(nats, 10**9, Deadline()) for _ in range(100)))


async def test_a_question_without_an_answer_is_asked_again_with_the_same_id(nats: Client, claude: Claude) -> None:
    heard = await answering(nats, None, GRANTED)
    asked = Quota(nats).authorize(claude, PROMPT, generation_id="g", user_id="user_1", has_left=nobody_left)
    assert await asked == (GRANTED, Held(PROMPT.input_tokens_max, 1_000))
    assert [question.generation_id for question in heard] == ["g", "g"]


# Of what remains another answer holds all. By its bytes the question is longer than that, by its count it is not.
LEFT = Refused(reason="tokens", tokens_available=0, retry_after_s=60, usage=account(107_000).usage)
LONG = replace(PROMPT, messages=[{"role": "user", "content": "words " * 200}])


async def test_a_question_that_fits_beside_what_others_hold_is_counted_and_waits_for_them(nats: Client) -> None:
    held = LEFT.model_copy(update={"reason": "held"})
    heard = await answering(nats, LEFT, LEFT, held, GRANTED)
    async with provider(counted(300)) as claude:
        _, holds = await Quota(nats).authorize(
            claude, LONG, generation_id="g", user_id="user_1", has_left=nobody_left
        )
    assert [question.input_tokens_max for question in heard] == [LONG.input_tokens_max] * 2 + [322] * 2
    assert holds == Held(322, 1_000)


@pytest.mark.parametrize("exceeds_plan", [True, False])
async def test_where_claude_cannot_count_now_nobody_is_told_that_it_is_too_long(
    nats: Client, *, exceeds_plan: bool
) -> None:
    await answering(nats, *[LEFT.model_copy(update={"exceeds_plan": exceeds_plan})] * 2)
    async with provider(refusal(529)) as claude:
        with pytest.raises(Problem) as problem:
            await Quota(nats).authorize(claude, LONG, generation_id="g", user_id="user_1", has_left=nobody_left)
    document = problem.value.document
    assert (document["status"], document["title"]) == (503, "Claude is overloaded")
    assert not is_doubtful(problem.value)


async def test_by_a_provider_that_does_not_count_it_is_not_certain_that_a_question_exceeds_the_plan(
    nats: Client,
) -> None:
    await answering(nats, *[LEFT.model_copy(update={"exceeds_plan": True})] * 2)
    async with provider(refusal(404)) as claude:
        with pytest.raises(Problem) as problem:
            await Quota(nats).authorize(claude, LONG, generation_id="g", user_id="user_1", has_left=nobody_left)
    assert (problem.value.status, problem.value.document["detail"]) == (429, "Upgrade to Pro")
    assert problem.value.headers["Retry-After"] == "60"


async def test_who_waits_for_other_answers_anyway_goes_on_where_claude_cannot_count(nats: Client) -> None:
    held = LEFT.model_copy(update={"reason": "held", "tokens_available": 999})
    heard = await answering(nats, LEFT, held, held, GRANTED)
    async with provider(refusal(529), refusal(529)) as claude:
        await Quota(nats).authorize(claude, LONG, generation_id="g", user_id="user_1", has_left=nobody_left)
    assert {question.input_tokens_max for question in heard} == {LONG.input_tokens_max}


async def test_who_waits_in_line_is_told_when_the_service_stops(nats: Client, claude: Claude) -> None:
    held = REFUSED.model_copy(update={"reason": "concurrency"})
    heard = await answering(nats, *[held] * 100)
    quota = Quota(nats)

    async def authorize(generation_id: str) -> tuple[Granted, Held]:
        return await quota.authorize(
            claude, PROMPT, generation_id=generation_id, user_id="user_1", has_left=nobody_left
        )

    waiting = [asyncio.create_task(authorize(f"g{n}")) for n in range(8)]

    async def are_in_line() -> bool | None:
        return len(heard) >= 8 + 4 or None

    await eventually(are_in_line)
    quota.waiting_room.close()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in told] == [Unavailable] * 8


@pytest.mark.parametrize("first_is_answered", [True, False])
async def test_a_refusal_says_whether_an_earlier_question_may_still_be_granted(
    nats: Client, claude: Claude, *, first_is_answered: bool
) -> None:
    await answering(nats, *([REFUSED] if first_is_answered else [None, REFUSED]))
    with pytest.raises(Problem) as refused:
        await Quota(nats).authorize(claude, PROMPT, generation_id="g", user_id="user_1", has_left=nobody_left)
    assert refused.value.status == 429
    assert isinstance(refused.value.__cause__, Unanswered) != first_is_answered


async def test_who_cannot_be_asked_again_may_still_grant_the_question_before(nats: Client, claude: Claude) -> None:
    async def hear_one(_message: Msg) -> None:
        await quota_hears.unsubscribe()

    quota_hears = await nats.subscribe(calls.AUTHORIZE, cb=hear_one)
    with pytest.raises(Unavailable) as refused:
        await Quota(nats).authorize(claude, PROMPT, generation_id="g", user_id="user_1", has_left=nobody_left)
    assert isinstance(refused.value.__cause__, Unanswered)


@pytest.mark.parametrize("is_unknown", [True, False])
async def test_a_hold_that_quota_may_have_committed_may_be_held(
    nats: Client, claude: Claude, *, is_unknown: bool
) -> None:
    failure = (CommitUnknown if is_unknown else OperationalError)(None, None, Exception("cut"))

    async def fails(_requests: Sequence[Authorize]) -> list[Authorization | Exception]:
        raise failure

    quota = Answering(nats, [Call(calls.AUTHORIZE, Authorize, fails)])
    await quota.start()
    with pytest.raises(Unavailable) as refused:
        await Quota(nats).authorize(claude, PROMPT, generation_id="g", user_id="user_1", has_left=nobody_left)
    assert is_doubtful(refused.value) is is_unknown
    await quota.stop()


async def test_the_newest_is_in_every_answer_however_much_came_before_it(nats: Client) -> None:
    heard: list[UsageQuery] = []

    async def answer(message: Msg) -> None:
        heard.append(UsageQuery.model_validate_json(message.data))
        await message.respond(UsageAnswer(usage=account(108_000).usage, limits=()).model_dump_json().encode())

    await nats.subscribe(calls.USAGE, cb=answer)
    quota, events = Quota(nats), [usage_reported(tokens_used=1) for _ in range(250)]
    for event in events:
        quota.remember(event)
    await quota.usage("user_1", Deadline())
    (asked,) = heard
    assert [usage.id for usage in asked.pending] == [event.id for event in events[-len(asked.pending) :]]
    assert len(asked.pending) >= 100


async def test_a_question_that_cannot_be_put_to_claude_is_settled_with_nothing(
    nats: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-team: Köln")
    claude, quota, outbox = (
        Claude(api_key="any", base_url="http://127.0.0.1:9"),
        Quota(nats),
        Outbox(tmp_path / "o.db"),
    )
    await answering(nats, GRANTED)
    parts = Parts(claude, quota, outbox, Publisher(nats, outbox, on_sent=quota.published), Policies())
    generation = Generation(parts, PROMPT, generation_id=new_id(), user_id="user_1", metadata={})
    await generation.authorize(nobody_left)
    await generation.run()
    with pytest.raises(Problem, match="Nothing was spent"):
        await generation.answer()
    await claude.close()
    outbox.close()
    [(body,)] = rows(tmp_path / "o.db", "SELECT event FROM outbox WHERE settled")
    event = decode(body)
    assert isinstance(event, GenerationCompleted)
    assert (event.id, event.data.outcome, event.data.tokens_used) == (generation.id, "provider_error", 0)
