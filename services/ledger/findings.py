"""What an audit found, and how people and programs are told."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

from shared.terminal import printable

# What an audit is doing, and how much of how much is done.
Progress = Callable[[str, int, int], None]

# What is compared whatever is looked at.
OF_ALL = ("ledger.leaves", "ledger.seals", "archive")
SHOWN_MAX = 20
VALUE_CHARS_MAX = 60

REBUILD = "make replay rebuilds it from the stream."
FIRST_THE_RECORD = "The stream itself was changed (see evidence): restore the broker's store first. Then:"
SEALED = "The record itself was changed: keep all copies of it, compare them, and restore the right one."
# What can be wrong, in the order in which it is told: what it is called, and what to do about it.
KINDS = {
    "missing": ("on the stream, and not here", REBUILD),
    "changed": ("not as the stream has it", f"Somebody changed it. {REBUILD}"),
    "unexplained": (
        "here, and not on the stream",
        f"Somebody added it, or the stream has lost its end: then restore the broker's store. Otherwise {REBUILD}",
    ),
    "quarantined": ("in quarantine, and can be read by now", "make quarantine ARGS=--redrive counts it."),
    "unreadable": ("cannot be read, and is not in quarantine", "Restart the service: it reads the stream again."),
    "forged": (
        "in quarantine, and not as the stream has it",
        "Somebody changed or added it, or the stream has lost it; it is never counted. Delete the row: make replay "
        "puts back what is to be there.",
    ),
    "contradicting": (
        "a second event under an id that is counted already, with other content",
        "The first counts. Find out who published the second; if it is to count, adjust the usage.",
    ),
    "differs": ("not the sum of the user's events in the period", REBUILD),
    "held": (
        "held, though settled or for longer than anything is",
        "Somebody added or changed it. make replay ends it.",
    ),
    "broken": ("not as it was sealed", SEALED),
    "leaves": (
        "not as the stream has it, and the stream is as it was sealed",
        "Somebody changed the ledger's database. Restore it from a copy, or begin with an empty one: make replay "
        "makes it anew from the stream.",
    ),
    "subtrees": (
        "not what its leaves come to",
        "Somebody changed it, and nothing is sealed on top of it. Restore the ledger's database from a copy, or take "
        "off the append-only trigger and delete the seal's row: the ledger makes it anew.",
    ),
    "elsewhere": (
        "written down there, and no seal of this record",
        "The record was changed together with its leaves and seals, or the file was, or it is another stack's: then "
        "name the right one with CHATRAIL_SEALS_FILE. Else compare both with copies, and restore what was right.",
    ),
    "outside": (
        "made, and not written down there",
        "Somebody emptied or cut the file, or it could not be written: keep it, and compare it with its copies. "
        "Once it is moved away, the ledger writes it anew, from the first seal on.",
    ),
    "unsigned": (
        "without the signature that CHATRAIL_SEAL_KEY_FILE asks for",
        "Where they were signed once, somebody took the signatures away. Where they never were: start ChatRail with "
        "the key, and the next seal is signed.",
    ),
    "archive": (
        "not as it was archived",
        "Restore the file from a copy. While the stream has its messages: take it away, with its manifest and what "
        "is behind it, and archive again.",
    ),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing on which stream and databases do not agree: what is expected and found, where they differ.

    `where` is a table (`ledger.usage`), or what else holds a copy; `kind` is one of KINDS.
    """

    where: str
    kind: str
    id: str | None
    user_id: str | None
    expected: Mapping[str, Any] | None
    found: Mapping[str, Any] | None


class Group(NamedTuple):
    where: str
    kind: str
    number: int


class Found(Protocol):
    """All differences, however many: they are not kept in memory."""

    def groups(self) -> list[Group]: ...

    def differences(self, where: str, kind: str) -> Iterator[Difference]: ...


@dataclass(frozen=True, slots=True)
class Read:
    """What was read of the stream, and what is on its way to each database and therefore not expected there yet."""

    first: int
    last: int
    messages: int
    unreadable: int
    repeated: int
    waiting: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Proven:
    """How far the evidence goes: seals, those whose signature is right, by keys of which ids; what was outside.

    So many messages are sealed, and by what is `outside` up to its newest head; its end may be torn, as a process
    leaves it that dies. Of what is outside all is None where no file was named. `archives` are files of the archive,
    whose manifests may be signed.
    """

    seals: int
    signed: int
    keys: Sequence[str]
    outside: int | None
    sealed_up_to: int
    outside_up_to: int | None
    is_outside_torn: bool = False
    archives: int = 0
    archives_signed: int = 0
    # Tables that are to grow only, and lack what refuses other changes.
    unguarded: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Report:
    read: Read
    compared: Mapping[str, int]
    proven: Proven
    found: Found
    seconds: float

    @property
    def agrees(self) -> bool:
        return not self.found.groups()

    @property
    def has_records(self) -> bool:
        """Whether there was anything of whom and when was looked at, beside the evidence, which is of all."""
        return any(number for name, number in self.compared.items() if name not in OF_ALL)


