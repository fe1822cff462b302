"""The checker of the proving machine finds what is wrong: a world in which all agrees, and one thing changed."""

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from shared.events import Event, GenerationCompleted, SubscriptionChanged, new_id
from tests.builders import NOON, generation_completed, subscription_changed, usage_adjusted, usage_reported
from tests.faults.machine.checker import check, recoveries, summary
from tests.faults.machine.evidence import Counted, Evidence, Given, Hold, Total
from tests.faults.machine.log import Line

MONTH = timedelta(days=30)
POISON = "0" * 64


def chat(op: str, user: str, *answers: Line) -> list[Line]:
    """Asked, with at least 90 and at most 400 tokens of input and 200 of output, and answered."""
    limits = {"input_tokens_least": 90, "input_tokens_most": 400, "output_tokens_most": 200}
    asked = {"what": "asked", "op": op, "request": "chat", "user": user, **limits}
    return [asked, *({"what": "answered", "op": op, **answer} for answer in answers)]


def told(op: str, request: str, user: str, status: int | None, **fields: Any) -> list[Line]:
    asked = {"what": "asked", "op": op, "request": request, "user": user, **fields}
    return [asked, {"what": "answered", "op": op, "status": status}]


def generation(op: str, user: str, input_tokens: int, output_tokens: int, **data: Any) -> GenerationCompleted:
    told = {"input_tokens": input_tokens, "output_tokens": output_tokens, "metadata": {"conversationId": op}, **data}
    return generation_completed(user, **told)


FINISHED = generation("op-1", "anna", 100, 50, cache_creation_input_tokens=20)
LEFT = generation("op-2", "anna", 100, 10, outcome="disconnected", usage_source="estimated")
KILLED = generation("op-3", "ben", 95, 5, outcome="interrupted", usage_source="estimated")
REPORT = usage_reported("ben", tokens_used=1_000, metadata={"op": "op-4"})
CREDIT = usage_adjusted("ben", -200, reason="op-5")
CHANGE = subscription_changed("carla", "pro")
EVENTS: list[Event] = [FINISHED, LEFT, KILLED, REPORT, CREDIT, CHANGE]
LOG: list[Line] = [
    {"what": "limited", "user": "anna", "limit_tokens": 300},
    {"t": 1.0, "what": "fault begins", "fault": "kill", "target": "chat", "detail": ""},
    *chat(
        "op-1",
        "anna",
        {"status": 200, "last": "done", "generationId": FINISHED.id, "tokensUsed": 170, "text_bytes": 200},
    ),
    *chat("op-2", "anna", {"status": 200, "last": "left", "generationId": LEFT.id, "text_bytes": 40}),
    *chat("op-3", "ben", {"last": "nothing", "failed": "ClientOSError"}),
    *told("op-4", "report", "ben", 200, tokens=1_000),
    *told("op-5", "adjustment", "ben", 200, tokens=-200),
    *told("op-6", "plan", "carla", 200, tier="pro"),
    *told("op-7", "report", "ben", 503, tokens=7),
    {"what": "ready", "after_s": 3.2, "within_s": 30.0, "missing": ""},
    {"what": "quiet", "after_s": 0.4, "within_s": 60.0, "missing": ""},
]
COUNTED = {
    FINISHED.id: Counted("anna", 170, 120, 50),
    LEFT.id: Counted("anna", 110, 100, 10),
    KILLED.id: Counted("ben", 100, 95, 5),
    REPORT.id: Counted("ben", 1_000, 0, 0),
    CREDIT.id: Counted("ben", -200, 0, 0),
}
WORLD = Evidence(
    log=LOG,
    given=[
        Given("op-1", "completed", 120, 50),
        Given("op-2", "disconnected", 100, 12),
        Given("op-3", "disconnected", 100, 30),
    ],
    events=EVENTS,
    poison=frozenset([POISON]),
    ledger=COUNTED,
    settlements=COUNTED,
    plan_changes={"ledger": {CHANGE.id: "pro"}, "quota": {CHANGE.id: "pro"}},
    totals=[Total("anna", NOON - MONTH, NOON + MONTH, 280), Total("ben", NOON - MONTH, NOON + MONTH, 900)],
    quarantine={"ledger": frozenset([POISON]), "quota": frozenset([POISON])},
    now=NOON,
)


