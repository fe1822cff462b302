"""Work that arrives while a batch of it is under way shares the next batch: group commit, where it writes."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Batching(Generic[Item]):
    """`await submit(item)` returns once the batch that the item was in is done.

    `work` gets at most `size_max` items, in order of arrival. What it raises is raised to every caller of that batch.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Awaitable[None]], *, size_max: int = 256) -> None:
        self._work = work
        self._size_max = size_max
        self._waiting: list[tuple[Item, asyncio.Future[None]]] = []
        self._running: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        return self._running is None

    async def submit(self, item: Item) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._drain())
        await future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._size_max], self._waiting[self._size_max :]
            failure: Exception | None = None
            try:
                await self._work([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - handed to every caller, none is left waiting
                failure = error
            for _, future in batch:
                if future.done():  # the caller was cancelled; its work is done all the same
                    continue
                if failure:
                    future.set_exception(failure)
                else:
                    future.set_result(None)
        self._running = None
