"""Quota as its callers meet it: processes of the service on a real broker, and the calls that they answer."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
from nats.aio.client import Client
from nats.errors import Error as NatsError

from shared import broker, calls, streams
from shared.broker import connect
from shared.calls import Authorization, Authorize, Usage, UsageAnswer, UsageQuery, authorization
from tests import forked
from tests.fixtures import MIB, START_DEADLINE_S, eventually
from tests.forked import Forked
from tests.stack import environment, free_port

# What a killed replica had taken comes again after this, and not after half a minute.
ACK_WAIT_S = 2
# A call here may wait for the machine's other work; that it is answered at all is what is tested.
PATIENCE_S = 20
SERVE = ("services.quota", "serve")


@dataclass
class Replica:
    """A process of the service. Bound to no event loop: any test can use it."""

    settings: dict[str, str]
    log: Path
    command: Sequence[str] = SERVE
    url: str = field(init=False)
    process: Forked = field(init=False)

    def start(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as log:
            variables = environment(**self.settings, CHATRAIL_PORT=str(port))
            self.process = forked.start(*self.command, env=variables, output=log)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "quota did not start in time"
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(START_DEADLINE_S)

    def said(self, event: str) -> list[dict[str, Any]]:
        """The lines of its log about `event`."""
        lines = map(json.loads, self.log.read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def _is_ready(self) -> bool:
        with suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/readyz", trust_env=False, verify=False).is_success
        return False


@dataclass(frozen=True)
class Quota:
    replicas: list[Replica]
    database_url: str


@contextmanager
def started(replicas: Sequence[Replica]) -> Iterator[None]:
    """All of them are ready; in the end each is told to stop, and does so in order."""
    with ExitStack() as stack:
        for replica in replicas:
            replica.start()
            stack.callback(replica.stop)
        for replica in replicas:
            replica.wait_until_ready()
        yield
        assert [replica.stop() for replica in replicas] == [-signal.SIGTERM] * len(replicas)


async def create_stream(url: str) -> None:
    """The empty stream; what a killed process had taken comes again soon."""
    nats = await connect(url, name="test")
    js = nats.jetstream()
    await streams.create(js, max_bytes=64 * MIB)
    await js.delete_consumer(streams.STREAM, streams.QUOTA)
    await js.add_consumer(streams.STREAM, replace(streams.durable(streams.QUOTA), ack_wait=ACK_WAIT_S))
    await nats.close()


async def authorize(nats: Client, request: Authorize, *, timeout_s: float = PATIENCE_S) -> Authorization:
    return authorization.validate_json(await broker.call(nats, calls.AUTHORIZE, request, timeout_s=timeout_s))


async def authorize_once(nats: Client, request: Authorize, *, timeout_s: float = PATIENCE_S) -> Authorization | None:
    """Asked one time only, as `broker.call` does not; None where no answer came in time, or a 503."""
    try:
        reply = await nats.request(calls.AUTHORIZE, request.model_dump_json().encode(), timeout=timeout_s)
    except NatsError:
        return None
    if reply.headers:
        assert reply.headers[broker.ERROR_CODE] == "503"
        return None
    return authorization.validate_json(reply.data)


async def usage_of(nats: Client, user_id: str, *, timeout_s: float = PATIENCE_S) -> Usage:
    body = await broker.call(nats, calls.USAGE, UsageQuery(user_id=user_id), timeout_s=timeout_s)
    return UsageAnswer.model_validate_json(body).usage


async def everything_is_acknowledged(nats: Client) -> None:
    # Counted from the stream's end: a consumer learns of a new event a moment after its publisher does.
    last = (await nats.jetstream().stream_info(streams.STREAM)).state.last_seq

    async def look() -> bool:
        consumer = await nats.jetstream().consumer_info(streams.STREAM, streams.QUOTA)
        return consumer.ack_floor is not None and consumer.ack_floor.stream_seq >= last

    await eventually(look)
