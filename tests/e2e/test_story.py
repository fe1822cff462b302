"""The product page's story, through HTTP, with the provider's own count as the judge."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.fixtures import eventually
from tests.people import ask, client_of, given, open_holds, recorded, totalled
from tests.stack import Stack


@pytest.fixture
def counted_stack(tmp_path: Path) -> Iterator[Stack]:
    """Another, on which only Claude's answers are counted: together they are what the stand-in gave."""
    with Stack(tmp_path / "data") as running:
        yield running


async def test_a_user_goes_from_nothing_to_the_limit_and_on_with_a_larger_plan(stack: Stack) -> None:
    user = "from nothing to the limit"
    fresh = await stack.usage(user)
    assert fresh == {
        "tier": "free",
        "tokensUsed": 0,
        "tokensLimit": 108_000,
        "tokensRemaining": 108_000,
        "usagePercentage": 0,
        "tokensHeld": 0,
        "period": "month",
        "periodStart": fresh["periodStart"],
        "resetsAt": fresh["resetsAt"],
        "upgradeTo": "pro",
        "costUsd": "0.00",
    }
    async with client_of(stack) as client:
        answer = await ask(client, user, "Explain metering. [usage input=5282 output=2812]")
        assert answer.last == "done"
        assert (answer.data["inputTokens"], answer.data["outputTokens"]) == (5_282, 2_812)
        after_one = await stack.usage(user)
        assert (after_one["tokensUsed"], after_one["tokensRemaining"]) == (8_094, 99_906)
        assert after_one["usagePercentage"] == 7.5

        for report, used in ((6_500, 14_594), (75_406, 90_000), (18_000, 108_000)):
            await stack.report(user, report)
            assert (await stack.usage(user))["tokensUsed"] == used
        requests_before = (await given(stack))["messageRequests"]
        with pytest.raises(httpx2.HTTPStatusError) as refused:
            await ask(client, user, "One more?")
        problem = refused.value.response.json()
        assert refused.value.response.status_code == 429
        assert (problem["title"], problem["detail"]) == ("Token limit exceeded", "Upgrade to Pro")
        assert (problem["tokensRemaining"], problem["resetsAt"]) == (0, fresh["resetsAt"])
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert (await given(stack))["messageRequests"] == requests_before

        (await client.put(f"/api/subscriptions/{user}", json={"tier": "pro"})).raise_for_status()
        assert (await ask(client, user, "And now?")).last == "done"
        assert (await stack.usage(user))["tokensLimit"] == 500_000


async def test_fifty_people_chatting_at_once_are_counted_to_the_token(counted_stack: Stack) -> None:
    people = [f"person {number}" for number in range(50)]
    async with client_of(counted_stack) as client:
        for _ in range(3):
            answers = await asyncio.gather(*(ask(client, user, f"I am {user}. [slow 5ms]") for user in people))
            assert {answer.last for answer in answers} == {"done"}
        seen = sum([(await counted_stack.usage(user))["tokensUsed"] for user in people])
    gave = (await given(counted_stack))["tokens"]
    assert seen == gave

    async def all_agree() -> bool:
        return recorded(counted_stack) == totalled(counted_stack) == gave and not open_holds(counted_stack)

    await eventually(all_agree)


async def test_fifty_tabs_of_one_user_never_pass_the_limit(stack: Stack) -> None:
    user = "many tabs"
    await stack.report(user, 100_000)
    async with client_of(stack) as client:
        results = await asyncio.gather(
            *(ask(client, user, f"Tab {tab}? [usage input=40 output=4000]") for tab in range(50)),
            return_exceptions=True,
        )
    refused = [result for result in results if isinstance(result, httpx2.HTTPStatusError)]
    assert {problem.response.status_code for problem in refused} == {429}
    usage = await stack.usage(user)
    assert 100_000 < usage["tokensUsed"] <= 108_000
    assert len(refused) < 50
