"""Group commit: work that arrives while a transaction is under way shares the next one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class GroupCommit(Generic[Item, Result]):
    """`await submit(item)` gives the item's own result once the transaction it was in is committed.

    `commit` gets at most `size_max` items, in order of arrival, and returns a result for each. What it raises is
    raised to every caller of that group.
    """

    def __init__(
        self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], *, size_max: int = 256
    ) -> None:
        self._commit = commit
        self._size_max = size_max
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[: self._size_max], self._waiting[self._size_max :]
            outcomes: Sequence[Result | Exception]
            try:
                outcomes = await self._commit([item for item, _ in group])
                if len(outcomes) != len(group):
                    raise RuntimeError(f"{len(outcomes)} results for {len(group)} items")
            except Exception as error:  # noqa: BLE001 - handed to every caller, none is left waiting
                outcomes = [error] * len(group)
            for (_, future), outcome in zip(group, outcomes, strict=True):
                if future.done():  # the caller was cancelled; its work is committed all the same
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        self._running = None
