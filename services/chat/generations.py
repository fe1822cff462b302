"""All generations that are under way: started here, and waited for before the process ends."""

import asyncio

import structlog

from services.chat.claude import Prompt
from services.chat.generation import Generation, Parts
from services.chat.waiting import HasLeft
from shared.errors import Unavailable
from shared.events import Metadata

log = structlog.get_logger()


class Generations:
    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._running: dict[asyncio.Task[None], Generation] = {}
        self._is_closed = False

    async def start(
        self, prompt: Prompt, *, generation_id: str, user_id: str, metadata: Metadata, has_left: HasLeft
    ) -> Generation:
        """Authorized and on the outbox. Raises Problem 429, or Unavailable: then Claude was not asked."""
        if self._is_closed:
            raise Unavailable("The service is restarting.", retry_after_s=2)
        generation = Generation(self.parts, prompt, generation_id=generation_id, user_id=user_id, metadata=metadata)
        await generation.authorize(has_left)
        task = asyncio.create_task(generation.run(), name=f"generation {generation_id}")
        self._running[task] = generation
        task.add_done_callback(self._ended)
        return generation

    def close(self) -> None:
        """No new ones."""
        self._is_closed = True

    def interrupt(self) -> None:
        """End what is still running; each is settled as `interrupted`."""
        for generation in self._running.values():
            generation.interrupt()

    async def stop(self) -> None:
        self.interrupt()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()):
            log.error("generation_failed", task=task.get_name(), error=repr(error))
