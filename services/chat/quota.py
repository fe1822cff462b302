"""What chat asks of quota, and what it remembers so that every answer includes what it already knows."""

import asyncio
from collections import defaultdict

from nats.aio.client import Client

from services.chat.claude import Claude, Prompt
from services.chat.problems import limit_exceeded
from shared import calls
from shared.broker import call
from shared.calls import Authorize, Granted, Pending, Refused, UsageQuery, authorization
from shared.events import GenerationCompleted

# Quota settles within a fraction of a second of publishing. What a replica took along when it died is settled after
# the stream's ack_wait and the start of another; until then quota's answers are told of what is on the way.
SETTLED_AFTER_S = 15.0
# More than this for one user at once is a bulk import, which need not read its own writes.
PENDING_MAX = 100


class Quota:
    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._pending: defaultdict[str, dict[str, Pending]] = defaultdict(dict)

    async def authorize(self, claude: Claude, prompt: Prompt, *, generation_id: str, user_id: str) -> Granted:
        """A hold for the generation, with the output clamped to what is left.

        Raises Problem 429 when nothing is left, before anything is sent to Claude; Unavailable when quota cannot
        be asked: then nothing is spent.
        """
        answer = await self._ask(prompt, prompt.input_tokens_max, prompt.output_tokens_max, generation_id, user_id)
        if isinstance(answer, Refused) and answer.tokens_available > 0:
            # The bound by bytes is generous. Near the limit it is worth asking how long the prompt really is.
            input_tokens = await claude.count_input_tokens(prompt)
            answer = await self._ask(prompt, input_tokens, 1, generation_id, user_id)
        if isinstance(answer, Refused):
            raise limit_exceeded(answer)
        return answer

    async def _ask(
        self, prompt: Prompt, input_tokens_max: int, output_tokens_min: int, generation_id: str, user_id: str
    ) -> Granted | Refused:
        request = Authorize(
            generation_id=generation_id,
            user_id=user_id,
            input_tokens_max=input_tokens_max,
            output_tokens_min=output_tokens_min,
            output_tokens_max=prompt.output_tokens_max,
            pending=self._known(user_id),
        )
        return authorization.validate_json(await call(self._nc, calls.AUTHORIZE, request))

    async def usage(self, user_id: str, *, including: GenerationCompleted | None = None) -> bytes:
        """The body of GET /api/usage, as quota wrote it; with an event, too, that is not on the disk yet."""
        pending = self._known(user_id)
        if including:
            pending += (Pending.of(including.id, including.data),)
        return await call(self._nc, calls.USAGE, UsageQuery(user_id=user_id, pending=pending))

    def remember(self, event: GenerationCompleted) -> None:
        """The event is durable: from now on every answer includes it."""
        known = self._pending[event.subject]
        if len(known) < PENDING_MAX:
            known[event.id] = Pending.of(event.id, event.data)

    def published(self, event: GenerationCompleted) -> None:
        """The stream has the event: quota will settle it by itself in a moment."""
        asyncio.get_running_loop().call_later(SETTLED_AFTER_S, self._forget, event.subject, event.id)

    def _forget(self, user_id: str, event_id: str) -> None:
        known = self._pending[user_id]
        known.pop(event_id, None)
        if not known:
            del self._pending[user_id]

    def _known(self, user_id: str) -> tuple[Pending, ...]:
        known = self._pending.get(user_id)
        return tuple(known.values()) if known else ()
