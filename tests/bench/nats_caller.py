"""A caller on NATS that reads the least of the protocol that tells an answer: what it does not spend, others can."""

import asyncio
from typing import Self, cast

HELLO = b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n'
INBOX = b"_INBOX.bench."


class Fault(Exception):
    """A reply with headers: nobody answers, or the answer is an error."""


class NatsCaller(asyncio.Protocol):
    """Any number of requests at once on one connection; those made in one turn of the loop leave together."""

    def __init__(self) -> None:
        self._received = b""
        self._unsent: list[bytes] = []
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._made = 0

    @classmethod
    async def connected(cls, port: int) -> Self:
        _, caller = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return caller

    def request(self, subject: str, body: bytes) -> asyncio.Future[bytes]:
        """The answer's body, in time. Raises Fault."""
        loop = asyncio.get_running_loop()
        self._made += 1
        token = b"%d" % self._made
        answer = self._waiting[token] = loop.create_future()
        if not self._unsent:
            loop.call_soon(self._send)
        self._unsent.append(b"PUB %s %s%s %d\r\n%s\r\n" % (subject.encode(), INBOX, token, len(body), body))
        return answer

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(HELLO + b"SUB " + INBOX + b"* 1\r\n")

    def data_received(self, data: bytes) -> None:
        received = self._received + data
        at = 0
        while (line_end := received.find(b"\r\n", at)) >= 0:
            line, begin = received[at:line_end], line_end + 2
            if line.startswith((b"MSG ", b"HMSG ")):
                kind, subject, *_, size = line.split()
                end = begin + int(size)
                if len(received) < end + 2:
                    break
                self._answered(subject.removeprefix(INBOX), received[begin:end], is_fault=kind == b"HMSG")
                at = end + 2
            else:
                if line == b"PING":
                    self._transport.write(b"PONG\r\n")
                at = begin
        self._received = received[at:]

    def connection_lost(self, _error: Exception | None) -> None:
        for token in list(self._waiting):
            self._answered(token, b"the connection is closed", is_fault=True)

    def _send(self) -> None:
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def _answered(self, token: bytes, body: bytes, *, is_fault: bool) -> None:
        answer = self._waiting.pop(token)
        if answer.done():
            return
        if is_fault:
            answer.set_exception(Fault(body.decode(errors="replace")))
        else:
            answer.set_result(body)
