"""What chat put on the stream, applied: from then on every answer of quota's includes it."""

import asyncio

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from services.chat.deadline import Deadline
from shared import streams

log = structlog.get_logger()

ASK_AGAIN_S = 0.02


async def applied(nc: Client, sequence: int, deadline: Deadline) -> None:
    """Returns once quota has acknowledged the stream up to `sequence`, or when there is no time left for it.

    The event is durable by then; waiting for quota only makes "the next answer" true for the impatient.
    Quota acknowledges what its database has committed. A push (`quota.updated.<user>`) would not do: one also comes
    for whatever else happens to the user, and none for an event that was applied before anybody listened.
    """
    js = nc.jetstream()
    try:
        async with asyncio.timeout(deadline.left_s) as limit:
            # Its cancellation is swallowed where it comes together with an answer (asyncio's `wait_for` before 3.12).
            while not limit.expired():
                quota = await js.consumer_info(streams.STREAM, streams.QUOTA)
                if quota.ack_floor.stream_seq >= sequence:
                    return
                await asyncio.sleep(ASK_AGAIN_S)
            raise TimeoutError
    except (TimeoutError, NatsError, APIError, OSError) as error:
        log.warning("not_applied_yet", sequence=sequence, error=repr(error))