def in_words(report: Report) -> Iterator[str]:
    """For people, line by line: what was compared, then each group of differences with what to do."""
    return map(printable, _all_lines(report))


def _all_lines(report: Report) -> Iterator[str]:
    read = report.read
    yield (
        f"Read {_number(read.messages, 'message')} of the stream ({read.first:,} to {read.last:,})"
        f" in {report.seconds:.1f} s and compared:"
    )
    for name, number in report.compared.items():
        yield f"  {number:>12,}  {name}"
    groups = report.found.groups()
    yield from _proven_in_words(report.proven, lacks=any(group.kind == "outside" for group in groups))
    for service, number in read.waiting.items():
        if number:
            yield f"  On their way to {service}, and not compared where they are not there yet: {number:,}"
    if read.repeated:
        yield f"  Came again with the same content, and count once: {read.repeated:,}"
    if read.unreadable:
        yield f"  Cannot be read, and are in quarantine unless told below: {read.unreadable:,}"
    yield ""
    if not groups:
        yield "All agree."
        return
    for group in groups:
        what, advice = KINDS[group.kind][0], _advice(group, groups)
        yield f"{group.where}: {group.number:,} {what}"
        for difference in islice(report.found.differences(group.where, group.kind), SHOWN_MAX):
            yield from _lines(difference)
        if group.number > SHOWN_MAX:
            yield f"  and {group.number - SHOWN_MAX:,} more (--json has all)"
        yield f"  {advice}"
        yield ""
    yield f"{_number(sum(group.number for group in groups), 'difference')}."


def _proven_in_words(proven: Proven, *, lacks: bool) -> Iterator[str]:
    """What an auditor must know who would take a seal for signed, or written down in a file that `lacks` some."""
    seals = _number(proven.seals, "seal")
    if proven.keys:
        yield f"  Of {seals}, {proven.signed:,} are rightly signed, by the keys believed: {', '.join(proven.keys)}"
    else:
        yield f"  No signature of {seals} was checked: CHATRAIL_SEAL_KEY_FILE names no key"
    if proven.outside is None:
        yield "  No file outside was compared: CHATRAIL_SEALS_FILE names none"
    else:
        yield f"  In the file outside: {_number(proven.outside, 'head')}{_reach_of(proven, lacks=lacks)}"
    if proven.is_outside_torn:
        yield "  Its last line is torn, as a process leaves it that dies while it writes: a ledger that runs mends it"
    if proven.archives and proven.keys:
        yield f"  Of the archive's manifests rightly signed: {proven.archives_signed:,} of {proven.archives:,}"
    elif proven.archives:
        yield "  Of what is archived the bodies are proven; the rest only where manifests are signed"
    if proven.unguarded:
        yield f"  Without the triggers that refuse changes: {', '.join(proven.unguarded)}; make replay puts them back"


def _reach_of(proven: Proven, *, lacks: bool) -> str:
    if proven.outside_up_to is None or not proven.sealed_up_to:
        return ""
    if proven.outside_up_to >= proven.sealed_up_to:
        return f", up to message {proven.sealed_up_to:,}"
    behind = f"; what is sealed behind it, up to {proven.sealed_up_to:,}, is not there"
    later = "" if lacks else " yet: a ledger that runs writes it down"
    return f", up to message {proven.outside_up_to:,}{behind}{later}"


def as_json(report: Report) -> Iterator[str]:
    """One document, in parts: it may be larger than memory."""
    groups = report.found.groups()
    head = {
        "agrees": report.agrees,
        "stream": asdict(report.read),
        "compared": dict(report.compared),
        "evidence": asdict(report.proven),
        "seconds": round(report.seconds, 3),
        "groups": [
            {**group._asdict(), "means": KINDS[group.kind][0], "advice": _advice(group, groups)} for group in groups
        ],
    }
    yield json.dumps(head, ensure_ascii=False)[:-1] + ', "differences": ['
    separator = ""
    for group in groups:
        for difference in report.found.differences(group.where, group.kind):
            yield separator + json.dumps(asdict(difference), ensure_ascii=False)
            separator = ",\n"
    yield "]}\n"


def _advice(group: Group, groups: list[Group]) -> str:
    """Of a stream that was changed itself nothing is to be rebuilt."""
    advice = KINDS[group.kind][1]
    is_record_changed = any(each.where.startswith("evidence, message") for each in groups)
    return f"{FIRST_THE_RECORD} {advice}" if is_record_changed and REBUILD in advice else advice


def _lines(difference: Difference) -> Iterator[str]:
    if names := [name for name in (difference.id, difference.user_id) if name]:
        yield "  " + ", ".join(names)
    for what, values in (("expected", difference.expected), ("found", difference.found)):
        # Of a whole record, what says something, and was not said yet.
        is_whole = difference.expected is None or difference.found is None
        told = [
            f"{name} {_short(value)}"
            for name, value in (values or {}).items()
            if not (is_whole and (value is None or value in (difference.id, difference.user_id)))
        ]
        yield f"    {what:8}  {', '.join(told) or 'nothing'}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[: VALUE_CHARS_MAX - 1]}…"


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
