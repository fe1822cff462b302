"""What can go wrong, named by what the caller should do about it."""

from pydantic import ValidationError

PROBLEMS_TOLD_MAX = 5


class PoisonMessage(Exception):
    """This message can never be handled, however often it is delivered: quarantine it, then acknowledge."""


class Unavailable(Exception):
    """Nothing was decided and nothing was spent: ask again after `retry_after_s`."""

    def __init__(self, detail: str, *, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class Unanswered(Unavailable):
    """As Unavailable, but the question was heard: perhaps it was acted on, and only the answer is missing."""


class BadCall(Exception):
    """The answering service understood the call and rejects it as malformed: repeating it cannot help."""


class Misconfigured(Exception):
    """The process cannot start with what it was given; the message tells an operator what to change."""


def in_words(error: ValidationError) -> str:
    """What is wrong, field by field, and never the values: they may be secret."""
    told = []
    for problem in error.errors(include_input=False, include_url=False)[:PROBLEMS_TOLD_MAX]:
        where, what = [*map(str, problem["loc"])], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "union_tag_invalid":  # the one message of pydantic's that repeats what it was given
            where, what = ["type"], f"Input should be one of {problem['ctx']['expected_tags']}"
        told.append(f"{'.'.join(where)}: {what}" if where else what)
    return "; ".join(told)
