"""The life of a generation: authorized, asked of Claude, passed on as it comes, settled once.

It runs in a task of its own, not in the response: whoever goes away, the tokens are counted.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import structlog
from prometheus_client import Counter, Gauge

from services.chat.claude import Claude, Prompt
from services.chat.claude_problems import ProviderError
from services.chat.claude_stream import Finished, Started, Step, Stream, Text, Unseen
from services.chat.deadline import Deadline
from services.chat.metering import Held, Meter
from services.chat.outbox import Outbox
from services.chat.problems import Problem, broken, not_counted_yet, restarting
from services.chat.publisher import Publisher
from services.chat.quota import Quota, Shown
from services.chat.ratelimit import headers
from services.chat.sse import KEEPALIVE, frame
from services.chat.waiting import HasLeft
from shared.calls import Granted, LimitState, Pending
from shared.errors import BadCall, Unanswered, Unavailable
from shared.events import Authorized, GenerationCompleted, Metadata, OnDisconnect, Outcome, TokenCounts, utc_now
from shared.events import Generation as Usage

log = structlog.get_logger()
RUNNING = Gauge("chatrail_generations_running", "Generations under way")
FINISHED = Counter("chatrail_generations", "Generations by outcome", ["outcome"])
TOKENS = Counter("chatrail_tokens", "Tokens used by generations", ["kind"])

# Given, or each is looked up again for every draft of an event.
_ENVELOPE: dict[str, Any] = {
    name: field.default for name, field in GenerationCompleted.model_fields.items() if isinstance(field.default, str)
}
# What a process that dies may not have counted of a running answer.
CHECKPOINT_EVERY_S = 0.1
# Of a settlement that the disk refuses; after it the reader is told that the answer is not counted yet.
STREAM_TAKES_IT_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Policies:
    """What an operator decides about every generation. `claude_total_s`: how long Claude may take for an answer."""

    on_disconnect: OnDisconnect = "stop"
    claude_total_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What every generation works with."""

    claude: Claude
    quota: Quota
    outbox: Outbox
    publisher: Publisher
    policies: Policies


