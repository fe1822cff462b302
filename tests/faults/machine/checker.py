"""The checker: what is lost, doubled or wrong, by the evidence alone.

    python -m tests.faults.machine.checker FOLDER      prints what it finds; exit status 1 when anything is wrong

Every function below takes the evidence and gives violations. Lost are tokens that were given or acknowledged and are
not counted; doubled, those that are counted more than once or that nobody gave.
"""

import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID

import structlog

from shared.events import Event, GenerationCompleted, SubscriptionChanged, UsageAdjusted
from tests.faults.machine.evidence import Counted, Evidence, Given, gather
from tests.faults.machine.log import Line
from tests.faults.machine.places import load_places

Kind = Literal["lost", "doubled", "wrong"]
UNANSWERED = (None, 503)
ESTIMATED_BYTES_A_TOKEN = 4
# Quota is asked twice, and the outbox writes beside it.
ASKS_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Violation:
    kind: Kind
    what: str
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.kind.upper()}: {self.what}" + (f" ({self.tokens} tokens)" if self.tokens else "")


def check(evidence: Evidence) -> list[Violation]:
    return [violation for look in CHECKS for violation in look(evidence)]


class _Asked:
    """What was asked under one id, and all that came back."""

    def __init__(self, line: Line) -> None:
        self.op, self.request, self.fields = str(line["op"]), line["request"], line
        self.answers: list[Line] = []

    @property
    def is_accepted(self) -> bool:
        return any(answer.get("status") == 200 for answer in self.answers)


def asked(log: Iterable[Line]) -> dict[str, _Asked]:
    found: dict[str, _Asked] = {}
    for line in log:
        if line["what"] == "asked":
            found[line["op"]] = _Asked(line)
        elif line["what"] == "answered":
            found[line["op"]].answers.append(line)
    return found


def fold(events: Iterable[Event]) -> dict[str, Event]:
    """Each event once, by its id: the first stands."""
    folded: dict[str, Event] = {}
    for event in events:
        folded.setdefault(event.id, event)
    return folded


def _op_of(event: Event) -> str | None:
    if isinstance(event, UsageAdjusted):
        return event.data.reason
    if isinstance(event, GenerationCompleted):
        return str(event.data.metadata.get("conversationId") or event.data.metadata.get("op"))
    return None


def _by_op(evidence: Evidence) -> dict[str, list[Event]]:
    found = defaultdict(list)
    for event in fold(evidence.events).values():
        if op := _op_of(event):
            found[op].append(event)
    return found


def generations(evidence: Evidence) -> Iterator[Violation]:
    """What the provider gave is on the stream once: exactly where finished, within the hold where not."""
    events, given = _by_op(evidence), defaultdict(list)
    for gave in evidence.given:
        given[gave.op].append(gave)
    chats = {op: one for op, one in asked(evidence.log).items() if one.request == "chat"}
    for op in given.keys() - chats.keys():
        yield Violation("wrong", f"the provider gave to {op or 'somebody'}, whom nobody asked for")
    for op, chat in chats.items():
        if len(given[op]) > 1:
            yield Violation("doubled", f"{op}: the provider was asked {len(given[op])} times")
        yield from _generation(chat, events.get(op, []), given[op][0] if given[op] else None)


def _generation(chat: _Asked, events: list[Event], gave: Given | None) -> Iterator[Violation]:
    op = chat.op
    if not events:
        if gave:
            yield Violation("lost", f"{op}: the provider gave, and no event says so", gave.tokens)
        elif any(answer.get("last") == "done" for answer in chat.answers):
            yield Violation("lost", f"{op}: answered, and no event says so")
        return
    if len(events) > 1:
        more = sum(event.data.tokens_used for event in events[1:] if isinstance(event, GenerationCompleted))
        yield Violation("doubled", f"{op}: {len(events)} events for one question", more)
    event = events[0]
    if not isinstance(event, GenerationCompleted):
        yield Violation("wrong", f"{op}: a {event.type} for a question")
        return
    yield from _answered(chat, event)
    yield from (_finished if event.data.outcome == "completed" else _unfinished)(chat, event, gave)


def _answered(chat: _Asked, event: GenerationCompleted) -> Iterator[Violation]:
    """Who saw `done` saw the very counts that are on the stream."""
    for answer in chat.answers:
        if answer.get("last") == "done" and answer["tokensUsed"] != event.data.tokens_used:
            kind: Kind = "lost" if answer["tokensUsed"] > event.data.tokens_used else "doubled"
            off = abs(answer["tokensUsed"] - event.data.tokens_used)
            yield Violation(kind, f"{chat.op}: told {answer['tokensUsed']}, counted {event.data.tokens_used}", off)
        if answer.get("generationId", event.id) != event.id:
            yield Violation("wrong", f"{chat.op}: told of {answer['generationId']}, counted as {event.id}")


