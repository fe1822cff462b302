"""One decision, said in every convention: RateLimit header fields, Retry-After, and the problem document of a 429."""

from collections.abc import Iterable

from services.chat.problems import Problem
from shared.calls import LimitState, Refused

_NAMES = {"day": "daily", "month": "monthly", "none": "total"}


def headers(limits: Iterable[LimitState]) -> dict[str, str]:
    """`RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers, structured fields), in tokens.

    An item for each limit of the plan; a plan without limits has neither field.
    """
    known = list(limits)
    if not known:
        return {}
    return {
        "RateLimit-Policy": ", ".join(_item(limit, q=limit.limit_tokens, w=limit.window_s) for limit in known),
        "RateLimit": ", ".join(_item(limit, r=limit.remaining_tokens, t=limit.resets_in_s) for limit in known),
    }


def _item(limit: LimitState, **parameters: int | None) -> str:
    told = (f";{name}={value}" for name, value in parameters.items() if value is not None)
    return f'"{_NAMES[limit.period]}"{"".join(told)}'


def refusal(refused: Refused) -> Problem:
    """429: which plan to upgrade to, what is left, when it resets, and when it makes sense to ask again.

    That is never for a question that the whole plan has no room for. (Where nothing is left, that is what is told,
    and how long a question really is was not even asked.)
    """
    usage = refused.usage
    upgrade = f"Upgrade to {usage.upgrade_to.capitalize()}" if usage.upgrade_to else None
    retry = {"Retry-After": str(refused.retry_after_s)}
    if refused.reason == "concurrency":
        title = "Too many generations at once"
        detail = "This plan has no room for another answer while others are being written; try again in a moment"
    elif refused.exceeds_plan and usage.tokens_remaining:
        title, retry = "Token limit exceeded", {}
        shorten = "shorten the conversation: it takes more tokens than the whole plan has"
        detail = f"{upgrade}, or {shorten}" if upgrade else shorten.capitalize()
    else:
        title, detail = "Token limit exceeded", upgrade or "This plan's tokens are used up"
    return Problem(
        429,
        title,
        detail,
        headers={**retry, **headers(refused.limits)},
        **usage.model_dump(mode="json"),
        tokensAvailable=refused.tokens_available,
    )
