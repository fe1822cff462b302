"""Whose records an operator looks at, and of when: what audits and exports are asked for."""

from datetime import UTC, datetime, time
from typing import NamedTuple

import typer


class Scope(NamedTuple):
    """A user, and from which moment to which, both included; all where nothing is said."""

    user_id: str | None = None
    first: datetime | None = None
    last: datetime | None = None

    def covers(self, moment: datetime) -> bool:
        return (self.first is None or self.first <= moment) and (self.last is None or moment <= self.last)


def asked(user: str | None, first: str | None, last: str | None) -> Scope:
    """Of the options --user, --from and --to. Raises BadParameter, in words, for what makes no sense."""
    if user == "":
        raise typer.BadParameter("an empty name is nobody's; leave it out for everybody", param_hint="'--user'")
    if user is not None:
        legible(user, "'--user'")
    scope = Scope(user, _moment(first, time.min, "'--from'"), _moment(last, time.max, "'--to'"))
    if scope.first and scope.last and scope.first > scope.last:
        raise typer.BadParameter(f"{first} is after --to, {last}", param_hint="'--from'")
    return scope


def legible(given: str, option: str) -> str:
    """Of a user or a record. Raises BadParameter for what can be nobody's."""
    if not given:
        raise typer.BadParameter("an empty name is nobody's", param_hint=option)
    try:
        given.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is no UTF-8, and every name is", param_hint=option) from None
    return given


def _moment(text: str | None, time_of_day: time, option: str) -> datetime | None:
    """A day in UTC (2026-11-30) at `time_of_day`, or a moment as it is (RFC 3339)."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if len(text) == len("2026-11-30"):
            return datetime.combine(moment, time_of_day, UTC)
        if moment.tzinfo:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise typer.BadParameter(
        f"{text!r} is neither a day, as 2026-11-30, nor a moment, as 2026-11-30T12:00:00Z", param_hint=option
    )
