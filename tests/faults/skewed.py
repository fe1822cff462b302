"""Runs a module of ours with a clock that is wrong.

    python -m tests.faults.skewed 3600 services.quota serve      a clock that is an hour fast; -3600: an hour slow

`time.time`, `time.time_ns`, `datetime.now`, `datetime.utcnow` and `datetime.today` of that process are shifted by
so many seconds, before anything else is imported. `time.monotonic` and everybody else's clocks stay as they are.
"""

import datetime as standard
import importlib
import runpy
import sys
import time
from datetime import UTC, datetime, tzinfo
from typing import Any

_real_time_ns = time.time_ns


class _Kind(type):
    """Every datetime is one of ours: also those that C makes."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, datetime)


def skew(seconds: int) -> None:
    """From now on this process is wrong by so much; modules that took `datetime` or `time` before are not."""

    def time_ns() -> int:
        return _real_time_ns() + seconds * 10**9

    def now_s() -> float:
        return time_ns() / 10**9

    class Skewed(datetime, metaclass=_Kind):
        __slots__ = ()  # of the size that modules in C expect

        # What is made is of the real kind: drivers choose by the exact type.
        def __new__(cls, *args: Any, **kw: Any) -> Any:
            return datetime(*args, **kw)  # noqa: DTZ001 - the zone is in the arguments, or is not wanted

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(now_s(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return datetime.fromtimestamp(now_s(), UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    time.time, time.time_ns = now_s, time_ns
    standard.datetime = Skewed  # type: ignore[misc]


def _import_with_the_real_kind(module: str) -> None:
    """One that asks no clock, and makes decoders of msgspec, which knows no kind of moment but the real one."""
    importlib.import_module("shared.events")  # and all that it imports, as ever
    standard.datetime, skewed = datetime, standard.datetime  # type: ignore[misc]
    importlib.import_module(module)
    standard.datetime = skewed  # type: ignore[misc]


if __name__ == "__main__":
    _, by, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    skew(int(by))
    _import_with_the_real_kind("shared.plain")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
