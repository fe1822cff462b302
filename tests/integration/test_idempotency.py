"""Events under a key, where the stream is heard to have them and where it is not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from services.chat.adjustments import Adjustments
from services.chat.deadline import Deadline
from services.chat.idempotency import publish_once
from services.chat.problems import Problem
from shared import streams
from shared.broker import Connection, connect_options
from shared.errors import Unavailable
from tests.builders import usage_adjusted, usage_reported
from tests.fixtures import eventually
from tests.proxy import Mode, Proxy

BODY = b"the body"


class Harmed(Connection):
    """Its link takes harm with a request to a subject: from then on, once."""

    link: Proxy
    harm: dict[str, Mode]

    async def request(self, subject: str, *args: Any, **kw: Any) -> Any:
        for prefix in [prefix for prefix in self.harm if subject.startswith(prefix)]:
            self.link.set(self.harm.pop(prefix))
        return await super().request(subject, *args, **kw)


@asynccontextmanager
async def harmed(nats: Client, harm: dict[str, Mode]) -> AsyncIterator[Harmed]:
    assert nats.connected_url is not None
    async with Proxy("127.0.0.1", nats.connected_url.port or 0) as link:
        client = Harmed()
        client.link, client.harm = link, harm
        await client.connect(pending_size=0, **connect_options(f"nats://127.0.0.1:{link.port}", "chat"))
        yield client
        await client.close()


async def healed(client: Harmed) -> None:
    client.link.set("pass")

    async def is_answered() -> bool:
        try:
            await client.jetstream(timeout=0.5).stream_info(streams.STREAM)
        except (NatsError, OSError):
            return False
        return True

    await eventually(is_answered)


async def stored(nats: Client) -> int:
    return (await nats.jetstream().stream_info(streams.STREAM)).state.messages


@pytest.mark.parametrize("harm", ["deaf", "mute"])
@pytest.mark.parametrize("key", ["a key of theirs", None])
async def test_of_an_adjustment_that_may_be_on_the_stream_the_key_is_told_with_which_a_repeat_counts_once(
    nats: Client, harm: Mode, key: str | None
) -> None:
    async with harmed(nats, {streams.keyed_adjustment(""): harm}) as client:
        with pytest.raises(Problem) as told:
            await Adjustments(client).record(usage_adjusted(), Deadline(), key=key, body=BODY)
        assert told.value.status == 503
        named = told.value.document["idempotencyKey"]
        assert named in told.value.document["detail"]
        assert key in (None, named)

        await healed(client)
        assert await stored(nats) == (harm == "mute")
        ids = {await Adjustments(client).record(usage_adjusted(), Deadline(), key=named, body=BODY) for _ in range(2)}

    assert (len(ids), await stored(nats)) == (1, 1)


async def test_where_nobody_can_tell_whether_a_key_is_new_nothing_is_recorded(nats: Client) -> None:
    async with harmed(nats, {f"$JS.API.STREAM.MSG.GET.{streams.KEYS}": "deaf"}) as client:
        with pytest.raises(Unavailable):
            await publish_once(client, usage_reported(), Deadline(), subject_of=streams.keyed, key="a", body=BODY)
        await healed(client)
        assert await stored(nats) == 0
        await publish_once(client, usage_reported(), Deadline(), subject_of=streams.keyed, key="a", body=BODY)
    assert await stored(nats) == 1
