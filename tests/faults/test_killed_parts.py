"""Any part is killed while fifty people chat, comes back, and the three counts agree as if nothing had happened."""

import asyncio

import psutil
import pytest

from tests.fixtures import eventually
from tests.people import Answer, ask_until_answered, asked, client_of, given, open_holds, recorded, rows, totalled
from tests.stack import Stack

PEOPLE = 50


async def _fifty_people_chat_while_a_part_dies(stack: Stack, part: str) -> list[Answer]:
    asked_before = await asked(stack)
    async with client_of(stack) as client:
        questions = [
            asyncio.create_task(ask_until_answered(client, f"{part} {person}", f"I am number {person}. [slow 20ms]"))
            for person in range(PEOPLE)
        ]

        async def most_are_being_answered() -> bool:
            return await asked(stack) > asked_before + PEOPLE * 0.8

        await eventually(most_are_being_answered)
        stack.kill(part)
        return await asyncio.gather(*questions)


@pytest.mark.parametrize("part", ["quota", "ledger", "broker"])
async def test_a_killed_part_costs_no_token(stack: Stack, part: str) -> None:
    answers = await _fifty_people_chat_while_a_part_dies(stack, part)
    assert {answer.last for answer in answers} == {"done"}
    gave = (await given(stack))["tokens"]

    async def all_agree() -> bool:
        return recorded(stack) == totalled(stack) == gave and not open_holds(stack)

    await eventually(all_agree)


async def test_parts_that_are_told_to_end_together_with_their_broker_end_in_order(stack: Stack) -> None:
    parts = [psutil.Process(stack.pid(part)) for part in ("broker", "quota", "ledger")]
    for part in parts:
        part.terminate()
    _, alive = psutil.wait_procs(parts, timeout=5)
    assert not alive

    await stack.answers(f"{stack.url}/readyz")
    said = [
        line for part in ("quota", "ledger") for line in (stack.data / f"logs/{part}.log").read_text().splitlines()
    ]
    assert [line for line in said if not line.startswith("{")] == []  # a traceback is no JSON


async def test_a_killed_chat_settles_what_it_left_open_as_it_stood(stack: Stack) -> None:
    before, gave_before = recorded(stack), await given(stack)
    await _fifty_people_chat_while_a_part_dies(stack, "chat")
    gave = await given(stack)
    generations = gave["generations"] - gave_before["generations"]
    completed = gave["byOutcome"]["completed"]["tokens"] - gave_before["byOutcome"]["completed"]["tokens"]

    async def every_generation_is_settled() -> dict[str, tuple[int, int]] | None:
        query = (
            "SELECT outcome, count(*), sum(tokens_used) FROM usage"
            " WHERE user_id LIKE 'chat %' AND tokens_used > 0 GROUP BY outcome"
        )
        found = {outcome: (count, tokens) for outcome, count, tokens in rows(stack.data / "ledger.db", query)}
        is_whole = sum(count for count, _ in found.values()) >= generations
        return found if is_whole and recorded(stack) == totalled(stack) and not open_holds(stack) else None

    found = await eventually(every_generation_is_settled)
    assert found.get("completed", (0, 0))[1] == completed
    # What the dead process had not written down yet is a tenth of a second of each answer; on a busy machine, more.
    cut_off = gave["tokens"] - gave_before["tokens"] - completed
    assert 0.2 * cut_off < found["interrupted"][1] < 1.5 * cut_off
    assert recorded(stack) - before == completed + found["interrupted"][1]
