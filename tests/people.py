"""People who chat, and the three counts that must agree in the end: the provider's, the ledger's, the totals'."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.stack import Stack


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person saw: the text, and the last word (`done`, `error`, or `cut` when the connection broke)."""

    text: str
    last: str
    data: dict[str, Any]


async def ask(client: httpx2.AsyncClient, user_id: str, question: str, **fields: Any) -> Answer:
    """One message through POST /api/chat. Raises httpx2.HTTPStatusError when it is refused."""
    body = {"userId": user_id, "messages": [{"role": "user", "content": question}], **fields}
    text, event, data = [], "", {}
    try:
        async with client.stream("POST", "/api/chat", json=body) as response:
            if response.is_error:
                await response.aread()
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    if event == "delta":
                        text.append(data["text"])
    except httpx2.TransportError:
        event = "cut"
    return Answer("".join(text), event, data)


async def ask_until_answered(client: httpx2.AsyncClient, user_id: str, question: str) -> Answer:
    """As a patient person does: after a 503 or a dead connection, ask again until there is an answer."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await ask(client, user_id, question)
                if answer.last != "cut" or answer.text:
                    return answer
            except httpx2.HTTPStatusError as refused:
                if refused.response.status_code != 503 or "retry-after" not in refused.response.headers:
                    raise
            await asyncio.sleep(0.2)


def client_of(stack: Stack) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=200)
    return httpx2.AsyncClient(base_url=stack.url, trust_env=False, verify=False, timeout=60, limits=limits)


async def given(stack: Stack) -> dict[str, Any]:
    """What the provider says that it gave."""
    async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
        counts: dict[str, Any] = (await client.get(f"{stack.endpoints['claude']}/given?records=1")).json()
    return counts


async def asked(stack: Stack) -> int:
    """How many messages reached the provider, answered or not."""
    return int((await given(stack))["messageRequests"])


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def recorded(stack: Stack) -> int:
    return int(rows(stack.data / "ledger.db", "SELECT coalesce(sum(tokens_used), 0) FROM usage")[0][0])


def totalled(stack: Stack) -> int:
    return int(rows(stack.data / "quota.db", "SELECT coalesce(sum(tokens_used), 0) FROM usage_totals")[0][0])


def open_holds(stack: Stack) -> int:
    return int(rows(stack.data / "quota.db", "SELECT count(*) FROM holds")[0][0])


def contents(folder: Path) -> Iterator[bytes]:
    """Of all files, but for those that go while they are looked at: the broker writes beside, and renames."""
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if file.is_file():
                yield file.read_bytes()