def found(**changed: Any) -> list[str]:
    return [str(violation) for violation in check(replace(WORLD, **changed))]


def without(events: list[Event], *gone: Event) -> list[Event]:
    return [event for event in events if event not in gone]


def as_if_counted(*events: Event) -> dict[str, Any]:
    """These events instead, with ledger, quota and totals that agree with them."""
    counted: dict[str, Counted] = {}
    used: dict[str, int] = {}
    for event in events:
        if not isinstance(event, SubscriptionChanged):
            data = event.data
            tokens, output_tokens = data.tokens_used, 0
            input_tokens = 0
            if isinstance(event, GenerationCompleted) and event.data.input_tokens is not None:
                output_tokens = event.data.output_tokens or 0
                input_tokens = tokens - output_tokens
            counted[event.id] = Counted(event.subject, tokens, input_tokens, output_tokens)
            used[event.subject] = used.get(event.subject, 0) + tokens
    totals = [Total(user, NOON - MONTH, NOON + MONTH, tokens) for user, tokens in used.items()]
    return {"events": list(events), "ledger": counted, "settlements": counted, "totals": totals}


def with_answer(op: str, **answer: Any) -> list[Line]:
    return [{**line, **answer} if (line["what"], line.get("op")) == ("answered", op) else line for line in LOG]


def test_a_world_in_which_all_agrees_has_nothing_wrong() -> None:
    assert found() == []
    assert found(**as_if_counted(*EVENTS)) == []


def test_an_event_that_is_on_the_stream_twice_counts_once() -> None:
    assert found(events=[*EVENTS, FINISHED]) == []


@pytest.mark.parametrize("event", [FINISHED, LEFT, KILLED])
def test_what_was_given_and_is_on_no_event_is_lost(event: Event) -> None:
    (said,) = found(**as_if_counted(*without(EVENTS, event)))
    assert said.startswith("LOST: op-")
    assert "the provider gave, and no event says so" in said


@pytest.mark.parametrize("event", [REPORT, CREDIT])
def test_what_was_accepted_and_is_on_no_event_is_lost(event: Event) -> None:
    (said,) = found(**as_if_counted(*without(EVENTS, event)))
    assert said.startswith("LOST: op-")
    assert "was accepted, and no event says so" in said


def test_a_report_that_was_not_accepted_may_be_counted_or_not() -> None:
    late = usage_reported("ben", tokens_used=7, metadata={"op": "op-7"})
    assert found(**as_if_counted(*EVENTS, late)) == []


@pytest.mark.parametrize(
    "again",
    [
        generation("op-1", "anna", 100, 50, cache_creation_input_tokens=20),
        generation("op-3", "ben", 95, 5, outcome="interrupted"),
        usage_reported("ben", tokens_used=1_000, metadata={"op": "op-4"}),
        usage_adjusted("ben", -200, reason="op-5"),
    ],
)
def test_a_second_event_for_one_request_is_doubled(again: Event) -> None:
    (said, *_) = [line for line in found(**as_if_counted(*EVENTS, again)) if line.startswith("DOUBLED")]
    assert "2 events for one" in said


@pytest.mark.parametrize(
    ("instead", "kind"),
    [
        (generation("op-1", "anna", 100, 49, cache_creation_input_tokens=20), "LOST"),
        (generation("op-1", "anna", 100, 51, cache_creation_input_tokens=20), "DOUBLED"),
        (generation("op-1", "anna", 100, 50), "LOST"),
    ],
)
def test_a_finished_generation_is_counted_exactly(instead: GenerationCompleted, kind: str) -> None:
    same_id = instead.model_copy(update={"id": FINISHED.id})
    said = found(**as_if_counted(same_id, *without(EVENTS, FINISHED)))
    assert any(line.startswith(f"{kind}: op-1: finished with") for line in said)
    assert any(line.startswith(f"{kind}: op-1: told 170") for line in said)


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        (generation("op-3", "ben", 0, 0, outcome="interrupted"), "LOST: op-3: interrupted with 0 + 0"),
        (generation("op-3", "ben", 80, 5, outcome="interrupted"), "LOST: op-3: interrupted with 80 + 5"),
        (generation("op-3", "ben", 401, 200, outcome="interrupted"), "above its hold"),
        (generation("op-2", "anna", 100, 9, outcome="disconnected"), "10 of output were read"),
        (generation("op-2", "anna", 95, 10, outcome="disconnected"), "the input was known"),
    ],
)
def test_an_unfinished_generation_is_counted_within_its_input_and_its_hold(
    instead: GenerationCompleted, words: str
) -> None:
    (op,) = instead.data.metadata.values()
    before = next(event for event in (LEFT, KILLED) if event.data.metadata["conversationId"] == op)
    same_id = instead.model_copy(update={"id": before.id})
    (said,) = found(**as_if_counted(same_id, *without(EVENTS, before)))
    assert words in said


