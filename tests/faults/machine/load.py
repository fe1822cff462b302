"""People who chat, and back ends that report, adjust and change plans: all through chat's HTTP API.

What is asked is written to the log before it is sent, under an id that travels with it: as the stand-in's tag, as the
event's conversationId, as a report's metadata, as an adjustment's reason. So every count can be found again.
"""

import asyncio
import json
import random
from typing import Any

import aiohttp
from nats.errors import Error as NatsError

from services.chat.claude import Prompt
from shared.broker import connect
from shared.streams import GENERATION_COMPLETED
from tests.faults.machine.log import OperationLog

WORKERS = 20
PEOPLE, TIGHT, CHANGING = 30, 6, 4
TIGHT_TOKENS = 12_000
PLANS = f"""\
default = "roomy"
[plans.roomy]
limit_tokens = 90_000_000
period = "month"
upgrade_to = "open"
[plans.tight]
limit_tokens = {TIGHT_TOKENS}
period = "month"
upgrade_to = "roomy"
[plans.open]
period = "month"
"""
TIMEOUT = aiohttp.ClientTimeout(total=90, connect=5)
REPEATS_MAX = 8

# What a question may ask of the stand-in, and how often. Cached input is less than the question's bytes.
MANNERS = (
    ("", 40),
    ("[slow 30ms]", 16),
    ("[slow 60ms] [deltas 60]", 6),
    ("[first-byte 400ms]", 4),
    ("[cache creation=60 read=90]", 8),
    ("[repeat-delta-usage]", 5),
    ("[split]", 5),
    ("[usage output=500]", 5),
    ("[fail middle]", 5),
    ("[cut middle]", 4),
    ("[fail 529]", 2),
)
WORK = (
    ("stream", 46),
    ("leave", 12),
    ("json", 12),
    ("keyed report", 10),
    ("report", 5),
    ("adjustment", 5),
    ("plan", 2),
    ("poison", 1),
    ("look", 8),
)
FILLER = "Tell me more about it, and take your time with the details. " * 20


