"""POST /api/usage/adjustments over the whole stack: what an operator credits, charges and adds, each once."""

import asyncio
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx2
import psutil
import pytest

from tests.e2e.test_api import (
    BAD_NAMES,
    as_json,
    cases,
    log_page,
    logs,
    nothing_recorded,
    post,
    problem_of,
    recorded,
    report,
    send_report,
    usage,
)
from tests.people import client_of
from tests.stack import Stack

PATH = "/api/usage/adjustments"
TOLD_WITHIN_S = 2.0


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(stack) as client:
        yield client


@pytest.fixture
def user() -> str:
    """Somebody who was never seen."""
    return f"adjusted {uuid4()}"


def correction(user: str, tokens: int = -94, **fields: Any) -> dict[str, Any]:
    return {"userId": user, "tokensUsed": tokens, "reason": "counted twice", "actor": "support", **fields}


def top_up(user: str, tokens: int = 50_000, **fields: Any) -> dict[str, Any]:
    return {"userId": user, "topUpTokens": tokens, "reason": "invoice 7", "actor": "billing", **fields}


async def adjust(http: httpx2.AsyncClient, body: dict[str, Any], **headers: str) -> str:
    """The id of the event."""
    answer = await http.post(PATH, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"success": True, "id": answer.json()["id"]}
    return str(answer.json()["id"])


# What counts


async def test_a_credit_and_a_charge_are_in_the_very_next_answer(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user))
    for tokens, expected in ((-94, 8_000), (1_000, 9_000), (-9_000, 0), (5, 5)):
        await adjust(http, correction(user, tokens))
        assert (await usage(http, user))["tokensUsed"] == expected


async def test_an_adjustment_is_in_the_next_answer_while_much_else_happens_to_the_user(
    http: httpx2.AsyncClient, user: str
) -> None:
    async def report_on_and_on() -> None:
        while True:
            await send_report(http, report(user, 1))

    busy = asyncio.create_task(report_on_and_on())
    try:
        for times in range(1, 6):
            await adjust(http, correction(user, 1_000_000))
            assert (await usage(http, user))["tokensUsed"] >= 1_000_000 * times
        assert not busy.done()
    finally:
        busy.cancel()


async def test_a_correction_is_a_record_with_its_reason_and_actor(http: httpx2.AsyncClient, user: str) -> None:
    event_id = await adjust(http, correction(user, -94, reason="Erstattung 🛤", actor="finance"))
    (record,) = await logs(http, user, 1)
    assert (record["id"], record["actionType"], record["tokensUsed"]) == (event_id, "adjustment", -94)
    assert record["metadata"] == {"reason": "Erstattung 🛤", "actor": "finance"}
    assert (record["model"], record["inputTokens"], record["outcome"]) == (None, None, None)


@pytest.mark.parametrize("outlives", [True, False])
async def test_a_top_up_is_a_record_that_uses_nothing(http: httpx2.AsyncClient, user: str, outlives: bool) -> None:
    event_id = await adjust(http, top_up(user, 50_000, **({"outlivesPeriod": True} if outlives else {})))
    (record,) = await logs(http, user, 1)
    assert (record["id"], record["actionType"], record["tokensUsed"]) == (event_id, "top_up", 0)
    said = {"topUpTokens": 50_000, "outlivesPeriod": outlives}
    assert record["metadata"] == {"reason": "invoice 7", "actor": "billing", **said}
    assert (await usage(http, user))["tokensUsed"] == 0


async def test_what_takes_effect_last_month_changes_last_month(http: httpx2.AsyncClient, user: str) -> None:
    await send_report(http, report(user))
    last_month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0) - timedelta(hours=1)
    await adjust(http, correction(user, -94, effectiveAt=last_month.isoformat()))
    assert (await usage(http, user))["tokensUsed"] == 8_094
    _, record = await logs(http, user, 2)
    assert datetime.fromisoformat(record["time"]) == last_month
    query = {"userId": user, "from": str(last_month.date()), "to": str(last_month.date())}
    days = (await http.get("/api/usage/history", params=query)).json()["days"]
    assert [(day["tokensUsed"], day["generations"]) for day in days] == [(-94, 0)]


# Once a key


