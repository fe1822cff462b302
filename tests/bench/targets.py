"""The three that are asked, each in its own words, for the same answer."""

import json
from collections.abc import Mapping

from tests.bench.load import Target
from tests.bench.system import System

# People come back after seconds, not milliseconds: each caller speaks for one after the other of these.
USERS = 6400
MODEL = "claude-haiku-4-5"
MESSAGES = [{"role": "user", "content": "[deltas 20] How do I know that a bill is right?"}]

DIRECT, CHATRAIL, LIMIT = "direct", "ChatRail", "bare limit"


def targets(system: System) -> dict[str, Target]:
    to_claude = _request(
        "/v1/messages",
        {"model": MODEL, "max_tokens": 4096, "stream": True, "messages": MESSAGES},
        {"x-api-key": "simulated", "anthropic-version": "2023-06-01"},
    )
    to_chat = [_request("/api/chat", {"userId": f"user_{nth}", "messages": MESSAGES}) for nth in range(USERS)]
    claudes_end = b"event: message_stop"
    return {
        DIRECT: Target(system.claude_port, [to_claude], claudes_end),
        LIMIT: Target(system.limit_port, [to_claude], claudes_end),
        CHATRAIL: Target(system.chat_port, to_chat, b"event: done"),
    }


def _request(path: str, body: object, headers: Mapping[str, str] = {}) -> bytes:
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content
