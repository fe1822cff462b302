"""Plans and their periods: pure rules, no I/O but reading the one file."""

import re
import tomllib
from calendar import monthrange
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shared.errors import Misconfigured, in_words

PLANS_FILE = Path(__file__).with_name("plans.toml")

FOR_EVER = datetime(9999, 12, 31, tzinfo=UTC)
PeriodKind = Literal["day", "month", "none"]


def known_zone(name: str) -> str:
    """The name itself. Raises ValueError as `zone` does."""
    zone(name)
    return name


_ZONES = files("tzdata") / "zoneinfo"
_ZONE_NAMES = frozenset((files("tzdata") / "zones").read_text("utf-8").split())


@lru_cache(maxsize=1024)
def zone(name: str) -> ZoneInfo:
    """The IANA time zone, as the package `tzdata` has it: on every machine the same, today and when it is replayed.

    Raises ValueError for a name that does not exist, such as `localtime`, which is another zone on each machine.
    """
    if name not in _ZONE_NAMES:
        raise ValueError(f"{name!r} is not a time zone; use an IANA name such as 'Europe/Berlin'")
    with (_ZONES / name).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


TimeZone = Annotated[str, AfterValidator(known_zone)]
Weight = Annotated[Decimal, Field(ge=0, le=1000)]


def _a_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(_a_number)]
LimitTokens = Annotated[Whole, Field(ge=0, le=10**15)]


class Weights(BaseModel):
    """How much a token counts against the limit: by its kind, times what its model is worth.

    `models` names models or families of them: "claude-opus" is also the weight of "claude-opus-4-8-20260101", unless
    a longer name fits, too. Raw counts are kept, so a change needs no replay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Weight = Decimal(1)
    output: Weight = Decimal(1)
    cache_creation: Weight = Decimal(1)
    cache_read: Weight = Decimal(1)
    models: dict[str, Weight] = {}

    @cached_property
    def are_plain(self) -> bool:
        """A token is a token."""
        return not self.models and self.input == self.output == self.cache_creation == self.cache_read == 1

    def of_model(self, model: str | None) -> Decimal:
        families = [name for name in self.models if model == name or (model or "").startswith(f"{name}-")]
        return self.models[max(families, key=len)] if families else Decimal(1)


class Limit(BaseModel):
    """At most so many tokens a period; None: no limit, and the period is only shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit_tokens: LimitTokens | None
    period: PeriodKind


class Plan(BaseModel):
    """`limit_tokens` and `period` say the one limit of most plans; `limits` lists more of them. All of them hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tier: str
    limit_tokens: LimitTokens | None = None
    period: PeriodKind | None = None
    listed: tuple[Limit, ...] = Field(default=(), alias="limits")
    anchor: Literal["calendar", "subscription"] = "calendar"
    price_per_1k_usd: Decimal | None = Field(default=None, ge=0)
    upgrade_to: str | None = None
    time_zone: TimeZone = "UTC"
    output_tokens_min: Whole = Field(default=64, ge=1, le=128_000)
    concurrent_generations_max: Whole | None = Field(default=None, ge=1)
    alert_percents: tuple[Annotated[Whole, Field(ge=1, le=100)], ...] = (80, 100)
    weights: Weights = Weights()

    @model_validator(mode="after")
    def _its_limits_make_sense(self) -> "Plan":
        if self.period is None and (self.limit_tokens is not None or not self.listed):
            raise ValueError("needs a period: 'day', 'month' or 'none'")
        if any(limit.limit_tokens is None for limit in self.listed):
            raise ValueError("each of limits needs limit_tokens")
        kinds = [limit.period for limit in self.limits]
        if len(set(kinds)) < len(kinds):
            raise ValueError("has two limits of the same period")
        return self

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        if self.listed and self.limit_tokens is None:
            return self.listed
        assert self.period is not None  # noqa: S101 - validated above
        return (Limit(limit_tokens=self.limit_tokens, period=self.period), *self.listed)

    def cost_usd(self, tokens: int) -> Decimal:
        """The price of `tokens`, in dollars rounded to cents; 0 where a contract sets the price."""
        exact = (self.price_per_1k_usd or Decimal(0)) * tokens / 1000
        return exact.quantize(Decimal("0.01"), rounding=ROUND_HALF_UP)


class Plans(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    default: str
    plans: dict[str, Plan] = Field(min_length=1)

    @model_validator(mode="after")
    def _every_name_is_a_plan(self) -> "Plans":
        for name in [self.default, *(plan.upgrade_to for plan in self.plans.values() if plan.upgrade_to)]:
            if name not in self.plans:
                raise ValueError(f"there is no plan named {name!r}")
        return self

    def of(self, tier: str | None) -> Plan:
        """The plan of a tier. No subscription, or a tier that the file no longer names, is the default plan."""
        return self.plans.get(tier or self.default) or self.plans[self.default]

    @classmethod
    def load(cls, path: Path = PLANS_FILE) -> "Plans":
        """Raises Misconfigured, with the line and the reason, when the file cannot be read or makes no sense."""
        text = ""
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
            document = tomllib.loads(text)
            plans = {tier: _named(tier, plan) for tier, plan in document.get("plans", {}).items()}
            return cls.model_validate({**document, "plans": plans})
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Misconfigured(f"The plans file {path} cannot be read: {error}") from error
        except ValidationError as error:
            line = _line_of(error.errors()[0]["loc"], text)
            raise Misconfigured(f"The plans file {path} is wrong at line {line}: {in_words(error)}") from error
        except _Misnamed as error:
            line = _line_of(error.where, text)
            raise Misconfigured(f"The plans file {path} is wrong at line {line}: {error}") from error
        except (TypeError, AttributeError) as error:
            raise Misconfigured(f"The plans file {path} is wrong: {error}") from error


# As every name that is told on the bus: shared.events.Name.
_TIER = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,128}")


class _Misnamed(Exception):
    def __init__(self, what: str, *where: str) -> None:
        super().__init__(what)
        self.where = where


def _named(tier: str, plan: dict[str, object]) -> dict[str, object]:
    """The plan with its name, which is its table's."""
    named = {"tier": tier, **plan}
    if not _TIER.fullmatch(tier):
        raise _Misnamed("a plan's name has 1 to 128 characters, and no control characters among them", "plans", tier)
    if named["tier"] != tier:
        raise _Misnamed(f"plans.{tier}.tier: a plan is named by its table, [plans.{tier}]", "plans", tier, "tier")
    return named


