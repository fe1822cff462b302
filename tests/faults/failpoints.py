"""Runs a module of ours in a process that kills itself at a step. The services know nothing of it.

    CHATRAIL_CRASH_AT="after services.chat.outbox:Outbox.settle" python -m tests.faults.failpoints services.chat serve

    before MODULE:FUNCTION       when it is called
    after MODULE:FUNCTION#3      when it returns for the third time
    within MODULE:FUNCTION#2     after the second SQL statement of the transaction that it is called in

The end is a SIGKILL: nothing is written, sent or said after it.
"""

import functools
import importlib
import inspect
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, event

CRASH_AT = "CHATRAIL_CRASH_AT"
_STEP = re.compile(r"(before|after|within) ([\w.]+):([\w.]+)(?:#(\d+))?")


class Countdown:
    """The process's death, when it has been called so often."""

    def __init__(self, times: int) -> None:
        self._left = times

    def __call__(self, *_: object) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, *_: object) -> None:
        self._left = 0


def arm(step: str) -> None:
    """From now on this process dies at the step. Raises where there is no such step."""
    match = _STEP.fullmatch(step)
    if not match:
        raise ValueError(f"{CRASH_AT} is {step!r}; it should read like 'after services.chat.outbox:Outbox.settle#2'")
    when, module, path, times = match.groups(default="1")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    setattr(owner, name, _dying(getattr(owner, name), when, int(times)))


def _dying(function: Callable[..., Any], when: str, times: int) -> Callable[..., Any]:
    if when == "within":

        @functools.wraps(function)
        def in_transaction(db: Connection, *args: Any, **kw: Any) -> Any:
            # Of this transaction alone: what is handled once more, because the machine is slow, begins anew.
            die = Countdown(times)
            event.listen(db, "after_cursor_execute", die)
            event.listen(db, "commit", die.stop)
            return function(db, *args, **kw)

        return in_transaction

    die = Countdown(times)
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kw: Any) -> Any:
            if when == "before":
                die()
            result = await function(*args, **kw)
            if when == "after":
                die()
            return result

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kw: Any) -> Any:
        if when == "before":
            die()
        result = function(*args, **kw)
        if when == "after":
            die()
        return result

    return called


def run(module: str, arguments: Sequence[str]) -> None:
    """As `python -m module`, armed with the step that the environment names."""
    if step := os.environ.get(CRASH_AT):
        arm(step)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
