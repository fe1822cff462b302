"""The life of a generation: authorized, asked of Claude, passed on as it comes, settled once.

It runs in a task of its own, not in the response: whoever goes away, the tokens are counted.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import structlog
from prometheus_client import Counter, Gauge

from services.chat.claude import (
    Claude,
    Finished,
    Prompt,
    ProviderError,
    Started,
    Step,
    Text,
    estimate_tokens,
)
from services.chat.outbox import Outbox
from services.chat.problems import Problem
from services.chat.publisher import Publisher
from services.chat.quota import Quota
from services.chat.sse import KEEPALIVE, frame
from services.chat.waiting import HasLeft
from shared.calls import LimitState
from shared.errors import BadCall, Unanswered, Unavailable
from shared.events import Generation as Usage
from shared.events import GenerationCompleted, Metadata, Outcome, TokenCounts, UsageSource, utc_now

log = structlog.get_logger()
RUNNING = Gauge("chatrail_generations_running", "Generations under way")
FINISHED = Counter("chatrail_generations", "Generations by outcome", ["outcome"])
TOKENS = Counter("chatrail_tokens", "Tokens used by generations", ["kind"])

# Given, or each is looked up again for every draft of an event.
_ENVELOPE: dict[str, Any] = {
    name: field.default for name, field in GenerationCompleted.model_fields.items() if isinstance(field.default, str)
}
# Shorter than quota's holds live (15 minutes): no generation outlives its hold.
DEADLINE_S = 600.0
# What a process that dies may not have counted of a running answer.
CHECKPOINT_EVERY_S = 0.1
TOO_LONG = Problem(504, "Claude took too long", "What was answered so far is counted.")
BROKEN = Problem(500, "Internal error", "Something went wrong on our side; what was answered so far is counted.")
RESTARTING = Problem(
    503, "The service is restarting", "What was answered so far is counted; try again.", headers={"Retry-After": "2"}
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What every generation works with."""

    claude: Claude
    quota: Quota
    outbox: Outbox
    publisher: Publisher


