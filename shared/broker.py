"""One way to connect to NATS, with the client's dangerous defaults put right, and one way to call over it."""

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypedDict

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError, OutboundBufferLimitError

from shared.errors import BadCall, Unanswered, Unavailable

log = structlog.get_logger()

ERROR_CODE = "Nats-Service-Error-Code"
ERROR = "Nats-Service-Error"

# What the client raises when the broker went first. The RuntimeError is uvloop's, of a transport that is closed.
BROKER_GONE = (NatsError, OSError, RuntimeError)
CLOSE_S = 2.0
CANCEL_AGAIN_S = 0.5
# As long as a supervisor waits.
ENDS_WITHIN_S = 20.0
_ending = threading.Event()

# Of one question. A service that is there answers in a hundredth of it.
TIMEOUT_S = 1.2


class Connection(Client):
    """A client that gives up what it could not send. By itself it looks for another node only once all is sent.

    It also ends a link over which a node has taken its call and said nothing, before it tries the next. By itself it
    leaves the socket to the garbage collector.

    It also reads what comes on a subject that is not UTF-8, which the broker lets everybody publish. By itself it
    then stops reading for good, and again after each restart, because the stream delivers the message again.

    And whoever asks while the first attempts to connect fail is answered afterwards. By itself it then takes its
    inbox for subscribed, which it never will be.

    And it calls nobody any more once it is closed. By itself it goes on for ever where it is closed in the moment in
    which a node takes its call, and keeps its process from ending.
    """

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        calling = self._reconnection_task
        if calling and calling is not asyncio.current_task():
            await cancelled(calling)
        await super()._close(status, do_cbs)

    async def _attempt_reconnect(self) -> None:
        self._abandon()
        await super()._attempt_reconnect()

    async def _connect_to_server(self, server: Any) -> None:
        self._abandon()
        await super()._connect_to_server(server)

    def _abandon(self) -> None:
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer:
            self._transport._io_writer.transport.abort()

    async def _init_request_sub(self) -> None:
        try:
            await super()._init_request_sub()
        except NatsError:
            self._resp_sub_prefix = None
            raise

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        build: Callable[..., Msg] = super()._build_message
        try:
            return build(sid, subject, reply, data, headers)
        except UnicodeDecodeError:
            return build(sid, subject.decode(errors="replace").encode(), reply, data, headers)


class ConnectOptions(TypedDict):
    servers: list[str]
    name: str
    max_reconnect_attempts: int
    reconnect_time_wait: int
    connect_timeout: int
    ping_interval: int
    max_outstanding_pings: int
    inbox_prefix: bytes
    error_cb: Callable[[Exception], Awaitable[None]]
    disconnected_cb: Callable[[], Awaitable[None]]
    reconnected_cb: Callable[[], Awaitable[None]]
    closed_cb: Callable[[], Awaitable[None]]


def connect_options(url: str, name: str) -> ConnectOptions:
    """Reconnect for ever, and notice a dead link within twelve seconds. `url` may name several nodes, by commas.

    By default the client gives up after 60 attempts without a word and needs minutes to notice a dead link.
    `inbox_prefix` lets permissions list `_INBOX_<name>.>`.
    """

    async def failed(error: Exception) -> None:
        log.warning("nats_error", error=repr(error))

    async def disconnected() -> None:
        log.warning("nats_disconnected")

    async def reconnected() -> None:
        log.info("nats_reconnected")

    async def closed() -> None:
        log.info("nats_closed")

    return {
        "servers": [node.strip() for node in url.split(",")],
        "name": f"chatrail-{name}",
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 1,
        "connect_timeout": 2,
        "ping_interval": 3,
        "max_outstanding_pings": 2,
        "inbox_prefix": f"_INBOX_{name}".encode(),
        "error_cb": failed,
        "disconnected_cb": disconnected,
        "reconnected_cb": reconnected,
        "closed_cb": closed,
    }


async def connect(url: str, *, name: str) -> Client:
    """A client that fails at once while disconnected; by default it sends later what it said had failed."""
    nc = Connection()
    await nc.connect(pending_size=0, **connect_options(url, name))
    return nc


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Returns when they have ended, however that was.

    A cancellation that comes together with an answer is swallowed (by asyncio's `wait_for` before Python 3.12), and
    so is one that comes while nats-py writes: it is said until it is heard.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)


async def close(nc: Client) -> None:
    """Send what is left to send, if the broker is there to hear it: one that is gone keeps nobody from ending."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await nc.close()
    except BROKER_GONE as error:
        log.warning("nats_not_closed_in_order", error=repr(error))


def end_process(reason: str) -> None:
    """Stop this process in order, so that its supervisor starts a fresh one: some states are not worth repairing.

    Nobody else is there to lose patience, where what cannot go on cannot end either.
    """
    log.critical("process_ends", reason=reason)
    if _ending.is_set():
        return  # told twice, a service does not wait for what it could still finish
    _ending.set()
    impatience = threading.Timer(ENDS_WITHIN_S, os._exit, [1])
    impatience.daemon = True
    impatience.start()
    os.kill(os.getpid(), signal.SIGTERM)


class Encodable(Protocol):
    def model_dump_json(self) -> str: ...


async def call(nc: Client, subject: str, request: Encodable, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """The answer's body, as the service wrote it.

    Raises BadCall when the service rejects the request, Unavailable when it cannot be asked or cannot answer,
    Unanswered when nobody knows whether it did what it was asked.
    """
    service, body = subject.partition(".")[0], request.model_dump_json().encode()
    try:
        reply = await nc.request(subject, body, timeout=timeout_s)
    except (NoRespondersError, OutboundBufferLimitError) as error:
        raise Unavailable(f"The {service} service cannot be asked right now.") from error
    except (NatsError, OSError) as error:
        raise Unanswered(f"The {service} service does not answer right now.") from error
    if reply.headers and (code := reply.headers.get(ERROR_CODE)):
        detail = reply.headers.get(ERROR, "")
        raise {"400": BadCall, "504": Unanswered}.get(code, Unavailable)(detail)
    return reply.data
