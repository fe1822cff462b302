"""supervisord for the local stack: it ends with the process that started it, and its programs end with it.

    python deploy/supervisord.py -c FILE

Neither may outlive a SIGKILL: a broker that nobody knows of would keep the next one from its store.
"""

import ctypes
import os
import signal
import sys

from supervisor.options import ServerOptions
from supervisor.states import SupervisorStates
from supervisor.supervisord import go

PR_SET_PDEATHSIG = 1


class Options(ServerOptions):  # type: ignore[misc]  # supervisor has no types
    def realize(self, *args: object, **kwargs: object) -> None:
        super().realize(*args, **kwargs)
        self.started_by = os.getppid()

    def get_signal(self) -> int | None:
        """Asked at least once a second: an orphan shuts down in order, as on SIGTERM."""
        if os.getppid() != self.started_by and self.mood == SupervisorStates.RUNNING:
            return signal.SIGTERM
        received: int | None = super().get_signal()
        return received

    def setpgrp(self) -> None:
        """Called in each new program before its exec."""
        super().setpgrp()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    options = Options()
    options.realize(doc=__doc__)
    options.first, options.test = True, False
    go(options)