async def test_a_key_counts_once_and_a_repeat_has_the_id_of_the_first(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    first = await adjust(http, correction(user, 1_000), **key)
    async with nothing_recorded(stack):
        assert await adjust(http, correction(user, 1_000), **key) == first
    assert await adjust(http, correction(user, 1_000), **{"Idempotency-Key": str(uuid4())}) != first
    assert (await usage(http, user))["tokensUsed"] == 2_000


async def test_of_twenty_at_once_with_one_key_one_counts_and_all_are_answered_alike(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    key, before = {"Idempotency-Key": str(uuid4())}, await recorded(stack)

    async def adjust_and_look() -> tuple[str, int]:
        return await adjust(http, correction(user, 1_000), **key), (await usage(http, user))["tokensUsed"]

    answers = await asyncio.gather(*(adjust_and_look() for _ in range(20)))
    (event_id,) = {event_id for event_id, _ in answers}
    assert {tokens_used for _, tokens_used in answers} == {1_000}
    assert await recorded(stack) == before + 1
    assert [record["id"] for record in await logs(http, user, 1)] == [event_id]


async def test_without_a_key_each_counts(http: httpx2.AsyncClient, user: str) -> None:
    ids = await asyncio.gather(*(adjust(http, correction(user, 1_000)) for _ in range(3)))
    assert len(set(ids)) == 3
    assert (await usage(http, user))["tokensUsed"] == 3_000


async def test_a_key_belongs_to_one_body(stack: Stack, http: httpx2.AsyncClient, user: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    await adjust(http, top_up(user), **key)
    others = [
        top_up(user, 50_001),
        top_up(f"{user} 2"),
        top_up(user, outlivesPeriod=True),
        top_up(user, reason="invoice 8"),
        top_up(user, effectiveAt="2026-11-22T12:00:00Z"),
        correction(user, 50_000),
    ]
    async with nothing_recorded(stack):
        for other in others:
            document = problem_of(await http.post(PATH, json=other, headers=key), 409)
            assert "use a new key" in document["detail"]


async def test_the_key_of_a_report_is_not_that_of_an_adjustment(http: httpx2.AsyncClient, user: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    for _ in range(2):
        await send_report(http, report(user), **key)
        await adjust(http, correction(user, -94), **key)
        assert (await usage(http, user))["tokensUsed"] == 8_000


async def test_when_the_stream_does_not_answer_nothing_is_recorded_and_a_repeat_counts_once(
    stack: Stack, http: httpx2.AsyncClient, user: str
) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    broker = psutil.Process(stack.pid("broker"))
    broker.send_signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(TOLD_WITHIN_S):
            answer = await http.post(PATH, json=correction(user, 1_000), headers=key)
    finally:
        broker.send_signal(signal.SIGCONT)
    problem_of(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1
    await stack.answers(f"{stack.url}/readyz")
    assert await log_page(http, user) == []
    for _ in range(2):
        event_id = await adjust(http, correction(user, 1_000), **key)
        assert (await usage(http, user))["tokensUsed"] == 1_000
        assert [record["id"] for record in await logs(http, user, 1)] == [event_id]


# What is refused

NO_FLAGS: list[Any] = [None, 1, "true", []]
BAD_CORRECTIONS: list[dict[str, Any]] = [
    *({"userId": name} for name in BAD_NAMES),
    *({"reason": name} for name in BAD_NAMES),
    *({"actor": name} for name in BAD_NAMES),
    *({"tokensUsed": count} for count in [0, 1.5, -94.0, True, "-94", 10**30, 100_000_001, -100_000_001]),
    *({"effectiveAt": moment} for moment in ["", "today", "2026-11-22", "2026-11-22T12:00:00", [], True, 0, 1.5]),
    *({"effectiveAt": digits} for digits in ["20261124", "2026", "1764000000000", "-1", "1.5"]),
    *({"effectiveAt": moment} for moment in ["1969-12-31T23:59:59Z", "9999-01-01T00:00:00Z"]),
    {"tokens": 1},
    {"metadata": {}},
]
BAD_TOP_UPS: list[dict[str, Any]] = [
    *({"topUpTokens": count} for count in [0, -1, 1.5, 1.0, True, "50000", 10**30, 100_000_001]),
    *({"outlivesPeriod": no_flag} for no_flag in NO_FLAGS),
]


@cases(BAD_CORRECTIONS)
async def test_a_correction_that_makes_no_sense_is_refused_and_nothing_is_recorded(
    stack: Stack, http: httpx2.AsyncClient, user: str, fault: dict[str, Any]
) -> None:
    await refused(stack, http, {**correction(user), **fault}, field=next(iter(fault)))
    assert await log_page(http, user) == []


@cases(BAD_TOP_UPS)
async def test_a_top_up_that_makes_no_sense_is_refused_and_nothing_is_recorded(
    stack: Stack, http: httpx2.AsyncClient, user: str, fault: dict[str, Any]
) -> None:
    await refused(stack, http, {**top_up(user), **fault}, field=next(iter(fault)))
    assert await log_page(http, user) == []


@pytest.mark.parametrize("field", ["userId", "reason", "actor"])
async def test_an_adjustment_names_what_is_missing_from_it(
    stack: Stack, http: httpx2.AsyncClient, user: str, field: str
) -> None:
    body = correction(user)
    del body[field]
    assert await refused(stack, http, body, field=field) == f"{field}: is required"


async def test_an_adjustment_has_one_amount(stack: Stack, http: httpx2.AsyncClient, user: str) -> None:
    neither = {name: value for name, value in correction(user).items() if name != "tokensUsed"}
    for body in (neither, {**correction(user), "tokensUsed": None}, {**top_up(user), **correction(user)}):
        assert await refused(stack, http, body) == "body: send either tokensUsed or topUpTokens"
    outliving = correction(user, outlivesPeriod=True)
    assert await refused(stack, http, outliving) == "body: outlivesPeriod goes with topUpTokens only"


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_an_idempotency_key_of_no_use_is_refused(
    stack: Stack, http: httpx2.AsyncClient, user: str, key: str
) -> None:
    async with nothing_recorded(stack):
        problem_of(await http.post(PATH, json=correction(user), headers={"Idempotency-Key": key}), 422)


async def refused(stack: Stack, http: httpx2.AsyncClient, body: dict[str, Any], *, field: str = "") -> str:
    """The words of a 422 that names the field and records nothing."""
    async with nothing_recorded(stack):
        document = problem_of(await post(http, PATH, as_json(body)), 422)
    assert document["errors"][0]["field"].startswith(field)
    return str(document["detail"])
