"""What the stand-in says, and how it counts. Pure and repeatable: no clock, no chance, no state but caches."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import NamedTuple
from zlib import crc32

from deploy.claude import events
from deploy.claude.directives import Directives, strip

# A token is up to six letters or digits with the one space before them, a run of white space, or one other sign.
# The tokens of a text partition it, so there are never more of them than it has UTF-8 bytes.
TOKEN = re.compile(r" ?\w{1,6}|\s+|[^\w\s]")
TOKENS_PER_DELTA = 4
TOPIC_WORDS_MAX, TOPIC_LETTERS_MAX = 8, 60

OPENINGS = (
    "You asked about “{topic}”. The short answer is that it depends on what you want to keep simple, so here are "
    "the parts that matter most and how they fit together.",
    "Let us take “{topic}” one step at a time. It looks larger than it is: most of the difficulty goes away once "
    "the question is split into what must be true and what would merely be nice.",
    "On “{topic}”, I would begin with the outcome and work backwards. What should someone notice when it has been "
    "done well, and what would they notice first if it had not?",
)
PARAGRAPHS = (
    "Start with the smallest version that would really help. Write down in one sentence what it does, for whom, "
    "and how you would know that it works. Anything that does not serve that sentence can wait.",
    "Next, look at what could go wrong. Some failures are loud and cheap; the ones worth your time are quiet: a "
    "number that is slightly off, a step that happens twice, a promise nobody checks.",
    "It also helps to separate what you know from what you assume. An assumption is not a fault — it only becomes "
    "one when nobody remembers that it was made. A short list, kept near the work, is enough.",
    "Measure before you decide. A rough figure from the real thing beats a precise one from a guess, and it often "
    "shows that the part everyone argues about is not the part that costs anything.",
    "Then make it easy to undo. When a change can be taken back in a minute, you may try three ideas in the time "
    "that one careful plan would have taken, and keep the one that proved itself.",
)
CLOSINGS = (
    "If you tell me a little more about your situation, I can turn this into concrete steps.",
    "Would you like an example, or shall we go through the first step together?",
    "That is the outline; I am glad to go deeper into whichever part is closest to your problem.",
)


class Delta(NamedTuple):
    event: bytes
    text: str
    tokens_so_far: int


class Answer(NamedTuple):
    """At least one delta. The last one's `tokens_so_far` is the count of output tokens to report."""

    deltas: Sequence[Delta]
    stop_reason: str

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def output_tokens(self) -> int:
        return self.deltas[-1].tokens_so_far

    def together(self) -> "Answer":
        return Answer(
            [Delta(b"".join(delta.event for delta in self.deltas), self.text, self.output_tokens)],
            self.stop_reason,
        )

    def first_half(self) -> "Answer":
        return self._replace(deltas=self.deltas[: -(-len(self.deltas) // 2)])


def count_tokens(text: str) -> int:
    return len(TOKEN.findall(text))


def answer(question: str, told: Directives, *, max_tokens: int) -> Answer:
    """The answer to the last user message, of `max_tokens` (at least 1) tokens at most."""
    words = strip(question).split()
    topic = " ".join(words[:TOPIC_WORDS_MAX])[:TOPIC_LETTERS_MAX]
    variation = crc32(" ".join(words).encode()) % (len(OPENINGS) * len(PARAGRAPHS) * len(CLOSINGS))
    return _answer(
        topic=topic or "this",
        variation=variation,
        deltas=told.deltas,
        output_tokens=told.output_tokens,
        stop_reason=told.stop_reason,
        max_tokens=max_tokens,
    )


@lru_cache(maxsize=1024)
def _answer(
    *,
    topic: str,
    variation: int,
    deltas: int | None,
    output_tokens: int | None,
    stop_reason: str | None,
    max_tokens: int,
) -> Answer:
    rest, opening = divmod(variation, len(OPENINGS))
    tokens = [*TOKEN.findall(OPENINGS[opening].format(topic=topic)), *_body_tokens(rest)]
    length = len(tokens) if deltas is None else deltas * TOKENS_PER_DELTA
    asked = length if output_tokens is None else output_tokens
    given = min(asked, max_tokens)
    texts = _grouped(_repeated(tokens, min(length, max_tokens)))
    return Answer(
        [Delta(events.text_delta(text), text, given * nth // len(texts)) for nth, text in enumerate(texts, start=1)],
        stop_reason or ("max_tokens" if asked > max_tokens else "end_turn"),
    )


@lru_cache
def _body_tokens(variation: int) -> list[str]:
    closing, first = divmod(variation, len(PARAGRAPHS))
    body = islice(cycle(PARAGRAPHS), first, first + 2 + first % 3)
    return TOKEN.findall("\n\n".join(["", *body, CLOSINGS[closing]]))


def _repeated(tokens: list[str], length: int) -> list[str]:
    return tokens[:length] if length <= len(tokens) else list(islice(cycle([*tokens, "\n\n"]), length))


def _grouped(tokens: Sequence[str]) -> list[str]:
    starts = range(0, len(tokens), TOKENS_PER_DELTA)
    return ["".join(tokens[start : start + TOKENS_PER_DELTA]) for start in starts]
