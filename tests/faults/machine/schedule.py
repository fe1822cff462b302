"""What happens to which part, and when: decided by the seed alone, so that a run can be repeated."""

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill", "terminate", "stop", "cut", "half-open", "slow", "lock", "full disk", "delete consumer", "restore"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Store = Literal["sqlite", "postgresql"]

FIRST_FAULT_S = 3.0
# Without a fault in the end: what is measured last is how soon everybody is ready again.
PAUSE_S = (0.3, 3.0)
# So many of the faults begin while another lasts.
OVERLAPPING = 0.4
LASTS_S: dict[Kind, tuple[float, float]] = {
    "kill": (0, 0),
    "terminate": (0, 0),
    "stop": (1, 12),
    "cut": (0.5, 6),
    "half-open": (2, 16),
    "slow": (2, 10),
    "lock": (1, 6),
    "full disk": (2, 8),
    "delete consumer": (6, 10),
    "restore": (8, 20),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Which parts there are. Replicas share a database, and SQLite has one writer: they need PostgreSQL."""

    ledger: Store
    quota: Store

    @classmethod
    def of(cls, seed: int) -> "Shape":
        chance = random.Random(f"shape {seed}")  # noqa: S311 - no secret
        stores: tuple[Store, ...] = get_args(Store)
        return cls(chance.choice(stores), chance.choice(stores))

    def replicas(self, service: Literal["ledger", "quota"]) -> list[str]:
        return [service] if getattr(self, service) == "sqlite" else [f"{service}-1", f"{service}-2"]

    @property
    def services(self) -> list[str]:
        return ["chat", *self.replicas("ledger"), *self.replicas("quota")]

    @property
    def links(self) -> list[str]:
        stored = [f"{name}->postgres" for name in ("ledger", "quota") if getattr(self, name) == "postgresql"]
        return ["chat->nats", "ledger->nats", "quota->nats", "chat->claude", *stored]

    @property
    def has_postgres(self) -> bool:
        return "postgresql" in (self.ledger, self.quota)


@dataclass(frozen=True, slots=True)
class Fault:
    """From `begins_s` after the load's start, for `lasts_s`. A detail says how: which way a link is half-open."""

    begins_s: float
    lasts_s: float
    kind: Kind
    target: str
    detail: str = ""

    @property
    def ends_s(self) -> float:
        return self.begins_s + self.lasts_s


def targets(shape: Shape, kind: Kind) -> list[str]:
    match kind:
        case "kill":
            return ["broker", *shape.services, *(["postgres"] if shape.has_postgres else [])]
        case "terminate" | "stop":
            return ["broker", *shape.services]
        case "cut" | "half-open" | "slow":
            return shape.links
        case "full disk":
            return ["outbox", "broker"]
        case "lock" | "delete consumer" | "restore":
            return ["ledger", "quota"]


def schedule(seed: int, duration_s: float, shape: Shape, kinds: tuple[Kind, ...] = KINDS) -> list[Fault]:
    """Faults that all end within the duration. No target has two at once, and every kind has its turn."""
    chance = random.Random(f"faults {seed}")  # noqa: S311 - no secret
    deck: list[Kind] = []
    faults: list[Fault] = []
    clock_s = FIRST_FAULT_S
    while True:
        if not deck:
            deck = list(kinds)
            chance.shuffle(deck)
        kind = deck.pop()
        lasts_s = round(chance.uniform(*LASTS_S[kind]), 1)
        target = chance.choice(targets(shape, kind))
        detail = chance.choice(["half_open", "deaf", "mute"]) if kind == "half-open" else ""
        begins_s = round(max([clock_s, *(fault.ends_s + 0.5 for fault in faults if _touch(fault, kind, target))]), 1)
        if begins_s + lasts_s > duration_s:
            return faults
        fault = Fault(begins_s, lasts_s, kind, target, detail)
        faults.append(fault)
        is_overlapped = chance.random() < OVERLAPPING
        clock_s = (begins_s if is_overlapped else fault.ends_s) + chance.uniform(*PAUSE_S)


def _touch(fault: Fault, kind: Kind, target: str) -> bool:
    """Whether one would undo what the other does: both hold the same part, or a database is being put back."""
    if "restore" in (fault.kind, kind):
        return _service(fault.target) == _service(target) or "postgres" in (fault.target, target)
    return fault.target == target


def _service(target: str) -> str:
    return target.partition("->")[0].partition("-")[0]
