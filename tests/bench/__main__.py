"""What ChatRail adds to a call of Claude: `make bench`, or `python -m tests.bench [--quick]`.

Side by side, round by round, so that the machine's noise hits all alike: the stand-in called directly, ChatRail in
front of it, and the bare limit of what a metered pass-through can be. What is measured has a core for itself.
"""

import asyncio
import os
import signal
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter

import psutil
import uvloop
from rich.console import Console

from tests.bench.load import BadAnswer, Load, for_seconds, load, times
from tests.bench.meter import Meter
from tests.bench.processes import Cores
from tests.bench.report import CALLERS, Counts, Figures, Memory, Sample, report
from tests.bench.system import System, running
from tests.bench.targets import CHATRAIL, LIMIT, targets

MEMORY_CALLERS = 16
SYNCS_A_ROUND = 40
SETTLED_WITHIN_S = 60
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    seconds: float
    streams: int


FULL, QUICK = Size(rounds=8, seconds=1.2, streams=5000), Size(rounds=2, seconds=0.8, streams=500)


def main() -> None:
    parser = ArgumentParser(prog="python -m tests.bench", description="What ChatRail adds to a call of Claude.")
    parser.add_argument("--quick", action="store_true", help="half a minute instead of three, and rougher")
    size = QUICK if parser.parse_args().quick else FULL
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cores = Cores()
    with tempfile.TemporaryDirectory(prefix="chatrail-bench-") as folder, running(Path(folder), cores) as system:
        try:
            figures = uvloop.run(Bench(system, cores).run(size))
        except* (BadAnswer, TimeoutError) as failed:
            sys.exit(f"An answer did not come, or not whole: {failed.exceptions[0]!r}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    for part in report(figures, cores):
        console.print(part)
    if not figures.counts.agree:
        sys.exit(1)


class Bench:
    def __init__(self, system: System, cores: Cores) -> None:
        self._system, self._cores = system, cores
        self._targets = targets(system)
        self._measured = {CHATRAIL: system.chat, LIMIT: system.limit}
        self._answered = 0
        self._progress = Console(stderr=True, style="dim", highlight=False)

    async def run(self, size: Size) -> Figures:
        memory = {name: await self._memory(name, size.streams) for name in self._measured}
        samples: dict[tuple[str, int], list[Sample]] = {}
        syncs_s: list[float] = []
        for nth in range(size.rounds):
            self._progress.print(f"Round {nth + 1} of {size.rounds}")
            syncs_s += [_fsync_s(self._system.data) for _ in range(SYNCS_A_ROUND)]
            for callers in CALLERS:
                for name in _rotated(list(self._targets), nth):
                    sample = await self._sample(name, callers, size.seconds)
                    samples.setdefault((name, callers), []).append(sample)
        system = self._system
        counts = Counts(self._answered, system.given(), system.recorded(), system.totalled())
        return Figures(samples, memory, syncs_s, counts)

    async def _memory(self, name: str, streams: int) -> Memory:
        self._progress.print(f"{streams} streams through {name}")
        process = self._measured[name]
        before = process.memory_info().rss
        await self._load(name, MEMORY_CALLERS, times(streams))
        await self._settled()
        return Memory(streams, before / MIB, process.memory_info().rss / MIB)

    async def _sample(self, name: str, callers: int, seconds: float) -> Sample:
        process = self._measured.get(name)
        measured = Meter([process] if process else [], [self._cores.measured])
        others = Meter([*self._system.helpers, psutil.Process()], self._cores.others)
        load = await self._load(name, callers, for_seconds(seconds))
        measured_core, other_cores = measured.busy(), others.busy()
        # What is published and cleaned up after the last answer is a part of what a stream costs.
        await self._settled()
        return Sample(load, measured.cpu_s(), measured_core, other_cores)

    async def _load(self, name: str, callers: int, permits: Iterator[None]) -> Load:
        done = await load(self._targets[name], callers, permits)
        if name == CHATRAIL:
            self._answered += len(done.timings)
        return done

    async def _settled(self) -> None:
        """Returns once all that ChatRail answered is counted, or when that takes too long."""
        deadline = monotonic() + SETTLED_WITHIN_S
        while not self._is_settled() and monotonic() < deadline:  # noqa: ASYNC110 - other processes are waited for
            await asyncio.sleep(0.05)

    def _is_settled(self) -> bool:
        return self._system.recorded().generations == self._system.totalled().generations == self._answered


def _rotated(names: list[str], nth: int) -> list[str]:
    """None always comes after the same other."""
    first = nth % len(names)
    return names[first:] + names[:first]


def _fsync_s(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(1024))
        begun = perf_counter()
        os.fsync(file.fileno())
        return perf_counter() - begun


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
