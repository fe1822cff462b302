"""What can go wrong, named by what the caller should do about it."""


class PoisonMessage(Exception):
    """This message can never be handled, however often it is delivered: quarantine it, then acknowledge."""


class Unavailable(Exception):
    """Nothing was decided and nothing was spent: ask again after `retry_after_s`."""

    def __init__(self, detail: str, *, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class BadCall(Exception):
    """The answering service understood the call and rejects it as malformed: repeating it cannot help."""


class Misconfigured(Exception):
    """The process cannot start with what it was given; the message tells an operator what to change."""