class Generation:
    """One generation. `run()` is its task; `frames()` is what a browser reads; `abandon()` ends it early."""

    def __init__(
        self,
        parts: Parts,
        prompt: Prompt,
        *,
        generation_id: str,
        user_id: str,
        metadata: Metadata,
    ) -> None:
        self.id = generation_id
        self.user_id = user_id
        self.model = prompt.model
        self.limits: tuple[LimitState, ...] = ()
        self._text: list[str] = []
        self.problem: Problem | None = None
        self._usage = msgspec.Raw(b"null")
        self._stop_reason: str | None = None
        self._is_clamped = False
        self._is_asked = False
        self._has_begun = False
        self._parts, self._prompt = parts, prompt
        self._started_at, self._metadata = utc_now(), metadata
        self._counts: TokenCounts | None = None
        self._text_bytes = 0
        self._is_counted = False
        self._request_id: str | None = None
        self._early_end: Outcome | None = None
        self._frames: list[bytes] = []
        self._something_new = asyncio.Event()
        self._is_over = False
        self._deadline: asyncio.Timeout | None = None
        self._checkpoint: asyncio.TimerHandle | None = None
        self._checkpoints: set[asyncio.Task[None]] = set()

    async def authorize(self, has_left: HasLeft) -> None:
        """The intent on disk and the hold at quota, both at once. Raises Problem 429, or Unavailable.

        A process that dies in between leaves an intent of no tokens: settling it releases the hold, if there is one.
        Once the hold stands, the intent is what a process owes that dies with Claude asked: the estimated input.
        """
        outbox, intent = self._parts.outbox, self.event("interrupted")
        intending = asyncio.create_task(outbox.intend(intent))
        try:
            granted = await self._parts.quota.authorize(
                self._parts.claude, self._prompt, generation_id=self.id, user_id=self.user_id, has_left=has_left
            )
        except (Problem, Unavailable, BadCall) as refusal:
            is_doubtful = isinstance(refusal, Unanswered) or isinstance(refusal.__cause__, Unanswered)
            await self._withdraw(intent, intending, may_be_held=is_doubtful)
            raise
        self._is_clamped = granted.output_tokens_max < self._prompt.output_tokens_max
        self._prompt = replace(self._prompt, output_tokens_max=granted.output_tokens_max)
        self._started_at, self.limits = granted.started_at, granted.limits
        try:
            await intending
            # From here on Claude may be asked: a process that dies now owes the input, at least.
            self._is_asked = True
            await outbox.intend(self.event("interrupted"))
        except sqlite3.Error as error:
            log.error("outbox_cannot_intend", generation_id=self.id, error=str(error))
            self._parts.publisher.offer([intent])
            raise Unavailable("This service cannot write to its disk.", retry_after_s=5) from error

    async def _withdraw(
        self, intent: GenerationCompleted, intending: asyncio.Task[None], *, may_be_held: bool
    ) -> None:
        """Claude was never asked. Where a hold may stand all the same, the intent, of no tokens, is settled."""
        outbox = self._parts.outbox
        try:
            await intending
            await (outbox.settle(intent) if may_be_held else outbox.forget([self.id]))
        except sqlite3.Error as error:
            log.error("outbox_cannot_withdraw", generation_id=self.id, error=str(error))
        if may_be_held:
            self._parts.publisher.offer([intent])

    async def run(self) -> None:
        """From Claude's first word to the settlement on disk. Only the process's death ends it without one."""
        RUNNING.inc()
        try:
            event = self.event(await self._read_from_claude())
            # Quota is asked while the disk writes; what it says is shown once the event is on the disk.
            asking = asyncio.create_task(self._ask_usage(event))
            await self._settle(event)
            self._say_the_end(await asking)
        finally:
            RUNNING.dec()
            self._is_over = True
            self._something_new.set()

    def abandon(self, outcome: Outcome) -> None:
        """Stop Claude now: the reader has gone (`disconnected`) or the process is stopping (`interrupted`)."""
        self._early_end = self._early_end or outcome
        if self._deadline is not None and not self._is_over:
            with suppress(RuntimeError):  # it has been left already
                self._deadline.reschedule(asyncio.get_running_loop().time())

    async def frames(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. What arrives together leaves together."""
        while self._frames or not self._is_over:
            self._something_new.clear()
            if self._frames:
                frames, self._frames = self._frames, []
                yield b"".join(frames)
            else:
                await self._something_new.wait()

    async def begun(self) -> None:
        """Returns with Claude's first word. Raises Problem when Claude refused before it."""
        await self._something_new.wait()
        if self.problem and not self._has_begun:
            raise self.problem

    async def answer(self) -> dict[str, object]:
        """The whole answer as one document. Raises Problem when it is not whole; what was generated is counted."""
        async for _ in self.frames():
            pass
        if self.problem:
            raise self.problem
        return {"model": self.model, "text": "".join(self._text), **self._done(), "usage": self._usage}

    @property
    def tokens(self) -> TokenCounts:
        """The provider's count, or what is known of it and an estimate of the rest."""
        if not self._is_asked:
            return TokenCounts()
        known = self._counts or TokenCounts(input_tokens=self._prompt.input_tokens_estimate)
        if self._is_counted:
            return known
        # The count in message_start is a placeholder; the text that came is a better measure. Never above the hold.
        output_tokens = min(estimate_tokens(self._text_bytes), self._prompt.output_tokens_max)
        return known.model_copy(update={"output_tokens": output_tokens})

    async def _read_from_claude(self) -> Outcome:
        try:
            async with asyncio.timeout(DEADLINE_S) as self._deadline:
                if self._early_end:
                    return self._early_end
                async with self._parts.claude.stream(self._prompt) as stream:
                    self._request_id = stream.request_id
                    async for steps in stream.steps():
                        self._pass_on(steps)
        except TimeoutError:
            self.problem = RESTARTING if self._early_end else TOO_LONG
            return self._early_end or "interrupted"
        except ProviderError as error:
            self.problem = error.problem
            self._request_id = self._request_id or error.request_id
            if self._counts is None:
                self._counts, self._is_counted = TokenCounts(), True  # refused before anything: nothing was given
            return "provider_error"
        except Exception:
            # Whatever it is, the tokens were given: settle them, and say that it was our side.
            log.exception("generation_broke", generation_id=self.id)
            self.problem = BROKEN
            return "provider_error"
        finally:
            if self._checkpoint:
                self._checkpoint.cancel()
        return "completed"

    def _pass_on(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Text):
                self._text_bytes += len(step.text.encode())
                self._text.append(step.text)
                self._frames.append(frame(b"delta", msgspec.json.encode({"text": step.text})))
            elif isinstance(step, Started):
                self.model, self._counts, self._has_begun = step.model, step.counts, True
                self._frames.append(
                    frame(b"start", msgspec.json.encode({"generationId": self.id, "model": self.model}))
                )
            elif isinstance(step, Finished):
                self._counts, self._is_counted, self._stop_reason = step.counts, True, step.stop_reason
            else:
                self._frames.append(KEEPALIVE)
        self._something_new.set()
        if self._checkpoint is None:
            self._checkpoint = asyncio.get_running_loop().call_later(CHECKPOINT_EVERY_S, self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        self._checkpoint = None
        task = asyncio.create_task(self._parts.outbox.intend(self.event("interrupted")))
        self._checkpoints.add(task)
        task.add_done_callback(self._checkpoint_written)

    def _checkpoint_written(self, task: asyncio.Task[None]) -> None:
        self._checkpoints.discard(task)
        if error := task.exception():
            log.warning("checkpoint_not_written", generation_id=self.id, error=str(error))

    async def _settle(self, event: GenerationCompleted) -> None:
        outcome = event.data.outcome
        try:
            await self._parts.outbox.settle(event)
        except sqlite3.Error as error:
            # The disk is full or broken. The stream can still have the event, and the publisher does not give up.
            log.error("outbox_cannot_settle", generation_id=self.id, error=str(error))
        self._parts.quota.remember(event)
        self._parts.publisher.offer([event])
        FINISHED.labels(outcome).inc()
        TOKENS.labels("input").inc(event.data.tokens_used - (event.data.output_tokens or 0))
        TOKENS.labels("output").inc(event.data.output_tokens or 0)
        log.info("generation_settled", generation_id=self.id, outcome=outcome, tokens=event.data.tokens_used)

    async def _ask_usage(self, event: GenerationCompleted) -> bytes | None:
        if event.data.outcome == "disconnected":
            return None  # nobody is listening
        try:
            return (await self._parts.quota.usage(self.user_id, including=event)).body
        except Unavailable as error:
            log.warning("usage_not_shown", generation_id=self.id, reason=error.detail)
            return None

    def _say_the_end(self, usage: bytes | None) -> None:
        if usage is not None:
            self._usage = msgspec.Raw(usage)
            self._frames.append(frame(b"usage", usage))
        if self.problem:
            self._frames.append(frame(b"error", self.problem.body))
        else:
            self._frames.append(frame(b"done", msgspec.json.encode(self._done())))

    def _done(self) -> dict[str, object]:
        counts = self.tokens
        done = {
            "generationId": self.id,
            "inputTokens": counts.total - counts.output_tokens,
            "outputTokens": counts.output_tokens,
            "tokensUsed": counts.total,
            "stopReason": self._stop_reason,
        }
        # It was the plan that ended the answer, and neither Claude nor the caller's own maxTokens.
        is_limit_reached = self._is_clamped and self._stop_reason == "max_tokens"
        return done | {"limitReached": True} if is_limit_reached else done

    def event(self, outcome: Outcome) -> GenerationCompleted:
        """The event as it would be if the generation ended now. Its id is the generation's: it settles once."""
        counts = self.tokens
        source: UsageSource = "provider" if self._is_counted else "estimated"
        # Constructed, not validated: every part was validated where it came in, and this runs several times a stream.
        return GenerationCompleted.model_construct(
            **_ENVELOPE,
            id=self.id,
            subject=self.user_id,
            time=utc_now(),
            data=Usage.model_construct(
                generation_id=self.id,
                user_id=self.user_id,
                action_type="chat_generation",
                model=self.model,
                input_tokens=counts.input_tokens,
                output_tokens=counts.output_tokens,
                cache_creation_input_tokens=counts.cache_creation_input_tokens,
                cache_read_input_tokens=counts.cache_read_input_tokens,
                tokens_used=counts.total,
                outcome=outcome,
                usage_source=source,
                provider_request_id=self._request_id,
                started_at=self._started_at,
                completed_at=utc_now(),
                metadata=self._metadata,
            ),
        )


class Generations:
    """All that are under way: started here, and waited for before the process ends."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._running: dict[asyncio.Task[None], Generation] = {}

    async def start(
        self, prompt: Prompt, *, generation_id: str, user_id: str, metadata: Metadata, has_left: HasLeft
    ) -> Generation:
        """Authorized and on the outbox. Raises Problem 429, or Unavailable: then Claude was not asked."""
        generation = Generation(self.parts, prompt, generation_id=generation_id, user_id=user_id, metadata=metadata)
        await generation.authorize(has_left)
        task = asyncio.create_task(generation.run(), name=f"generation {generation_id}")
        self._running[task] = generation
        task.add_done_callback(self._ended)
        return generation

    def interrupt(self) -> None:
        """End what is still running; each is settled as `interrupted`."""
        for generation in self._running.values():
            generation.abandon("interrupted")

    async def stop(self) -> None:
        self.interrupt()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()):
            log.error("generation_failed", task=task.get_name(), error=repr(error))
