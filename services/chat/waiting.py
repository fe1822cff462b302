"""Generations that would fit, if others of their user were over, wait for that instead of being refused."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from services.chat.problems import Problem
from shared.calls import Granted, Refused
from shared.errors import Unavailable
from shared.streams import quota_updated

# Called with whether others wait behind: then it should ask for no more than most answers need.
Ask = Callable[[bool], Awaitable[Granted | Refused]]
HasLeft = Callable[[], Awaitable[bool]]

# An answer is written in less; whoever still finds no room then is told to try again.
WAIT_S = 30.0
# So many of a line ask at once: at a limit that is used up, the rest of it is told so at this rate.
ASKING_MAX = 4
# Pushes are not durable: who is next asks this often in any case.
ASK_AGAIN_S = 1.0


class WaitingRoom:
    """One line for each user, in order of arrival: only its front asks again, when something has changed."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._lines: dict[str, _Line] = {}
        self._is_closed = False

    async def wait(self, user_id: str, refused: Refused, ask: Ask, *, has_left: HasLeft) -> Granted | Refused:
        """What `ask` answers once there is room, or once it is clear that there will be none; or after WAIT_S.

        For a caller who has left meanwhile nothing is asked: raises Problem 499, which nobody hears. Raises
        Unavailable when the process is told to stop.
        """
        line = self._lines.get(user_id)
        if line is None:
            line = self._lines[user_id] = _Line()
        line.waiting += 1
        try:
            async with asyncio.timeout(WAIT_S) as limit:
                async with line.front:
                    await self._listen(line, user_id)
                    # As in `applied`: a cancellation that comes together with an answer is swallowed.
                    while not limit.expired():
                        if self._is_closed:
                            raise Unavailable("The service is restarting.", retry_after_s=2)
                        if await has_left():
                            raise Problem(499, "The caller has left", "Nothing was sent to Claude.")
                        change = line.next_change
                        answer = await ask(line.waiting > 1)
                        if isinstance(answer, Granted) or answer.reason == "tokens":
                            return answer
                        refused = answer
                        await _wait(change)
        except TimeoutError:
            pass
        finally:
            line.waiting -= 1
            if not line.waiting:
                del self._lines[user_id]
                await line.leave()
        return refused

    def close(self) -> None:
        """Nobody waits any longer."""
        self._is_closed = True
        for line in self._lines.values():
            line.changed()

    def changed(self, user_id: str) -> None:
        """A generation of this user is over: who waits may ask again."""
        if line := self._lines.get(user_id):
            line.changed()

    async def _listen(self, line: "_Line", user_id: str) -> None:
        """To the generations of this user that other processes run."""
        if line.is_listening:
            return
        line.is_listening = True

        async def heard(_message: object) -> None:
            line.changed()

        with suppress(NatsError):  # asking again by the clock will do
            line.subscription = await self._nc.subscribe(quota_updated(user_id), cb=heard)


class _Line:
    def __init__(self) -> None:
        self.waiting = 0
        self.front = asyncio.Semaphore(ASKING_MAX)
        self.next_change = asyncio.Event()
        self.is_listening = False
        self.subscription: Subscription | None = None

    def changed(self) -> None:
        happened, self.next_change = self.next_change, asyncio.Event()
        happened.set()

    async def leave(self) -> None:
        if self.subscription is not None:
            with suppress(NatsError):
                await self.subscription.unsubscribe()


async def _wait(event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(ASK_AGAIN_S):
            await event.wait()
