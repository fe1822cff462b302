"""What one generation has used: as the provider counts it, or as it must be estimated. Pure: no clock, no I/O.

Nothing was used before Claude is asked. From then on it is never nothing, unless the provider says so, and what is
estimated is never more than was held for it. What the provider has counted is the truth, whatever was held.
"""

from dataclasses import dataclass

from shared.events import Outcome, TokenCounts, UsageSource

NOTHING = TokenCounts()
# On the average of an answer, far above what was ever seen.
BYTES_A_TOKEN_MAX = 16


def estimate_tokens(text_bytes: int) -> int:
    """About four bytes a token, rounded up: only of what the provider did not count."""
    return -(-text_bytes // 4)


@dataclass(frozen=True, slots=True)
class Held:
    """What quota holds for a generation: the most that its input can be, and the output that was granted."""

    input_tokens_max: int
    output_tokens_max: int

    @property
    def tokens(self) -> int:
        return self.input_tokens_max + self.output_tokens_max


class Meter:
    def __init__(self, *, input_tokens_estimate: int) -> None:
        self._input_tokens_estimate = input_tokens_estimate
        self._held: Held | None = None
        self._named: TokenCounts | None = None
        self._output_tokens_at_first = 0
        self._output_tokens_named: int | None = None
        self._text_bytes = 0
        self._is_counted = False

    def asked(self, held: Held) -> None:
        """The hold stands: from now on Claude may be asked, and a process that dies owes the input, at least."""
        self._held = held

    def started(self, counts: TokenCounts) -> None:
        """The provider names the input, and an output that is most often a placeholder."""
        self._named, self._output_tokens_at_first = counts, counts.output_tokens

    def wrote(self, text: str) -> None:
        self._text_bytes += len(text.encode())

    def counted(self, counts: TokenCounts, *, is_last: bool) -> None:
        """The provider's count so far: cumulative, and possibly repeated, so each replaces the one before."""
        self._named, self._output_tokens_named = counts, counts.output_tokens
        self._is_counted = is_last

    def ended(self) -> None:
        """The provider's last word has come: what it counted so far was all.

        Claude begins with a placeholder for the output and counts at the end. A provider that counted only when it
        began meant it: nothing else is as exact. That is believed of a whole answer, unless it leaves out the input,
        or its output is too small for the text that came, as a placeholder is whose count was lost.
        """
        if self._output_tokens_named is None and self._is_plausible_at_first:
            self._output_tokens_named = self._output_tokens_at_first
        self._is_counted = self._output_tokens_named is not None

    @property
    def _is_plausible_at_first(self) -> bool:
        if self._named is None or self._named.total == self._named.output_tokens:
            return False
        return self._text_bytes <= self._output_tokens_at_first * BYTES_A_TOKEN_MAX

    def gave_nothing(self) -> None:
        """The provider refused before it gave anything, or was not asked after all."""
        self._named, self._is_counted = NOTHING, True

    @property
    def source(self) -> UsageSource:
        return "provider" if self._is_counted else "estimated"

    def counts(self, outcome: Outcome) -> TokenCounts:
        """The tokens used if the generation ends now, with this outcome.

        `interrupted`, which is also what a process leaves that dies, is never above the hold, even where the provider
        names a larger input than any provider should.
        """
        if self._is_counted or self._held is None:
            return self._named or NOTHING
        held, counts = self._held, self._named
        if counts is None or counts.total == counts.output_tokens:
            counts = TokenCounts(input_tokens=min(self._input_tokens_estimate, held.input_tokens_max))
        output_tokens = max(estimate_tokens(self._text_bytes), self._output_tokens_named or 0)
        counts = counts.model_copy(update={"output_tokens": min(output_tokens, held.output_tokens_max)})
        return _at_most(held.tokens, counts) if outcome == "interrupted" else counts


def _at_most(tokens_max: int, counts: TokenCounts) -> TokenCounts:
    if counts.total <= tokens_max:
        return counts
    cut = {}
    for name, tokens in counts:
        cut[name] = min(tokens, tokens_max)
        tokens_max -= cut[name]
    return TokenCounts(**cut)