def test_one_that_the_provider_never_heard_of_may_cost_nothing_or_its_input() -> None:
    given = [gave for gave in WORLD.given if gave.op != "op-3"]
    nothing = generation("op-3", "ben", 0, 0, outcome="interrupted").model_copy(update={"id": KILLED.id})
    assert found(given=given) == []
    assert found(given=given, **as_if_counted(nothing, *without(EVENTS, KILLED))) == []


def test_a_question_that_was_asked_of_the_provider_twice_is_doubled() -> None:
    (said,) = found(given=[*WORLD.given, Given("op-1", "completed", 120, 50)])
    assert said == "DOUBLED: op-1: the provider was asked 2 times"


def test_who_saw_another_id_or_count_than_was_counted_is_told_of() -> None:
    assert found(log=with_answer("op-1", tokensUsed=171)) == ["LOST: op-1: told 171, counted 170 (1 tokens)"]
    (said,) = found(log=with_answer("op-1", generationId="other"))
    assert "told of other" in said


@pytest.mark.parametrize("table", ["ledger", "settlements"])
def test_a_database_without_an_event_or_with_one_too_many_or_another_count_is_told_of(table: str) -> None:
    service = "ledger" if table == "ledger" else "quota"
    lacking = {id_: counted for id_, counted in COUNTED.items() if id_ != REPORT.id}
    assert found(**{table: lacking})[0].startswith(f"LOST: {service} does not have")
    more = COUNTED | {"other": Counted("ben", 5, 5, 0)}
    assert found(**{table: more}) == [f"DOUBLED: {service} has other, and the stream does not (5 tokens)"]
    off = COUNTED | {REPORT.id: Counted("ben", 1_001, 0, 0)}
    assert found(**{table: off})[0].startswith(f"WRONG: {service} has")
    others = COUNTED | {REPORT.id: Counted("carla", 1_000, 0, 0)}
    assert found(**{table: others})[0].startswith(f"WRONG: {service} has")


@pytest.mark.parametrize(("tokens", "kind"), [(899, "LOST"), (901, "DOUBLED"), (1_900, "DOUBLED")])
def test_a_total_that_is_not_the_fold_is_told_of(tokens: int, kind: str) -> None:
    totals = [WORLD.totals[0], WORLD.totals[1]._replace(tokens=tokens)]
    (said,) = found(totals=totals)
    assert said.startswith(f"{kind}: the total of ben is {tokens}, the fold 900")


def test_usage_that_no_total_covers_is_lost() -> None:
    assert {line[:26] for line in found(totals=[WORLD.totals[0]])} == {"LOST: no total of ben cove"}


def test_a_hold_that_nobody_released_is_told_of() -> None:
    hold = Hold(new_id(), "anna", 90, NOON + timedelta(minutes=9))
    assert found(holds=[hold]) == [f"WRONG: {hold.generation_id} of anna is held although all is settled (90 tokens)"]
    assert "beyond its expiry" in found(holds=[hold._replace(expires_at=NOON)])[0]


def test_a_hold_that_died_with_chat_before_anything_was_written_may_expire() -> None:
    hold = Hold(new_id(), "anna", 90, NOON + timedelta(minutes=9))
    asked_at = (UUID(hold.generation_id).int >> 80) / 1000

    def ended(part: str, after_s: float) -> list[Line]:
        return [*LOG, {"t": asked_at + after_s, "what": "ended", "part": part, "status": -9}]

    assert found(holds=[hold], log=ended("chat", 0.2)) == []
    for log in (ended("chat", -0.2), ended("chat", 20), ended("quota", 0.2)):
        assert len(found(holds=[hold], log=log)) == 1
    assert len(found(holds=[hold._replace(expires_at=NOON)], log=ended("chat", 0.2))) == 1


