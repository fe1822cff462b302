"""An operator's credit, refund, charge or top-up: on the stream once, and answered when quota counts it."""

from nats.aio.client import Client

from services.chat.applied import applied
from services.chat.deadline import Deadline
from services.chat.idempotency import publish_once
from services.chat.problems import Problem
from shared import streams
from shared.errors import Unanswered
from shared.events import UsageAdjusted, new_id


class Adjustments:
    def __init__(self, nc: Client) -> None:
        self._nc = nc

    async def record(self, event: UsageAdjusted, deadline: Deadline, *, key: str | None, body: bytes) -> str:
        """The id of the event: for a key that came before, of the first. Once a key, for ever and across replicas.

        One that comes without a key gets one here. When the stream does not answer, nobody knows whether it has the
        adjustment, and a credit given twice is money: the 503 names the key with which a repeat counts once.
        (Reports without a key go to the outbox then; it keeps generations only.)

        Raises Problem 409 when the key came with another body before, Problem 503 when it is not known whether it is
        recorded, Unavailable when nothing is.
        """
        key = key or new_id()
        try:
            recorded = await publish_once(
                self._nc, event, deadline, subject_of=streams.keyed_adjustment, key=key, body=body
            )
        except Unanswered as error:
            raise _not_confirmed(key) from error
        await applied(self._nc, recorded.sequence, deadline)
        return recorded.event_id


def _not_confirmed(key: str) -> Problem:
    return Problem(
        503,
        "Adjustment not confirmed",
        "The usage stream does not answer, and perhaps it has the adjustment already. Send the same body again "
        f"with the header Idempotency-Key: {key} and it counts once.",
        headers={"Retry-After": "1"},
        idempotencyKey=key,
    )
