"""Plans and their periods: pure rules, no I/O but reading the one file."""

import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import Misconfigured, in_words

PLANS_FILE = Path(__file__).with_name("plans.toml")

PeriodKind = Literal["day", "month", "none"]


def _known_zone(name: str) -> str:
    zone(name)
    return name


@lru_cache(maxsize=1024)
def zone(name: str) -> ZoneInfo:
    """The IANA time zone. Raises ValueError for a name that does not exist."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError, ValueError):
        raise ValueError(f"{name!r} is not a time zone; use an IANA name such as 'Europe/Berlin'") from None


TimeZone = Annotated[str, AfterValidator(_known_zone)]
Weight = Annotated[Decimal, Field(ge=0, le=1000)]


class Weights(BaseModel):
    """How much a token of each kind counts against the limit. Raw counts are kept, so a change needs no replay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Weight = Decimal(1)
    output: Weight = Decimal(1)
    cache_creation: Weight = Decimal(1)
    cache_read: Weight = Decimal(1)


class Plan(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tier: str
    limit_tokens: int | None = Field(default=None, ge=0, le=10**15)
    period: PeriodKind
    price_per_1k_usd: Decimal | None = Field(default=None, ge=0)
    upgrade_to: str | None = None
    time_zone: TimeZone = "UTC"
    output_tokens_min: int = Field(default=64, ge=1, le=128_000)
    weights: Weights = Weights()

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
        """Raises Misconfigured, in words, when the file cannot be read or makes no sense."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
            plans = {tier: {"tier": tier, **plan} for tier, plan in document.get("plans", {}).items()}
            return cls.model_validate({**document, "plans": plans})
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Misconfigured(f"The plans file {path} cannot be read: {error}") from error
        except ValidationError as error:
            raise Misconfigured(f"The plans file {path} is wrong: {in_words(error)}") from error
        except (TypeError, AttributeError) as error:
            raise Misconfigured(f"The plans file {path} is wrong: {error}") from error


@dataclass(frozen=True, slots=True)
class Period:
    """A calendar period, [start, end) in UTC. A plan without periods has one that began with the epoch."""

    start: datetime
    end: datetime | None

    def covers(self, moment: datetime) -> bool:
        return self.start <= moment and (self.end is None or moment < self.end)

    @classmethod
    def containing(cls, moment: datetime, kind: PeriodKind, time_zone: str = "UTC") -> "Period":
        if kind == "none":
            return cls(datetime(1970, 1, 1, tzinfo=UTC), None)
        there = zone(time_zone)
        midnight = moment.astimezone(there).replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        if kind == "month":
            midnight = midnight.replace(day=1)
            after = (midnight + timedelta(days=32)).replace(day=1)
        else:
            after = midnight + timedelta(days=1)
        # Wall-clock arithmetic in the zone, then UTC: days of 23 and 25 hours come out right.
        return cls(midnight.astimezone(UTC), after.astimezone(UTC))


def weighted_tokens(
    weights: Weights,
    *,
    tokens_used: int,
    input_tokens: int,
    output_tokens: int,
    cache_creation_input_tokens: int,
    cache_read_input_tokens: int,
) -> int:
    """What counts against the limit. Tokens that a report did not split count once, rounded up as a whole."""
    split = (
        (input_tokens, weights.input),
        (output_tokens, weights.output),
        (cache_creation_input_tokens, weights.cache_creation),
        (cache_read_input_tokens, weights.cache_read),
    )
    extra = sum((tokens * (weight - 1) for tokens, weight in split if weight != 1), start=Decimal(0))
    return tokens_used + int(extra.to_integral_value(rounding=ROUND_CEILING))
