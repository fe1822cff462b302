"""`explain`, the command: the story of one generation, from both databases as they are at this moment.

Beside a running stack or on a stopped one. Quota's is read with statements of its own, as an audit reads it.
"""

from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, text

from services.ledger import store
from services.ledger.scope import legible
from services.ledger.settings import Settings
from shared.calls import CountedStory, ExplainQuery, OpenHold
from shared.commands import command
from shared.database import UtcDateTime, now, snapshot
from shared.errors import Misconfigured
from shared.events import Authorized, Name
from shared.plans import COUNTS, Counts, Plans
from shared.story import Story, counted, in_words, story
from shared.subscriptions import Change

_name: TypeAdapter[str] = TypeAdapter(Name)
_MOMENTS: dict[str, Any] = dict.fromkeys(
    ("started_at", "expires_at", "period_start", "resets_at", "changed_at"), UtcDateTime
)


def explain(
    *,
    record: Annotated[str, typer.Option("--id", help="Of a generation, or of any record.")],
    user: Annotated[str | None, typer.Option(help="Whose it must be.")] = None,
    as_document: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Tell what was asked, granted, held, given and settled, by which plan and period, and in which event."""
    mine = None if user is None else _named(user, "'--user'")
    query = ExplainQuery(event_id=_named(record, "'--id'"), user_id=mine)
    with command():
        told = told_of(Settings.read(), query)
        if told is None:
            raise Misconfigured(
                f"Nothing is held or on record under {record}{f' for {user}' if user else ''}. "
                "A generation that was refused leaves nothing: the 429 itself said why."
            )
        if as_document:
            typer.echo(told.model_dump_json(indent=2))
        else:
            for line in in_words(told):
                typer.echo(line)


def told_of(settings: Settings, query: ExplainQuery) -> Story | None:
    """Raises Misconfigured where a database cannot be read."""
    plans = Plans.load(settings.plans)
    with snapshot(settings.database_url, store.usage, store.leaves, store.seals) as db:
        recorded = store.explain(db, query)
    with snapshot(settings.quota_url) as db:
        return story(query.event_id, recorded, _counted(db, plans, query))


def _counted(db: Connection, plans: Plans, query: ExplainQuery) -> CountedStory:
    hold, settlement = (_row(db, statement, query) for statement in (_HOLD, _SETTLEMENT))
    held = done = None
    if hold:
        authorized = {name: hold[name] for name in Authorized.model_fields}
        held = OpenHold(
            user_id=hold["user_id"],
            tokens=hold["hold_tokens"],
            started_at=hold["started_at"],
            expires_at=hold["expires_at"],
            is_expired=hold["expires_at"] <= now(db),
            authorized=Authorized.model_validate(authorized) if hold["tier"] else None,
        )
    if settlement:
        done = counted(
            plans,
            [Change(*row) for row in db.execute(_CHANGES, {"user_id": settlement["user_id"]})],
            at=settlement["started_at"],
            counts=Counts(*(settlement[name] for name in COUNTS)),
            model=settlement["model"],
            top_up_tokens=settlement["top_up_tokens"] + settlement["lasting_top_up_tokens"],
            is_late=bool(settlement["is_late"]),
        )
    user_id = (settlement or hold or {}).get("user_id")
    return CountedStory(user_id=user_id, hold=held, settled=done)


def _row(db: Connection, statement: Any, query: ExplainQuery) -> dict[str, Any] | None:
    """Where a user is named, none of another's."""
    found = db.execute(statement, {"id": query.event_id}).mappings().first()
    return dict(found) if found and query.user_id in (None, found["user_id"]) else None


def _named(given: str, option: str) -> str:
    try:
        return _name.validate_python(given and legible(given, option))
    except ValidationError:
        raise typer.BadParameter(
            "it has 1 to 128 characters, none of them a control character", param_hint=option
        ) from None


_HOLD = text(
    "SELECT user_id, started_at, expires_at, input_tokens_max, output_tokens_asked,"
    " output_tokens AS output_tokens_granted, tokens AS hold_tokens, tier, period,"
    " CASE WHEN resets_at IS NOT NULL THEN period_start END AS period_start, resets_at"
    " FROM holds WHERE generation_id = :id"
).columns(**{name: kind for name, kind in _MOMENTS.items() if name != "changed_at"})
_SETTLEMENT = text("SELECT * FROM settlements WHERE event_id = :id").columns(started_at=UtcDateTime)
_CHANGES = text("SELECT changed_at, event_id, tier, time_zone FROM plan_changes WHERE user_id = :user_id").columns(
    changed_at=UtcDateTime
)
