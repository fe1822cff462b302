import asyncio
from collections.abc import Sequence

import pytest

from services.chat.batching import Batching


class Commits:
    """Keeps numbers. A group is under way until `gate` opens; one with a negative number in it fails."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()

    async def __call__(self, numbers: Sequence[int]) -> None:
        self.groups.append([*numbers])
        self.begun.set()
        await self.gate.wait()
        if min(numbers) < 0:
            raise OSError("disk full")


@pytest.fixture
async def commits() -> Commits:
    return Commits()


def submitted(together: Batching[int], *numbers: int) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(together.submit(number)) for number in numbers]


async def test_every_caller_hears_once_its_own_is_done(commits: Commits) -> None:
    commits.gate.set()
    together = Batching(commits)
    await asyncio.gather(*submitted(together, *range(100)))
    await together.submit(7)
    assert commits.groups == [[*range(100)], [7]]


async def test_what_arrives_during_a_commit_shares_the_next_in_order_of_arrival(commits: Commits) -> None:
    together = Batching(commits)
    first = submitted(together, 1)
    await commits.begun.wait()
    later = submitted(together, 5, 3, 4)
    commits.gate.set()
    await asyncio.gather(*first, *later)
    assert commits.groups == [[1], [5, 3, 4]]


async def test_a_group_is_never_larger_than_its_limit(commits: Commits) -> None:
    commits.gate.set()
    await asyncio.gather(*submitted(Batching(commits, size_max=4), *range(10)))
    assert commits.groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_an_error_reaches_every_caller_of_its_group_and_none_of_the_next(commits: Commits) -> None:
    commits.gate.set()
    together = Batching(commits, size_max=3)
    outcomes = await asyncio.gather(*submitted(together, 1, -1, 2, 3, 4), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["disk full"] * 3 + ["None"] * 2
    await together.submit(5)
    assert commits.groups == [[1, -1, 2], [3, 4], [5]]


async def test_a_caller_that_is_cancelled_loses_nobodys_work(commits: Commits) -> None:
    together = Batching(commits)
    first = submitted(together, 1)
    await commits.begun.wait()
    gone, waiting = submitted(together, 2, 3)
    await asyncio.sleep(0)  # both have begun to wait
    for task in (*first, gone):
        task.cancel()
    commits.gate.set()
    await waiting
    assert gone.cancelled()
    assert commits.groups == [[1], [2, 3]]