def _finished(chat: _Asked, event: GenerationCompleted, gave: Given | None) -> Iterator[Violation]:
    counted = event.data.tokens_used
    if gave is None or counted > gave.tokens:
        over = counted - (gave.tokens if gave else 0)
        yield Violation("doubled", f"{chat.op}: finished with {counted}, and the provider gave {gave}", over)
    elif counted < gave.tokens or (event.data.output_tokens or 0) != gave.output_tokens:
        yield Violation(
            "lost", f"{chat.op}: finished with {counted}, and the provider gave {gave}", gave.tokens - counted
        )


def _unfinished(chat: _Asked, event: GenerationCompleted, gave: Given | None) -> Iterator[Violation]:
    """Within [input, hold]. Of no tokens only where the provider gave nothing; with the input as it told us."""
    counted, data = event.data.tokens_used, event.data
    output_tokens = data.output_tokens or 0
    input_tokens = counted - output_tokens
    said = f"{chat.op}: {data.outcome} with {input_tokens} + {output_tokens}, the provider gave {gave}"
    least = chat.fields["input_tokens_least"]
    if counted > chat.fields["input_tokens_most"] + chat.fields["output_tokens_most"]:
        yield Violation("doubled", f"{said}, above its hold", counted - (gave.tokens if gave else 0))
    if gave and input_tokens < min(gave.input_tokens, least):
        yield Violation("lost", said, gave.tokens - counted)
    if not gave and counted and input_tokens < least:
        yield Violation("wrong", f"{said}, below the estimate of {least}")
    if data.outcome in ("disconnected", "provider_error"):
        yield from _as_far_as_it_came(chat, said, output_tokens, input_tokens, gave)