_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _line_of(where: tuple[int | str, ...], text: str) -> int:
    """The line that says most of the path `where`: its key, or the table that lacks it. The parser does not tell."""
    table: list[int | str] = []
    tables: Counter[str] = Counter()
    best, line_of_best = 0, 1
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            path = table = [*_parts(header[2])]
            if header[1] == "[[":
                table.append(tables[header[2]])
                tables[header[2]] += 1
        elif key := _KEY.match(line):
            path = table + _parts(key[1])
        else:
            continue
        if path == list(where[: len(path)]) and len(path) > best:
            best, line_of_best = len(path), number
    return line_of_best


def _parts(dotted: str) -> list[int | str]:
    return [part.strip("\"'") for part in re.findall(r"""[\w-]+|"[^"]*"|'[^']*'""", dotted)]


@dataclass(frozen=True, slots=True)
class Period:
    """A calendar period, [start, end) in UTC. A plan without periods has one that began with the epoch."""

    start: datetime
    end: datetime | None

    @property
    def bounds(self) -> tuple[datetime, datetime]:
        """As databases keep it: one that never ends lasts for ever."""
        return self.start, self.end or FOR_EVER

    def covers(self, moment: datetime) -> bool:
        return self.start <= moment and (self.end is None or moment < self.end)

    @classmethod
    def containing(
        cls, moment: datetime, kind: PeriodKind, time_zone: str = "UTC", *, anchor_day: int = 1
    ) -> "Period":
        """The period of `moment`. Months begin on `anchor_day`, or on the last day of a month that is shorter."""
        last = _last.get((kind, time_zone, anchor_day))
        if last is None or not last.covers(moment):
            last = _last[kind, time_zone, anchor_day] = cls._containing(moment, kind, time_zone, anchor_day)
        return last

    @classmethod
    def _containing(cls, moment: datetime, kind: PeriodKind, time_zone: str, anchor_day: int) -> "Period":
        if kind == "none":
            return cls(datetime(1970, 1, 1, tzinfo=UTC), None)
        begin = moment.astimezone(zone(time_zone)).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        if kind == "month":
            first = _begin_of_month(begin, anchor_day)
            if first > begin:
                first = _begin_of_month(begin.replace(day=1) - timedelta(days=1), anchor_day)
            begin = first
        end = _begin_of_next(begin, kind, anchor_day)
        # Where clocks go back across midnight a day begins with the first of the two, for good.
        while end.astimezone(UTC) <= moment.astimezone(UTC):  # by the clock on the wall it is not
            begin, end = end, _begin_of_next(end, kind, anchor_day)
        return cls(begin.astimezone(UTC), end.astimezone(UTC))


# The period that was asked for last: nearly always that of now, for hundreds of users at once.
_last: dict[tuple[PeriodKind, str, int], Period] = {}


def _begin_of_next(begin: datetime, kind: PeriodKind, anchor_day: int) -> datetime:
    """By the clock on the wall: days of 23 and 25 hours come out right."""
    if kind == "month":
        return _begin_of_month(begin.replace(day=1) + timedelta(days=32), anchor_day)
    return begin + timedelta(days=1)


def _begin_of_month(day: datetime, anchor_day: int) -> datetime:
    return day.replace(day=min(anchor_day, monthrange(day.year, day.month)[1]))


@dataclass(frozen=True, slots=True)
class Counts:
    """Raw tokens, as providers and reports count them. What a report did not split is in `tokens_used` only."""

    tokens_used: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.tokens_used + other.tokens_used,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_creation_input_tokens + other.cache_creation_input_tokens,
            self.cache_read_input_tokens + other.cache_read_input_tokens,
        )

    @property
    def as_tuple(self) -> tuple[int, int, int, int, int]:
        """In the order of COUNTS; what dataclasses have for it copies each number deeply."""
        return (
            self.tokens_used,
            self.input_tokens,
            self.output_tokens,
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        )


COUNTS = ("tokens_used", "input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def weighted_tokens(weights: Weights, counts: Iterable[tuple[str | None, Counts]]) -> int:
    """What counts against the limit, rounded up as a whole. Tokens that a report did not split are of weight 1."""
    if weights.are_plain:
        return sum(counted.tokens_used for _, counted in counts)
    exact = sum((weights.of_model(model) * _by_kind(weights, counted) for model, counted in counts), start=Decimal(0))
    return int(exact.to_integral_value(rounding=ROUND_CEILING))


def _by_kind(weights: Weights, counted: Counts) -> Decimal:
    split = (
        (counted.input_tokens, weights.input),
        (counted.output_tokens, weights.output),
        (counted.cache_creation_input_tokens, weights.cache_creation),
        (counted.cache_read_input_tokens, weights.cache_read),
    )
    return sum((tokens * (weight - 1) for tokens, weight in split if weight != 1), start=Decimal(counted.tokens_used))
