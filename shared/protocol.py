"""Requests as they come from the wire. What is none is told as every error is (RFC 9457), not in plain text."""

import json

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# All that stands before the body. The parser itself would take any size into memory.
HEAD_BYTES_MAX = 256 * 1024


def _answer(status: int, title: str, detail: str) -> bytes:
    kind = f"urn:chatrail:problem:{title.lower().replace(' ', '-')}"
    body = json.dumps({"type": kind, "title": title, "status": status, "detail": detail})
    head = (
        f"HTTP/1.1 {status} {title}",
        "content-type: application/problem+json",
        f"content-length: {len(body)}",
        "cache-control: no-store",
        "x-content-type-options: nosniff",
        "connection: close",
    )
    return "\r\n".join([*head, "", body]).encode()


_UNREADABLE = _answer(
    400,
    "Unreadable request",
    "This is no HTTP/1.1 request that can be read. In an address write what is not ASCII as UTF-8, and encode it by "
    "%; it may take 64 KiB.",
)
_HEAD_TOO_LARGE = _answer(431, "Headers too large", "The headers of a request may take 256 KiB; send fewer of them.")


class Protocol(HttpToolsProtocol):
    _is_in_head, _head_bytes = False, 0

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(_UNREADABLE)
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def _should_upgrade(self) -> bool:
        """True, so that nothing is done yet where the parser stops behind a head that offers another protocol."""
        return True

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offered:
                data = self._without_offer() + data[offered.args[0] :]

    def _without_offer(self) -> bytes:
        """The head once more, without its offer: we stay with HTTP/1.1 (RFC 9110, section 7.8). The parser would
        take the body for the other protocol, and what of it comes later for a request."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":  # which is one without its header, too
            raise httptools.HttpParserError
        lines = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        return b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version.encode()), *lines, b"", b""])

    def _refuse(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()
