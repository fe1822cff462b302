"""What processes have used, and how busy the cores were with them and with everything else on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import psutil


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of the cores' time: 1 is all of it."""

    ours: float
    everybodys: float


class Meter:
    """Runs from when it is made."""

    def __init__(self, processes: Sequence[psutil.Process], cores: Sequence[int]) -> None:
        self._processes, self._cores = processes, cores
        self._at, self._ours_s, self._everybodys_s = perf_counter(), self._used_by_ours_s(), self._used_s()

    def cpu_s(self) -> float:
        return self._used_by_ours_s() - self._ours_s

    def busy(self) -> Busy:
        available_s = (perf_counter() - self._at) * len(self._cores)
        return Busy(self.cpu_s() / available_s, (self._used_s() - self._everybodys_s) / available_s)

    def _used_by_ours_s(self) -> float:
        return float(sum(times.user + times.system for times in (each.cpu_times() for each in self._processes)))

    def _used_s(self) -> float:
        times = psutil.cpu_times(percpu=True)
        return float(sum(sum(times[core]) - times[core].idle - times[core].iowait for core in self._cores))
