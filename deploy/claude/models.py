"""The models the stand-in answers for: those the SDK names, without the retired ones."""

from typing import Any

from deploy.claude.errors import ApiError

# Answers name the snapshot, as the provider's do, whichever of the two was asked for.
SNAPSHOTS = {
    "claude-opus-4-5": "claude-opus-4-5-20251101",
    "claude-haiku-4-5": "claude-haiku-4-5-20251001",
    "claude-sonnet-4-5": "claude-sonnet-4-5-20250929",
}
MODELS = (
    "claude-fable-5-2",
    "claude-mythos-5-2",
    "claude-haiku-5-5",
    "claude-sonnet-5-5",
    "claude-fable-5-1",
    "claude-opus-5-5",
    "claude-mythos-5-1",
    "claude-sonnet-5",
    "claude-fable-5",
    "claude-mythos-5",
    "claude-opus-5",
    "claude-opus-4-8",
    "claude-opus-4-7",
    "claude-opus-4-6",
    "claude-sonnet-4-6",
    *SNAPSHOTS.values(),
)
RETIRES_AT = {"claude-sonnet-4-5-20250929": "2026-11-30T00:00:00Z"}


def resolve(model: str) -> str:
    """The snapshot that answers for an id or an alias; 404 for one unknown or retired."""
    snapshot = SNAPSHOTS.get(model, model)
    if snapshot not in MODELS:
        raise ApiError(404, f"model: {model}")
    return snapshot


def describe(snapshot: str) -> dict[str, Any]:
    _, family, *version = snapshot.split("-")
    date = version.pop() if len(version[-1]) == 8 else "19700101"
    return {
        "type": "model",
        "id": snapshot,
        "display_name": f"Claude {family.title()} {'.'.join(version)}",
        "created_at": f"{date[:4]}-{date[4:6]}-{date[6:]}T00:00:00Z",
        "lifecycle": "deprecated" if snapshot in RETIRES_AT else "active",
        "retires_at": RETIRES_AT.get(snapshot),
    }


def page(*, after_id: str | None, before_id: str | None, limit: int) -> dict[str, Any]:
    """One page of the catalogue, newest model first; 404 for a cursor that is no model."""
    start = MODELS.index(resolve(after_id)) + 1 if after_id else 0
    stop = MODELS.index(resolve(before_id)) if before_id else len(MODELS)
    listed = MODELS[start:stop]
    shown = listed[-limit:] if before_id else listed[:limit]
    return {
        "data": [describe(model) for model in shown],
        "has_more": len(listed) > len(shown),
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
    }
