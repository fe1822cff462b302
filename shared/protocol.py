"""Requests as they come from the wire. What is none is told as every error is (RFC 9457), not in plain text."""

import json

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
        super().data_received(data)
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

    def send_400_response(self, msg: str) -> None:
        self._refuse(_UNREADABLE)

    def _refuse(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()
