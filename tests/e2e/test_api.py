"""The HTTP API of chat, from outside, over the whole stack: what it answers, what it counts, and what it refuses."""

import asyncio
import csv
import io
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx2
import pytest

from shared import streams
from shared.broker import connect
from tests import forked
from tests.fixtures import eventually
from tests.people import client_of, contents, given, open_holds
from tests.stack import Stack, environment

OPERATOR_KEY = "operator-key-that-must-stay-secret"
PROVIDER_KEY = "provider-key-that-must-stay-secret"
MIB = 1024 * 1024
MODEL = "claude-haiku-4-5-20251001"
Event = tuple[str, dict[str, Any]]


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(stack) as client:
        yield client


@pytest.fixture
def user() -> str:
    """Somebody who was never seen."""
    return f"user {uuid4()}"


@pytest.fixture(scope="module")
def guarded_stack(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with keys, which lets Claude finish for those who have left."""
    variables = {
        "CHATRAIL_OPERATOR_KEY": OPERATOR_KEY,
        "CHATRAIL_ON_DISCONNECT": "drain",
        "ANTHROPIC_API_KEY": PROVIDER_KEY,
        "ANTHROPIC_BASE_URL": stack.endpoints["claude"],
    }
    with Stack(tmp_path_factory.mktemp("guarded") / "data", **variables) as running:
        yield running


def question(user: str, content: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"userId": user, "messages": [{"role": "user", "content": content}], **fields}


def report(user: str, tokens: int = 8_094, **fields: Any) -> dict[str, Any]:
    return {"userId": user, "actionType": "chat_generation", "tokensUsed": tokens, **fields}


def address(user: str) -> str:
    return f"/api/subscriptions/{quote(user, safe='')}"


async def events(response: httpx2.Response) -> AsyncIterator[Event]:
    """The server-sent events of a response, as they come."""
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


async def chat(http: httpx2.AsyncClient, body: dict[str, Any]) -> list[Event]:
    async with http.stream("POST", "/api/chat", json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [event async for event in events(response)]


async def send_report(http: httpx2.AsyncClient, body: dict[str, Any], **headers: str) -> None:
    answer = await http.post("/api/usage", json=body, headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"success": True}), answer.text


async def usage(http: httpx2.AsyncClient, user: str) -> dict[str, Any]:
    answer = await http.get("/api/usage", params={"userId": user})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def log_page(http: httpx2.AsyncClient, user: str) -> list[dict[str, Any]]:
    answer = await http.get("/api/usage/logs", params={"userId": user})
    assert answer.status_code == 200, answer.text
    records: list[dict[str, Any]] = answer.json()["records"]
    return records


async def logs(http: httpx2.AsyncClient, user: str, count: int) -> list[dict[str, Any]]:
    """The user's records, newest first, once there are `count`: the ledger follows the stream a moment later."""

    async def found() -> list[dict[str, Any]] | None:
        records = await log_page(http, user)
        return records if len(records) >= count else None

    records = await eventually(found)
    assert len(records) == count
    return records


def problem_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """A problem document, whole and in words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["type"].startswith("urn:chatrail:problem:")
    assert document["title"]
    assert len(document["detail"].split()) > 2
    assert "Traceback" not in answer.text
    return document


async def recorded(stack: Stack) -> int:
    """How many events the stream has. Seals come when they come."""
    nats = await connect(stack.endpoints["nats"], name="test")
    try:
        state = (await nats.jetstream().stream_info(streams.STREAM, subjects_filter=">")).state
        return sum(count for subject, count in (state.subjects or {}).items() if subject != streams.LEDGER_SEALED)
    finally:
        await nats.close()


async def nothing_under_way(stack: Stack) -> None:
    """Once the stream has all that chat knows of: `done` may be heard before it has."""
    async with client_of(stack) as http:

        async def found() -> bool | None:
            return "chatrail_outbox_events 0.0" in (await http.get("/metrics")).text

        await eventually(found)


@asynccontextmanager
async def nothing_recorded(stack: Stack) -> AsyncIterator[None]:
    """The stream has no more events after than before, whoever they are of."""
    await nothing_under_way(stack)
    before = await recorded(stack)
    yield
    await nothing_under_way(stack)
    assert await recorded(stack) == before


# Usage, and what a back end reports


async def test_somebody_never_seen_has_used_nothing(http: httpx2.AsyncClient, user: str) -> None:
    found = await usage(http, user)
    assert list(found)[:5] == ["tier", "tokensUsed", "tokensLimit", "tokensRemaining", "usagePercentage"]
    assert (found["tier"], found["tokensUsed"], found["tokensRemaining"]) == ("free", 0, 108_000)


async def test_a_report_is_in_the_very_next_answer(http: httpx2.AsyncClient, user: str) -> None:
    for times in range(1, 6):
        await send_report(http, report(user, metadata={"inputTokens": 5_282, "outputTokens": 2_812, "model": "any"}))
        assert (await usage(http, user))["tokensUsed"] == 8_094 * times


async def test_a_report_keeps_its_split_and_its_facts(http: httpx2.AsyncClient, user: str) -> None:
    counts = {"inputTokens": 1, "outputTokens": 2, "cacheCreationInputTokens": 3, "cacheReadInputTokens": 4}
    facts = {"feature": "🛤", "nested": {"list": [1, None, True]}}
    await send_report(http, report(user, 10, metadata={**counts, **facts, "model": "any model"}))
    (record,) = await logs(http, user, 1)
    assert {name: record[name] for name in counts} == counts
    assert (record["tokensUsed"], record["model"], record["metadata"]) == (10, "any model", facts)
    assert (record["outcome"], record["usageSource"]) == ("completed", "reported")


async def test_a_report_that_does_not_split_is_kept_as_a_sum(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user, 10))
    (record,) = await logs(http, user, 1)
    assert (record["tokensUsed"], record["inputTokens"], record["outputTokens"]) == (10, None, None)


async def test_a_report_may_leave_out_what_is_nothing_of_its_split(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user, 10, metadata={"inputTokens": 4, "cacheReadInputTokens": 6}))
    (record,) = await logs(http, user, 1)
    counts = ("inputTokens", "outputTokens", "cacheCreationInputTokens", "cacheReadInputTokens")
    assert [record[name] for name in counts] == [4, 0, 0, 6]


async def test_what_a_report_tells_of_a_split_that_is_not_whole_stays_among_its_facts(
    http: httpx2.AsyncClient, user: str
) -> None:
    told = {"inputTokens": 4, "cacheReadInputTokens": 2, "note": "n"}
    await send_report(http, report(user, 10, metadata=told))
    (record,) = await logs(http, user, 1)
    assert (record["tokensUsed"], record["inputTokens"], record["metadata"]) == (10, None, told)


async def test_what_is_not_said_to_be_json_is_refused_with_what_to_do(http: httpx2.AsyncClient, user: str) -> None:
    refused = await http.post("/api/usage", content=json.dumps(report(user)), headers={"Content-Type": "text/plain"})
    assert refused.status_code == 415
    assert "Content-Type: application/json" in refused.json()["detail"]


async def test_a_report_with_a_key_counts_once_however_often_it_is_sent(http: httpx2.AsyncClient, user: str) -> None:
    key = str(uuid4())
    await asyncio.gather(*(send_report(http, report(user), **{"Idempotency-Key": key}) for _ in range(10)))
    assert (await usage(http, user))["tokensUsed"] == 8_094
    await send_report(http, report(user), **{"Idempotency-Key": f"{key} other"})
    assert (await usage(http, user))["tokensUsed"] == 16_188
    assert len(await logs(http, user, 2)) == 2


def test_white_space_around_a_key_is_no_part_of_it(stack: Stack, user: str) -> None:
    connection, key = HTTPConnection(urlsplit(stack.url).netloc, timeout=10), str(uuid4())
    for same in (key, f"{key} ", f"{key}\t ", f" {key}"):
        headers = {"Content-Type": "application/json", "Idempotency-Key": same}
        connection.request("POST", "/api/usage", json.dumps(report(user)), headers)
        assert json.loads(connection.getresponse().read()) == {"success": True}
    connection.request("GET", f"/api/usage?userId={quote(user)}")
    assert json.loads(connection.getresponse().read())["tokensUsed"] == 8_094
    connection.close()


async def test_a_key_belongs_to_one_body(stack: Stack, http: httpx2.AsyncClient, user: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    facts = {"a": {"b": [{"c": 1, "d": 2}], "e": 3}, "f": 4}
    await send_report(http, report(user, metadata=facts), **key)
    async with nothing_recorded(stack):
        in_another_order = {"f": 4, "a": {"e": 3, "b": [{"d": 2, "c": 1}]}}
        await send_report(http, report(user, metadata=in_another_order), **key)
        for other in (report(user, 8_095), report(f"{user} 2"), report(user, metadata={"note": "other"})):
            document = problem_of(await http.post("/api/usage", json=other, headers=key), 409)
            assert "use a new key" in document["detail"]


async def test_a_key_is_remembered_by_the_next_process(stack: Stack, http: httpx2.AsyncClient, user: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    await send_report(http, report(user), **key)
    stack.kill("chat")
    await stack.answers(f"{stack.url}/readyz")
    async with nothing_recorded(stack):
        await send_report(http, report(user), **key)
        problem_of(await http.post("/api/usage", json=report(user, 1), headers=key), 409)
    assert (await usage(http, user))["tokensUsed"] == 8_094


# Bad input


LONE_SURROGATE = "\ud800"
BAD_NAMES: list[Any] = ["", "x" * 129, "a\0b", "a\nb", "\x7f", LONE_SURROGATE, None, 7, ["user"]]
BAD_COUNTS: list[Any] = [-1, 1.5, 1.0, True, "8094", None, 10**30, 100_000_001, float("nan")]
NOT_JSON = [b"", b"{", b"\xff", b'{"userId": "user_1"', b"userId=user_1", "{}".encode("utf-16-le")]
NO_OBJECT = [b"[]", b"null", b'"text"', b"7", b"9" * 5_000, b"[" * 100_000 + b"]" * 100_000]
BAD_MESSAGES: list[Any] = [None, [], "text", [{}], ["text"], {}, [None]]
BAD_TEXTS: list[Any] = ["", " \n", None, 7, [], LONE_SURROGATE]
BAD_QUESTIONS: list[dict[str, Any]] = [
    *({"userId": name} for name in BAD_NAMES),
    *({"conversationId": name} for name in BAD_NAMES if name is not None),
    *({"maxTokens": count} for count in [0, *BAD_COUNTS, 128_001] if count is not None),
    *({"messages": messages} for messages in BAD_MESSAGES),
    *({"messages": [{"role": "user", "content": text}]} for text in BAD_TEXTS),
    *({"messages": [{"role": role, "content": "Hi"}]} for role in ("assistant", "system", "tool", "", None, 7)),
    {"messages": [{"role": "user", "content": "Hi", "name": "Eve"}]},
    {"messages": [{"role": "user", "content": "Hi"}] * 1001},
    {"system": ""},
    {"system": 7},
    {"model": ""},
    {"stream": True},
    {"user_id": "user_1"},
    {LONE_SURROGATE: 1},
]
BAD_REPORTS: list[dict[str, Any]] = [
    *({"userId": name} for name in BAD_NAMES),
    *({"actionType": name} for name in BAD_NAMES),
    *({"tokensUsed": count} for count in BAD_COUNTS),
    *({"metadata": {"inputTokens": count}} for count in BAD_COUNTS if count is not None),
    {"metadata": {"inputTokens": 5_282, "outputTokens": 2_811}},
    {"metadata": {"inputTokens": 5_282, "outputTokens": 2_812, "cacheReadInputTokens": 1}},
    {"metadata": {"outputTokens": 8_095}},
    {"metadata": {"tokensUsed": 8_095}},
    {"metadata": {"model": 7}},
    {"metadata": {"note": "x" * 4096}},
    {"metadata": {"note": "\0"}},
    {"metadata": {"note": float("inf")}},
    {"metadata": {"note": LONE_SURROGATE}},
    {"metadata": {LONE_SURROGATE: 1}},
    {"metadata": []},
    {"metadata": "text"},
    {"tokens": 1},
]


def as_json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def cases(faults: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: ascii(fault)[:60])


async def post(http: httpx2.AsyncClient, path: str, body: bytes) -> httpx2.Response:
    return await http.post(path, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("path", ["/api/chat", "/api/usage"])
async def test_what_is_not_json_is_refused_in_words(stack: Stack, http: httpx2.AsyncClient, path: str) -> None:
    async with nothing_recorded(stack):
        for body in NOT_JSON:
            document = problem_of(await post(http, path, body), 400)
            assert "one JSON object" in document["detail"]
        for body in NO_OBJECT:
            problem_of(await post(http, path, body), 422)


@pytest.mark.parametrize(
    "twice",
    [
        b'{"userId": "b", "userId": "a", "actionType": "any", "tokensUsed": 1}',
        b'{"userId": "a", "actionType": "any", "tokensUsed": 1, "metadata": {"note": 1, "note": 2}}',
        b'{"userId": "b", "\\u0075serId": "a", "actionType": "any", "tokensUsed": 1}',
    ],
)
async def test_a_body_that_can_be_read_in_two_ways_is_refused(
    stack: Stack, http: httpx2.AsyncClient, twice: bytes
) -> None:
    async with nothing_recorded(stack):
        assert "twice" in problem_of(await post(http, "/api/usage", twice), 422)["detail"]


@pytest.mark.parametrize(
    ("method", "address", "word"),
    [
        ("GET", "/api/usage?userId=a&userId=b", "userId"),
        ("GET", "/api/usage?userId=%ff", "UTF-8"),
        ("GET", "/api/usage/logs?userId=a&cursor=%c3%28", "UTF-8"),
        ("PUT", "/api/subscriptions/%ff", "UTF-8"),
        ("PUT", "/api/subscriptions/a%0Ab", "control characters"),
    ],
)
async def test_an_address_that_can_be_read_in_two_ways_is_refused(
    stack: Stack, http: httpx2.AsyncClient, method: str, address: str, word: str
) -> None:
    async with nothing_recorded(stack):
        refused = await http.request(method, address, json={"tier": "enterprise"})
        assert word in problem_of(refused, 422)["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Idempotency-Key", "a"), ("Idempotency-Key", "b")], 422),
        ([("Authorization", "Bearer a"), ("Authorization", "Bearer b")], 422),
        ([("Content-Type", "application/json")], 422),
        ([("Content-Encoding", "gzip")], 415),
    ],
)
async def test_headers_by_which_others_may_read_another_request_are_refused(
    stack: Stack, http: httpx2.AsyncClient, headers: list[tuple[str, str]], status: int
) -> None:
    said = [("Content-Type", "application/json"), *headers]
    async with nothing_recorded(stack):
        refused = await http.post("/api/usage", content=as_json(report("any")), headers=said)
    assert headers[0][0].lower() in problem_of(refused, status)["detail"].lower()


@pytest.mark.parametrize(
    ("sent", "status", "word"),
    [
        ("GET /api/usage?userId=ü HTTP/1.1\r\n\r\n", 400, "encode it by %"),
        ("FOO / HTTP/1.1\r\n\r\n", 400, "no HTTP/1.1 request"),
        ("hello\r\n\r\n", 400, "no HTTP/1.1 request"),
        ("CONNECT *:443 HTTP/1.1\r\n\r\n", 400, "no HTTP/1.1 request"),
        ("GET / HTTP/1.1\r\nx: ".ljust(256 * 1024 + 1, "x"), 431, "256 KiB"),
    ],
)
def test_what_is_no_request_is_refused_in_words(stack: Stack, sent: str, status: int, word: str) -> None:
    place = urlsplit(stack.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(sent.encode())
        answer = HTTPResponse(connection)
        answer.begin()
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
        assert word in json.loads(answer.read())["detail"]


def offering_http2(user: str, *headers: str) -> tuple[bytes, bytes]:
    """Head and body of a report as Java's own client sends its first over each connection, and curl with --http2."""
    body = as_json(report(user))
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
    about = ("Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join(["POST /api/usage HTTP/1.1", *about, *offer, *headers, "", ""]).encode(), body


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
async def test_who_offers_another_protocol_is_answered_in_this_one(
    stack: Stack, http: httpx2.AsyncClient, user: str, protocol: str
) -> None:
    place, (head, body) = urlsplit(stack.url), offering_http2(user)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(head.replace(b"h2c", protocol.encode()) + body)
            answer = HTTPResponse(connection)
            answer.begin()
            assert (answer.status, json.loads(answer.read())) == (200, {"success": True})
    assert (await usage(http, user))["tokensUsed"] == 2 * report(user)["tokensUsed"]


async def test_a_body_behind_such_an_offer_is_never_taken_for_a_request(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    place, (head, body) = urlsplit(stack.url), offering_http2(user, "Expect: 100-continue")
    hidden = b"PUT /api/subscriptions/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".ljust(len(body))
    async with nothing_recorded(stack):
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(hidden)
            answer = HTTPResponse(connection)
            answer.begin()
            assert (answer.status, json.loads(answer.read())["title"]) == (400, "Malformed JSON")
    assert (await usage(http, user))["tokensUsed"] == 0


@cases(BAD_QUESTIONS)
async def test_a_question_that_makes_no_sense_is_refused_and_nothing_is_sent_or_recorded(
    stack: Stack, http: httpx2.AsyncClient, user: str, fault: dict[str, Any]
) -> None:
    before = (await given(stack))["messageRequests"]
    async with nothing_recorded(stack):
        document = problem_of(await post(http, "/api/chat", as_json({**question(user), **fault})), 422)
    (field,) = fault
    assert document["errors"][0]["field"].startswith(field.encode("ascii", "ignore").decode())
    assert (await given(stack))["messageRequests"] == before


@cases(BAD_REPORTS)
async def test_a_report_that_makes_no_sense_is_refused_and_nothing_is_recorded(
    stack: Stack, http: httpx2.AsyncClient, user: str, fault: dict[str, Any]
) -> None:
    async with nothing_recorded(stack):
        document = problem_of(await post(http, "/api/usage", as_json({**report(user), **fault})), 422)
    (field,) = fault
    assert document["errors"][0]["field"].startswith(field)
    assert await log_page(http, user) == []
    assert (await usage(http, user))["tokensUsed"] == 0


@pytest.mark.parametrize("field", ["userId", "messages"])
async def test_a_question_names_what_is_missing_from_it(http: httpx2.AsyncClient, user: str, field: str) -> None:
    body = question(user)
    del body[field]
    document = problem_of(await http.post("/api/chat", json=body), 422)
    assert document["detail"] == f"{field}: is required"


@pytest.mark.parametrize("field", ["userId", "actionType", "tokensUsed"])
async def test_a_report_names_what_is_missing_from_it(http: httpx2.AsyncClient, user: str, field: str) -> None:
    body = report(user)
    del body[field]
    document = problem_of(await http.post("/api/usage", json=body), 422)
    assert document["detail"] == f"{field}: is required"


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_an_idempotency_key_of_no_use_is_refused(
    stack: Stack, http: httpx2.AsyncClient, user: str, key: str
) -> None:
    async with nothing_recorded(stack):
        problem_of(await http.post("/api/usage", json=report(user), headers={"Idempotency-Key": key}), 422)


@pytest.mark.parametrize("path", ["/api/chat", "/api/usage"])
async def test_a_body_of_more_than_a_mebibyte_is_refused_however_it_is_sent(
    stack: Stack, http: httpx2.AsyncClient, user: str, path: str
) -> None:
    body = as_json({**question(user, "x" * MIB), **report(user)})

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    async with nothing_recorded(stack):
        for content in (body, in_chunks()):
            document = problem_of(await http.post(path, content=content), 413)
            assert "at most 1 MiB" in document["detail"]


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(stack: Stack) -> None:
    place = urlsplit(stack.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        head = "POST /api/usage HTTP/1.1", f"Host: {place.netloc}", "Content-Type: application/json"
        asking = "Expect: 100-continue", f"Content-Length: {2 * MIB}"
        connection.sendall("\r\n".join([*head, *asking, "", ""]).encode())
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_whoever_sends_all_of_a_body_that_is_too_large_before_listening_is_told(stack: Stack) -> None:
    place = urlsplit(stack.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        head = "POST /api/usage HTTP/1.1", f"Host: {place.netloc}", "Content-Type: application/json"
        closing = "Connection: close", f"Content-Length: {8 * MIB}"
        connection.sendall("\r\n".join([*head, *closing, "", ""]).encode() + b"x" * 8 * MIB)
        assert connection.recv(12) == b"HTTP/1.1 413"


async def test_a_model_that_nobody_knows_is_refused_with_the_known_ones(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    async with nothing_recorded(stack):
        document = problem_of(await http.post("/api/chat", json=question(user, model="gpt-4")), 400)
    assert {"claude-haiku-4-5", "claude-fable-5"} <= set(document["models"])
    assert "claude-haiku-4-5" in document["detail"]


BAD_QUERIES: list[tuple[str, dict[str, str]]] = [
    ("/api/usage", {}),
    *(("/api/usage", {"userId": name}) for name in ("", "x" * 129, "a\0b", "a\nb")),
    ("/api/usage/events", {}),
    ("/api/usage/history", {"userId": "u", "from": "2026-02-30"}),
    ("/api/usage/history", {"userId": "u", "from": "2026-02-01T12:00:00Z"}),
    ("/api/usage/history", {"userId": "u", "from": "2026-02-02", "to": "2026-02-01"}),
    ("/api/usage/history", {"userId": "u", "from": "2020-01-01", "to": "2026-01-01"}),
    ("/api/usage/history", {"userId": "u", "to": "0001-01-05"}),
    ("/api/usage/logs", {"userId": "u", "limit": "0"}),
    ("/api/usage/logs", {"userId": "u", "limit": "1001"}),
    ("/api/usage/logs", {"userId": "u", "limit": "many"}),
    ("/api/usage/logs", {"userId": "u", "cursor": "not ours"}),
    ("/api/usage/logs", {"userId": "u", "cursor": "x" * 513}),
]


@cases(BAD_QUERIES)
async def test_a_query_that_makes_no_sense_is_refused_in_words(
    http: httpx2.AsyncClient, fault: tuple[str, dict[str, str]]
) -> None:
    path, query = fault
    problem_of(await http.get(path, params=query), 422)


@cases(
    [
        {"tier": "platinum"},
        {"tier": ""},
        {},
        {"tier": "pro", "timeZone": "Mars/Base"},
        {"tier": "pro", "timeZone": "localtime"},
        {"tier": "pro", "until": 7},
    ]
)
async def test_a_subscription_that_makes_no_sense_is_refused(
    stack: Stack, http: httpx2.AsyncClient, user: str, fault: dict[str, Any]
) -> None:
    async with nothing_recorded(stack):
        problem_of(await http.put(address(user), json=fault), 422)
        for name in ("%00", "a%0Db", "x" * 129):
            problem_of(await http.put(f"/api/subscriptions/{name}", json={"tier": "pro"}), 422)
    assert (await usage(http, user))["tier"] == "free"


async def test_addresses_and_methods_that_do_not_exist_point_to_the_description(http: httpx2.AsyncClient) -> None:
    for nothing in ("/api/nothing", "/api/plans/"):
        assert "/docs" in problem_of(await http.get(nothing), 404)["detail"]
    assert "/docs" in problem_of(await http.delete("/api/usage"), 405)["detail"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", {"GET", "HEAD"}),
        ("/docs", {"GET", "HEAD"}),
        ("/web/chat-rail.js", {"GET", "HEAD"}),
        ("/healthz", {"GET", "HEAD"}),
        ("/api/usage", {"GET", "HEAD", "POST"}),
        ("/api/usage/logs", {"GET", "HEAD"}),
        ("/api/usage/adjustments", {"POST"}),
        ("/api/chat", {"POST"}),
        ("/api/subscriptions/user_1", {"PUT"}),
    ],
)
async def test_a_method_that_an_address_does_not_answer_is_told_all_that_it_does(
    http: httpx2.AsyncClient, path: str, allowed: set[str]
) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - allowed:
        refused = await http.request(method, path)
        problem_of(refused, 405)
        assert set(refused.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("address", ["/", "/web/chat-rail.js", "/docs", "/api/plans", "/api/usage", "/healthz"])
async def test_head_is_answered_as_get_without_the_body(http: httpx2.AsyncClient, user: str, address: str) -> None:
    query = {"userId": user}
    got, asked_for = await http.get(address, params=query), await http.head(address, params=query)
    assert (asked_for.status_code, asked_for.content) == (200, b"")
    for name in ("content-type", "content-length", "cache-control"):
        assert asked_for.headers.get(name) == got.headers.get(name)


def test_head_of_a_stream_ends_at_once_and_of_what_only_takes_posts_is_refused(stack: Stack, user: str) -> None:
    connection = HTTPConnection(urlsplit(stack.url).netloc, timeout=10)
    for path, status in [(f"/api/usage/events?userId={quote(user)}", 200), ("/api/chat", 405), ("/api/plans", 200)]:
        # On one connection: who sent a body would have it read as the next answer.
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, b"")
    connection.close()


# Every id that is legal


IDS = [
    *("a.b", "a..b", ".", "..", "../x", "*", "a*", ">", "a.>", "a/b", "/", "//", "a/", " ", "a b", "a ", " a"),
    *("ü/🛤", "🛤" * 128, "x" * 128, "X" * 128, "\u2028", "\ufeff", "é", "e\u0301", "ﬁ", "ß", "SS", "ss"),
    *("a?b#c%2F&d=e+f", "a+f", "a%20b", "null", "true", "0", "=1+1", "'; DROP TABLE usage; --", '"', "\\", "$JS.API"),
]


# Clients take these for folders, however they are written (RFC 3986, section 6.2.2.3).
NO_ADDRESS = {".", ".."}


async def test_ids_of_all_kinds_are_metered_each_on_its_own(guarded_stack: Stack) -> None:
    expected = {user: 1_000 + 2 * number for number, user in enumerate(IDS)}

    async def spend(http: httpx2.AsyncClient, user: str, tokens: int) -> None:
        answered = await chat(http, question(user, f"Hi [together] [usage input={tokens - 101} output=1]"))
        assert answered[-2][1]["tokensUsed"] == tokens - 100
        await send_report(http, report(user, 100))
        if user not in NO_ADDRESS:
            answer = await http.put(address(user), json={"tier": "pro"})
            assert answer.json() == {"userId": user, "tier": "pro", "timeZone": None}

    async with client_of(guarded_stack) as http:
        http.headers["Authorization"] = f"Bearer {OPERATOR_KEY}"
        await asyncio.gather(*(spend(http, user, tokens) for user, tokens in expected.items()))
        found = {user: await usage(http, user) for user in IDS}
        sums = {user: sum(record["tokensUsed"] for record in await logs(http, user, 2)) for user in IDS}
    assert {user: seen["tokensUsed"] for user, seen in found.items()} == sums == expected
    assert {user for user, seen in found.items() if seen["tier"] == "free"} == NO_ADDRESS


# Chat


async def test_an_answer_is_a_start_words_the_usage_and_an_end(http: httpx2.AsyncClient, user: str) -> None:
    body = question(user, "What is a token? [usage input=5282 output=2812]", conversationId="c 1", system="Be brief.")
    (start, started), *deltas, (shown, seen), (end, done) = await chat(http, body)
    assert (start, shown, end) == ("start", "usage", "done")
    assert {name for name, _ in deltas} == {"delta"}
    assert "What is a token?" in "".join(delta["text"] for _, delta in deltas)
    assert started == {"generationId": done["generationId"], "model": MODEL}
    counts = {"inputTokens": 5_282, "outputTokens": 2_812, "tokensUsed": 8_094}
    assert done == {"generationId": started["generationId"], **counts, "stopReason": "end_turn"}
    assert seen == await usage(http, user)
    assert (seen["tokensUsed"], seen["tokensHeld"]) == (8_094, 0)

    (record,) = await logs(http, user, 1)
    assert {name: record[name] for name in counts} == counts
    assert (record["id"], record["model"], record["outcome"]) == (done["generationId"], MODEL, "completed")
    assert (record["usageSource"], record["metadata"]) == ("provider", {"conversationId": "c 1"})


async def test_whoever_accepts_only_json_gets_one_document(http: httpx2.AsyncClient, user: str) -> None:
    body = question(user, "Hello [usage input=7 output=9]")
    for accept in ("Application/JSON, */*;q=0", "application/json"):
        answer = await http.post("/api/chat", json=body, headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    streamed = "".join(data["text"] for name, data in await chat(http, body) if name == "delta")
    assert document["text"] == streamed
    assert (document["inputTokens"], document["outputTokens"], document["tokensUsed"]) == (7, 9, 16)
    assert (document["model"], document["stopReason"], document["usage"]["tokensUsed"]) == (MODEL, "end_turn", 32)


@pytest.mark.parametrize("model", ["claude-3-haiku-20240307", "claude-3-5-haiku-20241022"])
async def test_a_retired_model_is_answered_by_its_successor_which_is_named(
    http: httpx2.AsyncClient, user: str, model: str
) -> None:
    started, *_ = await chat(http, question(user, model=model))
    assert started[1]["model"] == MODEL
    assert (await logs(http, user, 1))[0]["model"] == MODEL


@pytest.mark.parametrize("directive", ["[split]", "[together]", "[repeat-delta-usage]"])
async def test_the_way_claudes_bytes_arrive_changes_nothing(
    http: httpx2.AsyncClient, user: str, directive: str
) -> None:
    asked = "Is “naïve” 🛤 spelt so? [deltas 30]"
    plain, odd = await chat(http, question(user, asked)), await chat(http, question(user, f"{asked} {directive}"))
    texts = ["".join(data["text"] for name, data in answered if name == "delta") for answered in (plain, odd)]
    assert texts[0] == texts[1] != ""
    assert plain[-1][1]["outputTokens"] == odd[-1][1]["outputTokens"] == 120
    assert [seen["tokensUsed"] for _, seen in (plain[-2], odd[-2])] == [
        plain[-1][1]["tokensUsed"],
        plain[-1][1]["tokensUsed"] + odd[-1][1]["tokensUsed"],
    ]


async def test_cached_input_counts_and_is_kept_apart(http: httpx2.AsyncClient, user: str) -> None:
    asked = "Hello [usage input=7 output=9] [cache creation=100 read=200]"
    *_, (_, seen), (_, done) = await chat(http, question(user, asked))
    assert (done["inputTokens"], done["outputTokens"], done["tokensUsed"]) == (307, 9, 316)
    assert seen["tokensUsed"] == 316
    (record,) = await logs(http, user, 1)
    names = ("inputTokens", "cacheCreationInputTokens", "cacheReadInputTokens", "outputTokens", "tokensUsed")
    assert [record[name] for name in names] == [7, 100, 200, 9, 316]


async def test_a_refusal_by_the_model_is_an_answer_with_its_reason(http: httpx2.AsyncClient, user: str) -> None:
    *_, (end, done) = await chat(http, question(user, "[stop refusal] [usage input=7 output=9]"))
    assert (end, done["stopReason"], done["tokensUsed"]) == ("done", "refusal", 16)


# At the limit


async def test_near_the_limit_an_answer_is_cut_short_instead_of_refused(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user, 107_000))
    *_, (_, seen), (_, done) = await chat(http, question(user, "Hello [usage input=20 output=4000]", maxTokens=4000))
    assert (done["stopReason"], done["limitReached"]) == ("max_tokens", True)
    assert 500 < done["outputTokens"] < 980
    assert seen["tokensUsed"] == 107_000 + done["tokensUsed"] <= 108_000


async def test_nearer_still_claude_is_asked_how_long_the_question_is(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    await send_report(http, report(user, 107_880))
    before = (await given(stack))["countTokensCalls"]
    *_, (_, seen), (_, done) = await chat(http, question(user, "Hello [usage input=20 output=4000]"))
    assert (await given(stack))["countTokensCalls"] == before + 1
    assert (done["stopReason"], done["inputTokens"]) == ("max_tokens", 20)
    assert 107_880 < seen["tokensUsed"] <= 108_000


async def test_what_is_estimated_never_passes_the_limit(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user, 107_880))
    many_bytes_a_token = " ".join(["𠀀" * 6] * 8)
    await chat(http, question(user, f"{many_bytes_a_token} [usage input=20] [cut middle]"))
    assert 107_880 < (await usage(http, user))["tokensUsed"] <= 108_000


async def test_what_ends_by_its_own_maximum_is_not_said_to_have_reached_a_limit(
    http: httpx2.AsyncClient, user: str
) -> None:
    *_, (_, done) = await chat(http, question(user, "Hello [usage input=20 output=4000]", maxTokens=30))
    assert (done["stopReason"], done["outputTokens"]) == ("max_tokens", 30)
    assert "limitReached" not in done


async def test_an_answer_too_short_to_be_of_use_is_refused_unless_it_is_all_that_is_wanted(
    http: httpx2.AsyncClient, user: str
) -> None:
    await send_report(http, report(user, 107_920))
    refused = await http.post("/api/chat", json=question(user, "Hello [usage input=20]"))
    assert problem_of(refused, 429)["tokensRemaining"] == 80
    *_, (end, done) = await chat(http, question(user, "Hello [usage input=20 output=4000]", maxTokens=10))
    assert (end, done["outputTokens"]) == ("done", 10)


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_at_the_limit_nothing_is_sent_and_the_way_out_is_named(
    stack: Stack, http: httpx2.AsyncClient, user: str, accept: str
) -> None:
    await send_report(http, report(user, 108_000))
    before = await given(stack)
    async with nothing_recorded(stack):
        answer = await http.post("/api/chat", json=question(user), headers={"Accept": accept})
    document = problem_of(answer, 429)
    assert (document["title"], document["detail"]) == ("Token limit exceeded", "Upgrade to Pro")
    assert (document["tokensRemaining"], document["upgradeTo"]) == (0, "pro")
    left = datetime.fromisoformat(document["resetsAt"]) - datetime.now(UTC)
    assert abs(int(answer.headers["retry-after"]) - left.total_seconds()) < 30
    after = await given(stack)
    assert (after["messageRequests"], after["countTokensCalls"]) == (
        before["messageRequests"],
        before["countTokensCalls"],
    )


async def test_an_unlimited_plan_refuses_nothing(http: httpx2.AsyncClient, user: str) -> None:
    await http.put(address(user), json={"tier": "enterprise"})
    await send_report(http, report(user, 100_000_000))
    *_, (_, seen), (end, _) = await chat(http, question(user))
    assert end == "done"
    assert (seen["tokensLimit"], seen["tokensRemaining"], seen["usagePercentage"]) == (None, None, 0)


# When Claude fails


@pytest.mark.parametrize(
    ("failure", "status", "title"),
    [
        (400, 400, "Claude refuses the request"),
        (401, 502, "Claude refuses our key"),
        (413, 413, "Conversation too long"),
        (429, 503, "Claude is limiting our rate"),
        (500, 502, "Claude failed"),
        (529, 503, "Claude is overloaded"),
    ],
)
async def test_a_refusal_of_the_providers_is_passed_on_in_words_and_costs_nothing(
    *, http: httpx2.AsyncClient, user: str, failure: int, status: int, title: str
) -> None:
    for accept in ("text/event-stream", "application/json"):
        body = question(user, f"[fail {failure}]")
        answer = await http.post("/api/chat", json=body, headers={"Accept": accept})
        assert problem_of(answer, status)["title"] == title
        assert ("retry-after" in answer.headers) == (status == 503)
    records = await logs(http, user, 2)
    assert {(record["outcome"], record["tokensUsed"]) for record in records} == {("provider_error", 0)}
    found = await usage(http, user)
    assert (found["tokensUsed"], found["tokensHeld"]) == (0, 0)


@pytest.mark.parametrize(
    ("directive", "status", "title"),
    [("[fail middle]", 503, "Claude is overloaded"), ("[cut middle]", 502, "Claude's answer broke off")],
)
async def test_an_answer_that_breaks_off_is_told_in_words_and_what_was_given_is_counted(
    *, stack: Stack, http: httpx2.AsyncClient, user: str, directive: str, status: int, title: str
) -> None:
    asked = f"Hello {directive} [deltas 40] [usage input=7]"
    (start, _), *deltas, (shown, seen), (end, document) = await chat(http, question(user, asked))
    assert (start, shown, end) == ("start", "usage", "error")
    assert len(deltas) == 20
    assert (document["status"], document["title"]) == (status, title)
    (record,) = await logs(http, user, 1)
    assert (record["outcome"], record["usageSource"], record["inputTokens"]) == ("provider_error", "estimated", 7)
    assert record["tokensUsed"] == seen["tokensUsed"] == (await usage(http, user))["tokensUsed"]
    gave = (await given(stack))["records"][-1]
    assert 0.5 < record["outputTokens"] / gave["outputTokens"] < 2

    whole = await http.post("/api/chat", json=question(user, asked), headers={"Accept": "application/json"})
    document = problem_of(whole, status)
    assert document["title"] == title
    assert "What was answered so far is counted" in document["detail"]
    left = (await usage(http, user))["tokensRemaining"]
    assert f";r={left};" in whole.headers["ratelimit"]


async def leave_in_the_middle(http: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    """As a browser whose tab is closed after a few words."""
    async with http.stream("POST", "/api/chat", json=body) as response:
        words = events(response)
        for _ in range(4):
            await anext(words)


async def test_a_reader_who_leaves_stops_claude_and_pays_for_what_was_given(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    before = (await given(stack))["byOutcome"]["disconnected"]["generations"]
    await leave_in_the_middle(http, question(user, "Hello [slow 50ms] [deltas 400]"))

    async def stopped() -> dict[str, Any] | None:
        gave = await given(stack)
        record: dict[str, Any] = gave["records"][-1]
        return record if gave["byOutcome"]["disconnected"]["generations"] > before else None

    gave = await eventually(stopped)
    (record,) = await logs(http, user, 1)
    assert (record["outcome"], record["usageSource"]) == ("disconnected", "estimated")
    assert record["inputTokens"] == gave["inputTokens"]
    assert 0.5 < record["outputTokens"] / gave["outputTokens"] < 2
    found = await usage(http, user)
    assert (found["tokensUsed"], found["tokensHeld"]) == (record["tokensUsed"], 0)


async def test_where_claude_may_finish_a_reader_who_left_pays_the_providers_count(
    guarded_stack: Stack, user: str
) -> None:
    asked = question(user, "Hello [slow 20ms] [deltas 20] [usage input=7 output=80]")
    async with client_of(guarded_stack) as http:
        await leave_in_the_middle(http, asked)
        (record,) = await logs(http, user, 1)
    assert (record["outcome"], record["usageSource"], record["tokensUsed"]) == ("disconnected", "provider", 87)


# Reports, plans, subscriptions, pushes


async def test_history_has_a_row_a_day_and_only_the_days_that_were_asked_for(
    http: httpx2.AsyncClient, user: str
) -> None:
    await chat(http, question(user, "Hello [usage input=7 output=9] [cache creation=100 read=200]"))
    await send_report(http, report(user, 100))
    (day, *_) = (record["time"][:10] for record in await logs(http, user, 2))

    async def days(**query: str) -> Any:
        answer = await http.get("/api/usage/history", params={"userId": user, **query})
        assert answer.status_code == 200, answer.text
        return answer.json()["days"]

    row = {"date": day, "tokensUsed": 416, "inputTokens": 307, "outputTokens": 9, "generations": 2}
    assert await days() == await days(**{"from": day, "to": day}) == [{**row, "costUsd": "0.00"}]
    yesterday = str(datetime.fromisoformat(day).date() - timedelta(days=1))
    assert await days(to=yesterday) == []


async def test_logs_come_page_by_page_newest_first_each_once(http: httpx2.AsyncClient, user: str) -> None:
    for tokens in range(1, 6):
        await send_report(http, report(user, tokens))
    await logs(http, user, 5)
    pages, query = [], {"userId": user, "limit": "2"}
    while True:
        page = (await http.get("/api/usage/logs", params=query)).json()
        pages.append([record["tokensUsed"] for record in page["records"]])
        if not page["nextCursor"]:
            break
        query["cursor"] = page["nextCursor"]
    assert pages == [[5, 4], [3, 2], [1]]


async def test_logs_are_a_table_for_those_who_accept_csv(http: httpx2.AsyncClient, user: str) -> None:
    for number in range(2):
        await send_report(http, report(user, 10 + number, metadata={"model": "=1+1", "note": 'a "quoted", ü'}))
    await logs(http, user, 2)
    query = {"userId": user, "limit": "1"}
    answer = await http.get("/api/usage/logs", params=query, headers={"Accept": "text/csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert row["tokensUsed"] == "11"
    assert json.loads(row["metadata"]) == {"note": 'a "quoted", ü'}
    assert row["model"] == "'=1+1"  # text, where a spreadsheet would calculate
    assert row["inputTokens"] == ""
    rest = await http.get(
        "/api/usage/logs", params={**query, "cursor": answer.headers["x-next-cursor"]}, headers={"Accept": "text/csv"}
    )
    assert [row["tokensUsed"] for row in csv.DictReader(io.StringIO(rest.text))] == ["10"]
    assert "x-next-cursor" not in rest.headers


async def test_the_plans_are_those_of_the_product(http: httpx2.AsyncClient) -> None:
    document = (await http.get("/api/plans")).json()
    names = ("tier", "tokensLimit", "period", "pricePer1kTokensUsd", "upgradeTo")
    assert [tuple(plan[name] for name in names) for plan in document["plans"]] == [
        ("free", 108_000, "month", "0", "pro"),
        ("pro", 500_000, "month", "0.01", "enterprise"),
        ("enterprise", None, "month", None, None),
    ]
    assert (document["default"], document["simulated"]) == ("free", True)


async def test_a_subscription_holds_from_the_next_check_on(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user, 108_000))
    problem_of(await http.post("/api/chat", json=question(user)), 429)
    changed = await http.put(address(user), json={"tier": "pro", "timeZone": "Asia/Tokyo"})
    assert changed.json() == {"userId": user, "tier": "pro", "timeZone": "Asia/Tokyo"}
    assert (await chat(http, question(user)))[-1][0] == "done"
    found = await usage(http, user)
    assert (found["tier"], found["tokensLimit"], found["costUsd"]) == ("pro", 500_000, "1.08")
    assert found["resetsAt"].endswith("T15:00:00Z")  # midnight in Tokyo


async def test_every_open_tab_is_told_at_once_and_of_every_change(http: httpx2.AsyncClient, user: str) -> None:
    async def watch(tier: str, tokens_used: int) -> None:
        async for name, seen in tabs[asyncio.current_task()]:
            assert name == "usage"
            if (seen["tier"], seen["tokensUsed"]) == (tier, tokens_used):
                return

    tabs: dict[Any, AsyncIterator[Event]] = {}

    async def all_see(tier: str, tokens_used: int) -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as together:
            for tab in open_tabs:
                tabs[together.create_task(watch(tier, tokens_used))] = tab

    async with asyncio.timeout(30):
        async with (
            http.stream("GET", "/api/usage/events", params={"userId": user}) as first,
            http.stream("GET", "/api/usage/events", params={"userId": user}) as second,
            http.stream("GET", "/api/usage/events", params={"userId": f"{user} 2"}) as others,
        ):
            assert first.headers["content-type"].startswith("text/event-stream")
            open_tabs = [events(first), events(second)]
            await all_see("free", 0)
            await send_report(http, report(user, 100))
            await all_see("free", 100)
            await chat(http, question(user, "Hello [usage input=7 output=9]"))
            await all_see("free", 116)
            await http.put(address(user), json={"tier": "pro"})
            await all_see("pro", 116)
            assert (await anext(events(others)))[1]["tokensUsed"] == 0


# Who may call


async def test_pages_of_this_machine_may_call_and_others_may_not(http: httpx2.AsyncClient, user: str) -> None:
    allowed = ["http://localhost:3000", "http://127.0.0.1:5173", "https://localhost", "http://[::1]:8080"]
    foreign = ["https://example.com", "http://localhost.example.com", "http://127.0.0.1.example.com"]
    foreign += ["http://not-localhost", "http://example.com#localhost", "null"]
    for origin in (*allowed, *foreign):
        expected = origin if origin in allowed else None
        answer = await http.get("/api/usage", params={"userId": user}, headers={"Origin": origin})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers.get("access-control-allow-origin") == expected
        for method, fields in [
            ("POST", "content-type, idempotency-key"),
            ("PUT", "authorization"),
            ("HEAD", "accept"),
        ]:
            preflight = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": fields}
            preflight["Access-Control-Request-Private-Network"] = "true"
            answer = await http.options("/api/usage", headers={"Origin": origin, **preflight})
            assert answer.headers.get("access-control-allow-origin") == expected
            if expected is None:
                assert "CHATRAIL_CORS_ORIGINS" in problem_of(answer, 400)["detail"]
            else:
                assert answer.status_code == 200


@pytest.mark.parametrize("host", ["example.com", "example.com:8000", "127.0.0.1.example.com", "169.254.1.1", ""])
async def test_a_foreign_name_that_points_here_is_turned_away(http: httpx2.AsyncClient, user: str, host: str) -> None:
    answer = await http.get("/api/usage", params={"userId": user}, headers={"Host": host})
    problem_of(answer, 421)


NAMES = ["localhost", "localhost:1", "127.0.0.1", "127.0.0.2:80", "[::1]", "[::1]:8000"]


@pytest.mark.parametrize("host", [*NAMES, "LOCALHOST", "LocalHost:8000", "localhost.", "localhost.:8000"])
async def test_this_machine_is_answered_under_each_of_its_names(
    http: httpx2.AsyncClient, user: str, host: str
) -> None:
    assert (await http.get("/api/usage", params={"userId": user}, headers={"Host": host})).status_code == 200


async def test_what_is_an_operators_needs_the_operators_key_where_there_is_one(
    guarded_stack: Stack, user: str
) -> None:
    async with client_of(guarded_stack) as http:
        calls = [
            ("POST", "/api/usage", report(user)),
            ("PUT", address(user), {"tier": "pro"}),
            ("POST", "/api/usage/adjustments", {"userId": user, "tokensUsed": -94, "reason": "any", "actor": "any"}),
        ]
        async with nothing_recorded(guarded_stack):
            for method, path, body in calls:
                for header in (None, OPERATOR_KEY, f"Basic {OPERATOR_KEY}", "Bearer", f"Bearer {OPERATOR_KEY}x"):
                    headers = {"Authorization": header} if header else {}
                    answer = await http.request(method, path, json=body, headers=headers)
                    assert "CHATRAIL_OPERATOR_KEY" in problem_of(answer, 401)["detail"]
                    assert answer.headers["www-authenticate"] == "Bearer"
        for method, path, body in calls:
            headers = {"Authorization": f"bearer  {OPERATOR_KEY}"}
            answer = await http.request(method, path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
        found = await usage(http, user)
        assert (found["tokensUsed"], found["tier"]) == (8_000, "pro")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104 - refused
async def test_in_open_mode_chat_refuses_to_listen_to_the_network(host: str) -> None:
    ended = await forked.run("services.chat", "serve", env=environment(CHATRAIL_HOST=host), apart=True)
    assert ended.status == 1
    assert ended.err.count("\n") == 1
    assert "Set CHATRAIL_HOST=127.0.0.1." in ended.err


# What an operator sees, and what nobody sees


async def test_the_process_says_that_it_lives_that_it_is_ready_and_what_it_has_counted(
    http: httpx2.AsyncClient, user: str
) -> None:
    await chat(http, question(user))
    assert (await http.get("/healthz")).json() == {"status": "ok"}
    assert (await http.get("/readyz")).json() == {"status": "ready"}
    metrics = (await http.get("/metrics")).text
    assert 'chatrail_generations_total{outcome="completed"}' in metrics
    assert "chatrail_generations_running 0.0" in metrics


async def test_no_prompt_answer_or_key_is_in_a_file_an_event_or_a_metric(guarded_stack: Stack) -> None:
    prompt, system = f"prompt-{uuid4()}", f"system-{uuid4()}"
    user = f"watched {uuid4()}"
    async with client_of(guarded_stack) as http:
        answers = []
        for directive in ("", "[fail middle]", "[cut middle]"):
            asked = question(user, f"{prompt} {directive}", system=system)
            answers.append("".join(data["text"] for name, data in await chat(http, asked) if name == "delta"))
        assert prompt in answers[0]  # the stand-in repeats what it was asked
        await leave_in_the_middle(http, question(user, f"{prompt} [slow 20ms]", system=system))
        for bad in ({"messages": [{"role": prompt, "content": prompt}]}, {"system": [prompt]}, {"model": prompt}):
            await http.post("/api/chat", json={**question(user, prompt), **bad})
        await post(http, "/api/chat", f"{{{prompt}".encode())
        await http.post("/api/chat", json=question(user, f"{prompt} [fail 400] [fail {prompt}]"))
        await http.put(
            "/api/subscriptions/any", json={"tier": "pro"}, headers={"Authorization": f"Bearer {OPERATOR_KEY}"}
        )
        await logs(http, user, 5)
        metrics = [
            (await http.get(f"{guarded_stack.endpoints[service]}/metrics")).content
            for service in ("chat", "ledger", "quota")
        ]
    private = [secret.encode() for secret in (prompt, system, OPERATOR_KEY, PROVIDER_KEY, answers[0][:40])]
    files = list(contents(guarded_stack.data))
    assert any(user.encode() in text for text in files)
    for text in (*metrics, *files):
        assert not [secret for secret in private if secret in text]


async def test_in_the_end_no_hold_is_left(stack: Stack) -> None:
    async def none_left() -> bool:
        return not open_holds(stack)

    await eventually(none_left)