def test_a_hold_of_a_generation_that_is_settled_never_stays() -> None:
    same = FINISHED.model_copy(update={"data": FINISHED.data.model_copy(update={"generation_id": new_id()})})
    died_at = (UUID(same.data.generation_id).int >> 80) / 1000 + 0.1
    log: list[Line] = [*LOG, {"t": died_at, "what": "ended", "part": "chat", "status": -9}]
    hold = Hold(same.data.generation_id, "anna", 90, NOON + timedelta(minutes=9))
    (said,) = found(events=[same, *without(EVENTS, FINISHED)], holds=[hold], log=log)
    assert said.endswith("is held although all is settled (90 tokens)")


def test_spending_beyond_the_limit_is_told_of_unless_quota_was_put_back() -> None:
    log = [{**line, "limit_tokens": 279} if line["what"] == "limited" else line for line in LOG]
    assert found(log=log) == ["WRONG: anna used 280 of 279 (1 tokens)"]
    restored: Line = {"t": 2.0, "what": "fault begins", "fault": "restore", "target": "quota"}
    assert found(log=[*log, restored]) == []


def test_quarantine_has_what_is_no_event_and_nothing_else() -> None:
    nothing: dict[str, frozenset[str]] = {"ledger": frozenset(), "quota": frozenset([POISON])}
    assert found(quarantine=nothing) == [f"WRONG: ledger does not have {POISON[:12]} in quarantine"]
    valid = {"ledger": frozenset([POISON, "1" * 64]), "quota": frozenset([POISON])}
    assert found(quarantine=valid) == ["LOST: ledger has 111111111111 in quarantine, which is valid"]


def test_a_plan_change_that_was_accepted_is_on_the_stream_and_in_both_databases() -> None:
    assert any(line.startswith("LOST: plan ('carla', 'pro')") for line in found(events=without(EVENTS, CHANGE)))
    unknown = {"ledger": {CHANGE.id: "pro"}, "quota": {}}
    (said,) = found(plan_changes=unknown)
    assert said.startswith("WRONG: quota knows of 0 plan changes")
    twice = subscription_changed("carla", "pro")
    assert any(line.startswith("DOUBLED: plan") for line in found(events=[*EVENTS, twice]))


def test_who_is_not_ready_in_time_or_never_done_is_told_of() -> None:
    log = [line for line in LOG if line["what"] != "quiet"]
    assert found(log=log) == ["WRONG: the run ended before all was quiet"]
    late = [{**line, "missing": "chat: 503"} if line["what"] == "ready" else line for line in LOG]
    assert found(log=late) == ["WRONG: not ready within 30 s: chat: 503"]
    assert found(unsent=2) == ["LOST: 2 events are still in the outbox"]


def test_the_last_lines_say_what_happened_and_what_is_lost_and_doubled() -> None:
    lacking = {id_: counted for id_, counted in COUNTED.items() if id_ != REPORT.id}
    world = replace(WORLD, ledger=lacking)
    lines = summary(world, check(world))
    assert lines[0] == "faults 1: kill 1"
    assert "generations 3: completed 1, disconnected 1, interrupted 1" in lines
    assert "accepted reports 1, adjustments 1, plan changes 1" in lines
    assert "tokens given 412, counted 380, reported 1000" in lines
    assert lines[-1] == "lost 1 (1000 tokens), doubled 0 (0 tokens), wrong 0 (0 tokens)"


def fault(kind: str, begun: float, ended: float) -> list[Line]:
    told = {"fault": kind, "target": "quota", "detail": ""}
    return [{"t": begun, "what": "fault begins", **told}, {"t": ended, "what": "fault ends", **told}]


def test_how_soon_all_was_ready_again_is_told_of_faults_that_were_alone() -> None:
    readiness: list[Line] = [
        {"t": moment, "what": "readiness", "absent": absent}
        for moment, absent in [(0, []), (1.2, ["quota"]), (4.5, []), (20.5, ["quota"]), (24, []), (31, ["quota"])]
    ]
    log = [
        *fault("kill", 1, 1),
        *fault("slow", 10, 12),
        *fault("cut", 20, 22),
        *fault("stop", 21, 23),  # not alone, nor is the cut
        *fault("restore", 30, 40),  # never seen to be over
    ]
    assert recoveries([*readiness, *log]) == {"kill": [3.5], "slow": [0.0]}
