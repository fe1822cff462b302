"""What chat asks of quota, and what it remembers so that every answer includes what it already knows."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import structlog
from nats.aio.client import Client
from pydantic import TypeAdapter

from services.chat.claude import Claude, Prompt
from services.chat.deadline import Deadline
from services.chat.metering import Held
from services.chat.problems import Problem
from services.chat.ratelimit import headers, refusal
from services.chat.waiting import HasLeft, WaitingRoom
from shared import calls
from shared.broker import call
from shared.calls import Authorize, Granted, LimitState, Pending, Refused, UsageQuery, authorization
from shared.errors import Unanswered, Unavailable
from shared.events import GenerationCompleted

log = structlog.get_logger()

# Quota settles within a fraction of a second of publishing. What a replica took along when it died is settled after
# the stream's ack_wait and the start of another; until then quota's answers are told of what is on the way.
SETTLED_AFTER_S = 15.0
# What most answers need. Where several wait for the same tokens, none of them holds more, so that more run at once.
CROWDED_OUTPUT_TOKENS = 1024
# Of one user: who has more in so short a time reads the newest of them, and the oldest are settled long ago.
PENDING_MAX = 100


class Shown(NamedTuple):
    """The body of GET /api/usage, as quota wrote it, and each limit behind it, still to be read."""

    body: bytes
    limits_json: bytes

    @property
    def limits(self) -> tuple[LimitState, ...]:
        return _limits.validate_json(self.limits_json)


class _Answer(msgspec.Struct):
    usage: msgspec.Raw
    limits: msgspec.Raw


_answer = msgspec.json.Decoder(_Answer)
_limits = TypeAdapter(tuple[LimitState, ...])


class Quota:
    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self.waiting_room = WaitingRoom(nc)
        self._pending: defaultdict[str, dict[str, Pending]] = defaultdict(dict)

    async def authorize(
        self, claude: Claude, prompt: Prompt, *, generation_id: str, user_id: str, has_left: HasLeft
    ) -> tuple[Granted, Held]:
        """A hold for the generation, with the output clamped to what is left.

        Where only the user's other generations are in the way, it waits for them to end. Raises Problem 429 when
        that does not help, before anything is sent to Claude; Unavailable when quota cannot be asked: then nothing
        is spent. Its cause is Unanswered where an earlier question may still be granted, by a replica that is slow.
        """
        asking = _Asking(self._nc, claude, prompt, generation_id, user_id, self._known)
        try:
            answer = await asking.for_all()
            if isinstance(answer, Refused) and answer.usage.tokens_remaining != 0:
                answer = await asking.for_what_fits()
            if isinstance(answer, Refused) and answer.reason != "tokens":
                answer = await self.waiting_room.wait(user_id, answer, asking.for_what_fits, has_left=has_left)
        except (Problem, Unavailable) as given_up:  # an earlier question was heard all the same
            raise given_up from asking.unanswered or given_up.__cause__
        if isinstance(answer, Refused):
            raise refusal(answer) from asking.unanswered
        return answer, Held(asking.input_tokens_max, answer.output_tokens_max)

    async def usage(self, user_id: str, deadline: Deadline, *, including: Pending | None = None) -> Shown:
        """What is used and left; also with what is not on the disk yet."""
        pending = self._known(user_id)
        if including:
            pending += (including,)
        query = UsageQuery(user_id=user_id, pending=pending)
        try:
            body = await call(self._nc, calls.USAGE, query, timeout_s=deadline.left_s)
        except Unanswered:
            body = await call(self._nc, calls.USAGE, query, timeout_s=deadline.left_s)
        answer = _answer.decode(body)
        return Shown(bytes(answer.usage), bytes(answer.limits))

    async def rate_limit(self, user_id: str, deadline: Deadline) -> dict[str, str]:
        """The header fields for an answer that is not itself quota's; none where quota cannot be asked in time."""
        try:
            return headers((await self.usage(user_id, deadline)).limits)
        except Unavailable as error:
            log.warning("limits_not_told", reason=error.detail)
            return {}

    @asynccontextmanager
    async def telling_limits(self, user_id: str, deadline: Deadline) -> AsyncIterator[None]:
        """A refusal tells the user's limits as every answer does; for a fault of our own nothing more is asked."""
        try:
            yield
        except Problem as refused:
            if refused.status < 500 and "RateLimit" not in refused.headers:
                refused.headers |= await self.rate_limit(user_id, deadline)
            raise

    def remember(self, event: GenerationCompleted) -> None:
        """The event is durable: from now on every answer includes it."""
        known = self._pending[event.subject]
        known[event.id] = Pending.of(event.id, event.data)
        if len(known) > PENDING_MAX:
            del known[next(iter(known))]
        self.waiting_room.changed(event.subject)

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


@dataclass
class _Asking:
    """What one generation asks of quota, until it is granted or refused for good.

    `unanswered` is of an earlier question that may still be granted.
    """

    nc: Client
    claude: Claude
    prompt: Prompt
    generation_id: str
    user_id: str
    known: Callable[[str], tuple[Pending, ...]]
    unanswered: Unanswered | None = None

    def __post_init__(self) -> None:
        self.input_tokens_max, self._is_counted = self.prompt.input_tokens_max, False

    async def for_all(self) -> Granted | Refused:
        return await self._ask(least=self.prompt.output_tokens_max, most=self.prompt.output_tokens_max)

    async def for_what_fits(self, is_crowded: bool = False) -> Granted | Refused:
        wanted = self.prompt.output_tokens_max
        most = min(wanted, CROWDED_OUTPUT_TOKENS) if is_crowded else wanted
        answer = await self._ask(least=1, most=most)
        if isinstance(answer, Refused) and not self._is_counted and self._is_worth_counting(answer):
            answer = await self._for_its_true_length(answer, most)
        return answer

    def _is_worth_counting(self, refused: Refused) -> bool:
        """The bound by bytes is generous. Where it does not fit, it is worth asking how long the prompt really is;
        of what people write, no provider makes fewer than half of the estimated tokens. And where it is more than
        the whole plan, the caller should hear so for certain."""
        room = refused.tokens_available
        if refused.reason == "tokens":  # for good: also what others hold, and may give back, would not do
            room = refused.usage.tokens_remaining or 0
        return refused.exceeds_plan or room > self.prompt.input_tokens_estimate // 2

    async def _for_its_true_length(self, refused: Refused, most: int) -> Granted | Refused:
        """Asked again with what Claude counts, where it does. Raises Problem where it cannot now, and all depends on
        that."""
        try:
            counted = await self.claude.count_input_tokens(self.prompt)
        except Problem:
            if refused.reason == "tokens":
                raise
            return refused
        self._is_counted = True
        if counted is None:
            return refused.model_copy(update={"exceeds_plan": False})
        self.input_tokens_max = counted
        return await self._ask(least=1, most=most)

    async def _ask(self, *, least: int, most: int) -> Granted | Refused:
        request = Authorize(
            generation_id=self.generation_id,
            user_id=self.user_id,
            model=self.prompt.model,
            input_tokens_max=self.input_tokens_max,
            output_tokens_min=least,
            output_tokens_max=most,
            output_tokens_asked=self.prompt.output_tokens_max,
            pending=self.known(self.user_id),
        )
        deadline = Deadline()  # of each question: it follows an answer, of quota's or of Claude's
        try:
            answer = await call(self.nc, calls.AUTHORIZE, request, timeout_s=deadline.left_s)
        except Unanswered as error:
            self.unanswered = error
            answer = await call(self.nc, calls.AUTHORIZE, request, timeout_s=deadline.left_s)
        return authorization.validate_json(answer)