def _as_far_as_it_came(
    chat: _Asked, said: str, output_tokens: int, input_tokens: int, gave: Given | None
) -> Iterator[Violation]:
    """The process lived: whatever reached the reader is counted, and the input as the provider told it."""
    for answer in chat.answers:
        seen = min(answer.get("text_bytes", 0) // ESTIMATED_BYTES_A_TOKEN, chat.fields["output_tokens_most"])
        if output_tokens < seen:
            yield Violation("lost", f"{said}, and {seen} of output were read", seen - output_tokens)
        if gave and answer.get("generationId") and input_tokens != gave.input_tokens:
            yield Violation("wrong", f"{said}: the input was known")


def reports(evidence: Evidence) -> Iterator[Violation]:
    """A report or an adjustment that was accepted is on the stream once, whole; another, once at most."""
    events = _by_op(evidence)
    for op, one in asked(evidence.log).items():
        if one.request not in ("report", "adjustment"):
            continue
        found, tokens = events.get(op, []), one.fields["tokens"]
        if one.is_accepted and not found:
            yield Violation("lost", f"{op}: the {one.request} was accepted, and no event says so", abs(tokens))
        if len(found) > 1:
            yield Violation(
                "doubled", f"{op}: {len(found)} events for one {one.request}", abs(tokens) * (len(found) - 1)
            )
        for event in found:
            if not isinstance(event, SubscriptionChanged) and event.data.tokens_used != tokens:
                yield Violation("wrong", f"{op}: {tokens} were told, and the event says {event.data.tokens_used}")


def plan_changes(evidence: Evidence) -> Iterator[Violation]:
    """No fewer than were accepted, no more than were asked for, and both databases know each."""
    wanted: Counter[tuple[str, str]] = Counter()
    accepted: Counter[tuple[str, str]] = Counter()
    for one in asked(evidence.log).values():
        if one.request == "plan":
            wanted[one.fields["user"], one.fields["tier"]] += 1
            accepted[one.fields["user"], one.fields["tier"]] += one.is_accepted
    changes = {id_: event for id_, event in fold(evidence.events).items() if isinstance(event, SubscriptionChanged)}
    found = Counter((event.data.user_id, event.data.tier) for event in changes.values())
    for change in wanted | found:
        if not accepted[change] <= found[change] <= wanted[change]:
            told = f"{accepted[change]} accepted of {wanted[change]}, {found[change]} on the stream"
            yield Violation("lost" if found[change] < accepted[change] else "doubled", f"plan {change}: {told}")
    for service, known in evidence.plan_changes.items():
        if known != {id_: event.data.tier for id_, event in changes.items()}:
            yield Violation(
                "wrong", f"{service} knows of {len(known)} plan changes, and the stream of {len(changes)}"
            )


def ledger(evidence: Evidence) -> Iterator[Violation]:
    yield from _same(evidence, "ledger", evidence.ledger)


def settlements(evidence: Evidence) -> Iterator[Violation]:
    yield from _same(evidence, "quota", evidence.settlements)


def _usage(evidence: Evidence) -> dict[str, Event]:
    return {id_: event for id_, event in fold(evidence.events).items() if not isinstance(event, SubscriptionChanged)}


def _same(evidence: Evidence, service: str, counted: dict[str, Counted]) -> Iterator[Violation]:
    """The database has each event of the stream, to the token, and nothing else."""
    events = _usage(evidence)
    for id_, event in events.items():
        should = _counted(event)
        if id_ not in counted:
            yield Violation("lost", f"{service} does not have {_name(event)}", abs(should.tokens))
        elif counted[id_] != should:
            yield Violation("wrong", f"{service} has {counted[id_]} for {_name(event)}, which says {should}")
    for id_ in counted.keys() - events.keys():
        yield Violation("doubled", f"{service} has {id_}, and the stream does not", abs(counted[id_].tokens))


def _counted(event: Event) -> Counted:
    if isinstance(event, GenerationCompleted):
        data = event.data
        split = (data.input_tokens, data.cache_creation_input_tokens, data.cache_read_input_tokens)
        return Counted(event.subject, data.tokens_used, sum(n or 0 for n in split), data.output_tokens or 0)
    return Counted(event.subject, event.data.tokens_used if isinstance(event, UsageAdjusted) else 0, 0, 0)


def _name(event: Event) -> str:
    return f"{event.type} {event.id} of {_op_of(event)}"


def totals(evidence: Evidence) -> Iterator[Violation]:
    """Each total is the fold of the stream for its user and period, and no event is in none."""
    used: defaultdict[str, list[tuple[datetime, int]]] = defaultdict(list)
    for event in _usage(evidence).values():
        if isinstance(event, GenerationCompleted):
            used[event.subject].append((event.data.started_at, event.data.tokens_used))
        elif isinstance(event, UsageAdjusted):
            used[event.subject].append((event.data.effective_at, event.data.tokens_used))
    covered: defaultdict[str, set[datetime]] = defaultdict(set)
    for total in evidence.totals:
        within = [(moment, tokens) for moment, tokens in used[total.user_id] if total.begins <= moment < total.ends]
        covered[total.user_id].update(moment for moment, _ in within)
        should = sum(tokens for _, tokens in within)
        if should != total.tokens:
            kind: Kind = "lost" if total.tokens < should else "doubled"
            off = abs(total.tokens - should)
            yield Violation(kind, f"the total of {total.user_id} is {total.tokens}, the fold {should}", off)
    for user_id, all_used in used.items():
        for moment, tokens in all_used:
            if tokens and moment not in covered[user_id]:
                yield Violation("lost", f"no total of {user_id} covers {moment}", abs(tokens))


def holds(evidence: Evidence) -> Iterator[Violation]:
    """All is settled: nothing is held any more, least of all beyond its expiry.

    But for questions on which chat died before it had written down that it asks: nobody settles those, nothing was
    spent on them, and they expire and are reported.
    """
    settled = {event.data.generation_id for event in evidence.events if isinstance(event, GenerationCompleted)}
    deaths = [line["t"] for line in evidence.log if (line["what"], line.get("part")) == ("ended", "chat")]
    for hold in evidence.holds:
        died_asking = any(0 <= died - _made_at(hold.generation_id) <= ASKS_WITHIN_S for died in deaths)
        is_over = hold.expires_at <= evidence.now
        if is_over or hold.generation_id in settled or not died_asking:
            when = "beyond its expiry" if is_over else "although all is settled"
            yield Violation("wrong", f"{hold.generation_id} of {hold.user_id} is held {when}", hold.tokens)


def _made_at(generation_id: str) -> float:
    """The moment in a UUIDv7, in seconds since the epoch."""
    return (UUID(generation_id).int >> 80) / 1000


def overspending(evidence: Evidence) -> Iterator[Violation]:
    """Who only chats never passes the limit. A restored database has lost its holds, and they may pass it."""
    if any(
        line["what"] == "fault begins" and (line["fault"], line["target"]) == ("restore", "quota")
        for line in evidence.log
    ):
        return
    limits = {line["user"]: line["limit_tokens"] for line in evidence.log if line["what"] == "limited"}
    used: Counter[str] = Counter()
    for event in _usage(evidence).values():
        if isinstance(event, GenerationCompleted) and event.subject in limits:
            used[event.subject] += event.data.tokens_used
    for user_id, tokens in used.items():
        if tokens > limits[user_id]:
            yield Violation("wrong", f"{user_id} used {tokens} of {limits[user_id]}", tokens - limits[user_id])


def quarantine(evidence: Evidence) -> Iterator[Violation]:
    """Holds what is no event, all of it, and nothing else but events that contradict an earlier one."""
    for service, kept in evidence.quarantine.items():
        for digest in kept - evidence.poison - evidence.contradicting:
            yield Violation("lost", f"{service} has {digest[:12]} in quarantine, which is valid")
        for digest in evidence.poison - kept:
            yield Violation("wrong", f"{service} does not have {digest[:12]} in quarantine")


def recovery(evidence: Evidence) -> Iterator[Violation]:
    """Everybody was ready again in time, and then all work was done."""
    lines = {line["what"]: line for line in evidence.log if line["what"] in ("ready", "quiet")}
    for what in ("ready", "quiet"):
        if what not in lines:
            yield Violation("wrong", f"the run ended before all was {what}")
        elif lines[what]["missing"]:
            yield Violation("wrong", f"not {what} within {lines[what]['within_s']:.0f} s: {lines[what]['missing']}")
    if evidence.unsent:
        yield Violation("lost", f"{evidence.unsent} events are still in the outbox")


CHECKS: tuple[Callable[[Evidence], Iterator[Violation]], ...] = (
    generations,
    reports,
    plan_changes,
    ledger,
    settlements,
    totals,
    holds,
    overspending,
    quarantine,
    recovery,
)


class _Happened(NamedTuple):
    kind: str
    begun: float
    ended: float


def _faults(log: Sequence[Line]) -> list[_Happened]:
    """In the order of their ends."""
    begun: dict[tuple[str, str], float] = {}
    faults = []
    for line in log:
        if line["what"] == "fault begins":
            begun[line["fault"], line["target"]] = line["t"]
        elif line["what"] == "fault ends":
            faults.append(_Happened(line["fault"], begun[line["fault"], line["target"]], line["t"]))
    return faults


def recoveries(log: Sequence[Line]) -> dict[str, list[float]]:
    """By kind of fault, how many seconds after its end everybody was ready again.

    Told of faults that were alone: while they lasted, and until all was well.
    """
    faults, found = _faults(log), defaultdict(list)
    looks = [(line["t"], not line["absent"]) for line in log if line["what"] == "readiness"]
    for fault in faults:
        others = [other for other in faults if other is not fault and other.ended >= fault.begun]
        if any(other.begun <= fault.ended for other in others):
            continue
        until = min((other.begun for other in others), default=math.inf)
        before = [is_ready for moment, is_ready in looks if moment <= fault.ended]
        after = [(moment, is_ready) for moment, is_ready in looks if fault.ended < moment < until]
        if after and after[-1][1]:
            found[fault.kind].append(round(after[-1][0] - fault.ended, 1))
        elif not after and before and before[-1]:
            found[fault.kind].append(0.0)
    return dict(found)


def summary(evidence: Evidence, violations: Iterable[Violation]) -> list[str]:
    """The last lines: faults by kind, generations, tokens, lost, doubled."""
    faults = Counter(line["fault"] for line in evidence.log if line["what"] == "fault begins")
    restarts = Counter(line["part"] for line in evidence.log if line["what"] == "ended")
    made = [event for event in fold(evidence.events).values() if isinstance(event, GenerationCompleted)]
    outcomes = Counter(event.data.outcome for event in made if event.data.usage_source != "reported")
    kinds = Counter(one.request for one in asked(evidence.log).values() if one.is_accepted)
    ready = [line for line in evidence.log if line["what"] == "ready"]
    by_kind = Counter({"lost": 0, "doubled": 0, "wrong": 0})
    tokens: Counter[str] = Counter()
    for violation in violations:
        by_kind[violation.kind] += 1
        tokens[violation.kind] += violation.tokens
    return [
        f"faults {sum(faults.values())}: {_listed(faults)}",
        f"ends of processes {sum(restarts.values())}: {_listed(restarts)}",
        f"generations {sum(outcomes.values())}: {_listed(outcomes)}",
        f"accepted reports {kinds['report']}, adjustments {kinds['adjustment']}, plan changes {kinds['plan']}",
        f"tokens given {sum(gave.tokens for gave in evidence.given)}, "
        f"counted {sum(event.data.tokens_used for event in made if event.data.usage_source != 'reported')}, "
        f"reported {sum(event.data.tokens_used for event in made if event.data.usage_source == 'reported')}",
        *(f"ready {line['after_s']} s after the last fault" for line in ready),
        "ready again after faults that were alone, at most: "
        + (", ".join(f"{kind} {max(took):.1f} s" for kind, took in sorted(recoveries(evidence.log).items())) or "-"),
        ", ".join(f"{kind} {count} ({tokens[kind]} tokens)" for kind, count in by_kind.items()),
    ]


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


SHOWN_MAX = 40


def main(folder: Path) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    evidence = gather(load_places(folder))
    violations = check(evidence)
    for violation in violations[:SHOWN_MAX]:
        print(violation)  # noqa: T201 - a command
    if len(violations) > SHOWN_MAX:
        print(f"... and {len(violations) - SHOWN_MAX} more")  # noqa: T201
    for line in summary(evidence, violations):
        print(line)  # noqa: T201
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