class Generation:
    """One generation. `run()` is its task; `frames()` is what a browser reads; `leave()` and `interrupt()` end it."""

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
        self._limits: tuple[LimitState, ...] = ()
        self._text: list[str] = []
        self.problem: Problem | None = None
        self._shown: Shown | None = None
        self._done: dict[str, object] = {}
        self._stop_reason: str | None = None
        self._is_clamped = False
        self._has_begun = False
        self._has_left = False
        self._parts, self._prompt = parts, prompt
        self._started_at, self._metadata = utc_now(), metadata
        self._authorized: Authorized | None = None
        self._meter = Meter(input_tokens_estimate=prompt.input_tokens_estimate)
        self._stream: Stream | None = None
        self._early_end: Outcome | None = None
        self._frames: list[bytes] = []
        self._something_new = asyncio.Event()
        self._is_over = False
        self._deadline: asyncio.Timeout | None = None
        self._checkpoint: asyncio.TimerHandle | None = None
        self._checkpoints: set[asyncio.Task[None]] = set()
        self._asked: Pending | None = None
        self._asking: asyncio.Task[Shown | None] | None = None

    async def authorize(self, has_left: HasLeft) -> None:
        """The intent on disk and the hold at quota, both at once. Raises Problem 429, or Unavailable.

        A process that dies in between leaves an intent of no tokens: settling it releases the hold, if there is one.
        Once the hold stands, the intent is what a process owes that dies with Claude asked: the estimated input.
        """
        outbox, intent = self._parts.outbox, self.event("interrupted")
        await outbox.admit()
        intending = asyncio.create_task(outbox.intend(intent))
        try:
            granted, held = await self._parts.quota.authorize(
                self._parts.claude, self._prompt, generation_id=self.id, user_id=self.user_id, has_left=has_left
            )
        except Exception as refusal:
            await self._withdraw(intent, intending, may_be_held=is_doubtful(refusal))
            raise
        self._authorized = _authorized(self._prompt, held, granted)
        self._is_clamped = granted.output_tokens_max < self._prompt.output_tokens_max
        self._prompt = replace(self._prompt, output_tokens_max=granted.output_tokens_max)
        self._started_at, self._limits = granted.started_at, granted.limits
        try:
            await intending
            self._meter.asked(held)
            await outbox.intend(self.event("interrupted"))
        except sqlite3.Error as error:
            log.error("outbox_cannot_intend", generation_id=self.id, error=str(error))
            self._parts.publisher.offer([intent])
            raise outbox.refuses() from error

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
            if not may_be_held:
                self._parts.publisher.forget_soon([self.id])
        if may_be_held:
            self._parts.publisher.offer([intent])

    async def run(self) -> None:
        """From Claude's first word to the settlement on disk. Only the process's death ends it without one."""
        RUNNING.inc()
        try:
            event = self.event(await self._read_from_claude())
            # What quota says is shown once the event is on the disk.
            asking = self._ask_usage_soon(Pending.of(event.id, event.data))
            await self._settle(event)
            self._say_the_end(event, await asking)
        finally:
            RUNNING.dec()
            self._is_over = True
            self._something_new.set()

    @property
    def limits(self) -> tuple[LimitState, ...]:
        """As quota last told them: with the hold, or once the answer is counted."""
        return self._shown.limits if self._shown else self._limits

    def leave(self) -> None:
        """The reader has gone: Claude is stopped, or its answer drained within the hold, as the policy says."""
        self._has_left = True
        if self._parts.policies.on_disconnect == "stop":
            self._end_early("disconnected")

    def interrupt(self) -> None:
        """The process is stopping."""
        self._end_early("interrupted")

    def _end_early(self, outcome: Outcome) -> None:
        self._early_end = self._early_end or outcome
        if self._deadline is not None and not self._is_over:
            with suppress(RuntimeError):  # it has been left already
                self._deadline.reschedule(asyncio.get_running_loop().time())

    async def frames(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, from Claude's first word on. What arrives together leaves together.

        Raises Problem when Claude refused before it.
        """
        await self._something_new.wait()
        if self.problem and not self._has_begun:
            # A ping wakes us, too: what it is refused with is told once it is settled, with the limits.
            while not self._is_over:
                self._something_new.clear()
                await self._something_new.wait()
            raise self.problem
        while self._frames or not self._is_over:
            self._something_new.clear()
            if self._frames:
                frames, self._frames = self._frames, []
                yield b"".join(frames)
            else:
                await self._something_new.wait()

    async def answer(self) -> dict[str, object]:
        """The whole answer as one document. Raises Problem when it is not whole; what was generated is counted."""
        async for _ in self.frames():
            pass
        if self.problem:
            raise self.problem
        return {
            "model": self.model,
            "text": "".join(self._text),
            **self._done,
            "usage": msgspec.Raw(self._shown.body) if self._shown else None,
        }

    async def _read_from_claude(self) -> Outcome:
        try:
            self._stream = stream = self._parts.claude.stream(self._prompt)
        except Exception:
            # Headers that an operator adds to every request, say. The hold stands, and is let go by the settlement.
            log.exception("claude_not_asked", generation_id=self.id)
            self.problem = broken("Nothing was spent")
            self._meter.gave_nothing()
            return "provider_error"
        try:
            outcome = await self._pass_all_on(stream)
        except TimeoutError:
            self.problem = restarting(stream.so_far) if self._early_end else stream.too_long()
            outcome = self._early_end or "interrupted"
        except ProviderError as error:
            log.warning("claude_failed", generation_id=self.id, problem=str(error), reason=error.reason)
            self.problem, outcome = error.problem, "provider_error"
        except Exception:
            # Whatever it is, the tokens were given: settle them, and say that it was our side.
            log.exception("generation_broke", generation_id=self.id)
            self.problem, outcome = broken(stream.so_far), "provider_error"
        finally:
            if self._checkpoint:
                self._checkpoint.cancel()
        if stream.gave_nothing:
            self._meter.gave_nothing()
        return outcome

    async def _pass_all_on(self, stream: Stream) -> Outcome:
        """Raises TimeoutError when it takes too long, or is to end early."""
        async with asyncio.timeout(self._parts.policies.claude_total_s) as self._deadline:
            if self._early_end:
                raise TimeoutError
            async with aclosing(stream.steps()) as arriving:
                async for steps in arriving:
                    self._pass_on(steps)
        self._meter.ended()
        return "disconnected" if self._has_left else "completed"

    def _pass_on(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Text):
                self._meter.wrote(step.text)
                self._text.append(step.text)
                self._frames.append(frame(b"delta", msgspec.json.encode({"text": step.text})))
            elif isinstance(step, Unseen):
                self._meter.wrote(step.text)
            elif isinstance(step, Started):
                self._begin(step)
            elif isinstance(step, Finished):
                self._stop_reason = step.stop_reason or self._stop_reason
                if step.counts:
                    self._meter.counted(step.counts, is_last=self._stop_reason is not None)
                if step.counts and self._stop_reason:
                    self._ask_usage_soon(self._pending(step.counts))
            else:
                self._frames.append(KEEPALIVE)
        self._something_new.set()
        if self._checkpoint is None:
            self._checkpoint = asyncio.get_running_loop().call_later(CHECKPOINT_EVERY_S, self._write_checkpoint)

    def _begin(self, started: Started) -> None:
        self.model, self._has_begun = started.model, True
        if started.counts:
            self._meter.started(started.counts)
            # At once: from here on a process that dies has the provider's own count of the input.
            self._write_checkpoint()
        self._frames.append(frame(b"start", msgspec.json.encode({"generationId": self.id, "model": self.model})))

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
            if not await self._parts.publisher.deliver(event, timeout_s=STREAM_TAKES_IT_WITHIN_S):
                self.problem = self.problem or not_counted_yet()
        else:
            self._parts.publisher.offer([event])
        self._parts.quota.remember(event)
        FINISHED.labels(outcome).inc()
        TOKENS.labels("input").inc(event.data.tokens_used - (event.data.output_tokens or 0))
        TOKENS.labels("output").inc(event.data.output_tokens or 0)
        log.info("generation_settled", generation_id=self.id, outcome=outcome, tokens=event.data.tokens_used)

    def _ask_usage_soon(self, used: Pending) -> asyncio.Task[Shown | None]:
        """Quota is asked while Claude's stream ends and the disk writes; again where the count was not the last."""
        if self._asking and self._asked == used:
            return self._asking
        if self._asking:
            self._asking.cancel()
        self._asked, self._asking = used, asyncio.create_task(self._ask_usage(used))
        return self._asking

    def _pending(self, counts: TokenCounts) -> Pending:
        return Pending(
            id=self.id,
            user_id=self.user_id,
            started_at=self._started_at,
            model=self.model,
            tokens_used=counts.total,
            **vars(counts),
        )

    async def _ask_usage(self, used: Pending) -> Shown | None:
        if self._has_left:
            return None  # nobody is listening
        try:
            return await self._parts.quota.usage(self.user_id, Deadline(), including=used)
        except Unavailable as error:
            log.warning("usage_not_shown", generation_id=self.id, reason=error.detail)
            return None

    def _say_the_end(self, event: GenerationCompleted, shown: Shown | None) -> None:
        self._shown = shown
        if shown:
            self._frames.append(frame(b"usage", shown.body))
        if self.problem:
            self.problem.headers |= headers(self.limits)
            self._frames.append(frame(b"error", self.problem.body))
        else:
            self._done = self._summary(event.data)
            self._frames.append(frame(b"done", msgspec.json.encode(self._done)))

    def _summary(self, used: Usage) -> dict[str, object]:
        output_tokens = used.output_tokens or 0
        done = {
            "generationId": self.id,
            "inputTokens": used.tokens_used - output_tokens,
            "outputTokens": output_tokens,
            "tokensUsed": used.tokens_used,
            "stopReason": self._stop_reason,
        }
        # It was the plan that ended the answer, and neither Claude nor the caller's own maxTokens.
        is_limit_reached = self._is_clamped and self._stop_reason == "max_tokens"
        return done | {"limitReached": True} if is_limit_reached else done

    def event(self, outcome: Outcome) -> GenerationCompleted:
        """The event as it would be if the generation ended now. Its id is the generation's: it settles once."""
        counts = self._meter.counts(outcome)
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
                usage_source=self._meter.source,
                on_disconnect=self._parts.policies.on_disconnect,
                provider_request_id=self._stream.request_id if self._stream else None,
                started_at=self._started_at,
                completed_at=utc_now(),
                authorized=self._authorized,
                metadata=self._metadata,
            ),
        )


def _authorized(prompt: Prompt, held: Held, granted: Granted) -> Authorized | None:
    """For the record; None where quota, of an earlier release, does not say."""
    if granted.tier is None:
        return None
    return Authorized.model_validate(
        {
            **vars(granted),
            "input_tokens_max": held.input_tokens_max,
            "output_tokens_asked": prompt.output_tokens_max,
            "output_tokens_granted": granted.output_tokens_max,
        }
    )


def is_doubtful(refusal: Exception) -> bool:
    """Whether quota may have granted a hold although it was not heard to."""
    if isinstance(refusal, Problem | Unavailable | BadCall):
        return isinstance(refusal, Unanswered) or isinstance(refusal.__cause__, Unanswered)
    return True
