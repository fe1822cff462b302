"""One deadline for a whole request: whatever it asks of the others, and however often, its caller is told in time."""

from time import monotonic

from shared.broker import TIMEOUT_S

# Callers are promised an answer within two seconds. The rest is for reading the request and for saying the answer.
WITHIN_S = 1.5
# In a process that has too much to do a timer can fire while the answer waits to be read: asked again, it is there.
MOMENT_S = 0.1


class Deadline:
    """Begins when it is made. Who waits for something else in between, as for Claude, makes another afterwards."""

    def __init__(self) -> None:
        self._at = monotonic() + WITHIN_S

    @property
    def left_s(self) -> float:
        """For the next question: some of what is left, so that one more can be asked; a moment where nothing is."""
        return max(MOMENT_S, min(TIMEOUT_S, self._at - monotonic()))