class Load:
    """Workers that take turns at everything, from `start` until `stop`."""

    def __init__(self, url: str, nats_url: str, log: OperationLog, *, seed: int, pause_s: float) -> None:
        self._url, self._nats_url, self._log, self._pause_s = url, nats_url, log, pause_s
        self._chances = [random.Random(f"load {seed} {n}") for n in range(WORKERS)]  # noqa: S311 - no secret
        self._count = 0
        self._is_over = asyncio.Event()

    async def prepare(self) -> None:
        """The people near their limit get their plan before anything is asked."""
        self._http = aiohttp.ClientSession(
            self._url, timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0), trust_env=False
        )
        for n in range(TIGHT):
            if await self._change_plan(f"tight {n}", "tight") == 200:
                self._log.write("limited", user=f"tight {n}", limit_tokens=TIGHT_TOKENS)

    def start(self) -> None:
        self._working = [asyncio.create_task(self._work(chance)) for chance in self._chances]

    async def stop(self) -> None:
        """Returns when everybody has an answer, or has given up."""
        self._is_over.set()
        await asyncio.gather(*self._working)
        await self._http.close()

    async def _work(self, chance: random.Random) -> None:
        while not self._is_over.is_set():
            (what,) = chance.choices([name for name, _ in WORK], [weight for _, weight in WORK])
            await self._do(what, chance)
            await asyncio.sleep(chance.uniform(0, 2 * self._pause_s))

    async def _do(self, what: str, chance: random.Random) -> None:
        match what:
            case "stream" | "leave" | "json":
                await self._chat(what, chance)
            case "report" | "keyed report":
                await self._report(chance, is_keyed=what == "keyed report")
            case "adjustment":
                await self._adjust(chance)
            case "plan":
                await self._change_plan(f"changing {chance.randrange(CHANGING)}", chance.choice(["open", "roomy"]))
            case "poison":
                await self._poison(chance)
            case "look":
                await self._look(chance)

    def _asked(self, what: str, **fields: Any) -> str:
        self._count += 1
        op = f"op-{self._count}"
        self._log.write("asked", op=op, request=what, **fields)
        return op

    async def _chat(self, how: str, chance: random.Random) -> None:
        user = chance.choices([f"tight {chance.randrange(TIGHT)}", f"person {chance.randrange(PEOPLE)}"], [1, 5])[0]
        (manner,) = chance.choices([manner for manner, _ in MANNERS], [weight for _, weight in MANNERS])
        tokens_max = chance.choice([120, 400, 1000])
        filler = FILLER[: chance.randrange(200, len(FILLER))]
        op = f"op-{self._count + 1}"
        prompt = Prompt(
            "claude-haiku-4-5", [{"role": "user", "content": f"[tag {op}] {manner} {filler}"}], None, tokens_max
        )
        self._asked(
            "chat",
            user=user,
            how=how,
            manner=manner,
            input_tokens_least=prompt.input_tokens_estimate,
            input_tokens_most=prompt.input_tokens_max,
            output_tokens_most=tokens_max,
        )
        body = {
            "userId": user,
            "messages": prompt.messages,
            "maxTokens": tokens_max,
            "conversationId": op,
        }
        accept = "application/json" if how == "json" else "text/event-stream"
        leaves_after = chance.randrange(1, 12) if how == "leave" else None
        seen: dict[str, Any] = {"last": "nothing", "text_bytes": 0}
        try:
            async with self._http.post("/api/chat", json=body, headers={"Accept": accept}) as answer:
                seen["status"] = answer.status
                if how == "json" or answer.status != 200:
                    _take_document(seen, answer.status, await answer.json())
                else:
                    await _read_stream(seen, answer, leaves_after)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            seen["failed"] = type(error).__name__
        self._log.write("answered", op=op, **seen)
        if seen.get("status") != 200:
            await asyncio.sleep(0.2)

    async def _report(self, chance: random.Random, *, is_keyed: bool) -> None:
        tokens = chance.randrange(1, 5_000)
        user = f"person {chance.randrange(PEOPLE)}"
        op = self._asked("report", user=user, tokens=tokens, is_keyed=is_keyed)
        told = {"inputTokens": tokens, "outputTokens": 0, "model": "claude-haiku-4-5", "op": op}
        body = {"userId": user, "actionType": "import", "tokensUsed": tokens, "metadata": told}
        await self._post_until_accepted(op, "/api/usage", body, key=op if is_keyed else None)
        if is_keyed and chance.random() < 0.3:  # whoever is not sure asks again, much later too
            await self._post_until_accepted(op, "/api/usage", body, key=op)

    async def _adjust(self, chance: random.Random) -> None:
        tokens = chance.choice([-1, 1]) * chance.randrange(1, 3_000)
        user = f"person {chance.randrange(PEOPLE)}"
        op = self._asked("adjustment", user=user, tokens=tokens, is_keyed=True)
        body = {"userId": user, "tokensUsed": tokens, "reason": op, "actor": "machine"}
        await self._post_until_accepted(op, "/api/usage/adjustments", body, key=op)

    async def _post_until_accepted(self, op: str, path: str, body: dict[str, Any], *, key: str | None) -> None:
        """With a key, as whoever has one does: again, until it is accepted. Without, once."""
        for _ in range(REPEATS_MAX if key else 1):
            status = await self._send("POST", op, path, body, {"Idempotency-Key": key} if key else {})
            if status == 200:
                return
            await asyncio.sleep(1)

    async def _change_plan(self, user: str, tier: str) -> int | None:
        op = self._asked("plan", user=user, tier=tier)
        return await self._send("PUT", op, f"/api/subscriptions/{user}", {"tier": tier}, {})

    async def _look(self, chance: random.Random) -> None:
        user = f"person {chance.randrange(PEOPLE)}"
        path = chance.choice(["/api/usage", "/api/usage/history", "/api/usage/logs"])
        op = self._asked("look", user=user, path=path)
        await self._send("GET", op, path, None, {}, userId=user)

    async def _poison(self, chance: random.Random) -> None:
        """What no service of ours would publish, straight to the stream."""
        body = chance.choice([b"", b"{}", b"null", chance.randbytes(40), b'{"specversion": "1.0"', b"\xff" * 9])
        try:
            nats = await connect(self._nats_url, name="stranger")
            await nats.jetstream().publish(GENERATION_COMPLETED, body, timeout=2)
            await nats.close()
        except (NatsError, OSError) as error:
            self._log.write("poison not published", error=type(error).__name__)

    async def _send(
        self, method: str, op: str, path: str, body: dict[str, Any] | None, headers: dict[str, str], **query: str
    ) -> int | None:
        """The status, or None where nothing came back."""
        status, failed = None, None
        try:
            async with self._http.request(method, path, json=body, headers=headers, params=query) as answer:
                await answer.read()
                status = answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            failed = type(error).__name__
        self._log.write("answered", op=op, status=status, failed=failed)
        return status


def _take_document(seen: dict[str, Any], status: int, document: dict[str, Any]) -> None:
    if status == 200:
        seen |= {"last": "done", "text_bytes": len(document["text"].encode()), **_counts(document)}
    else:
        seen |= {"last": "refused", "title": document.get("title")}


async def _read_stream(seen: dict[str, Any], answer: aiohttp.ClientResponse, leaves_after: int | None) -> None:
    """Until the last word, or until as many deltas have come as whoever leaves wants to see."""
    deltas, event = 0, ""
    async for line in answer.content:
        if line.startswith(b"event: "):
            event = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            data = json.loads(line[6:])
            if event == "start":
                seen |= {"last": "start", "generationId": data["generationId"]}
            elif event == "delta":
                deltas += 1
                seen["text_bytes"] += len(data["text"].encode())
            elif event == "done":
                seen |= {"last": "done", **_counts(data)}
            elif event == "error":
                seen |= {"last": "error", "title": data.get("title")}
        if deltas == leaves_after:
            seen["last"] = "left"
            answer.close()
            return


def _counts(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("generationId", "inputTokens", "outputTokens", "tokensUsed")}
