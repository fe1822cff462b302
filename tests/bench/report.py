"""The figures, side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tests.bench.load import Load
from tests.bench.meter import Busy
from tests.bench.processes import Cores
from tests.bench.system import Count
from tests.bench.targets import CHATRAIL, DIRECT, LIMIT

NAMES = (DIRECT, LIMIT, CHATRAIL)
CALLERS = (1, 16, 64)
LATENCY_CALLERS = (1, 16)
THROUGHPUT_CALLERS = (16, 64)
ADDED_MS_MAX = 2.0
SHARE_OF_LIMIT_MIN = 1 / 3
# From here on what else runs on this machine shows in every time.
DISTURBED = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """One target, asked by a number of callers for a moment."""

    load: Load
    cpu_s: float
    measured_core: Busy
    other_cores: Busy

    @property
    def cpu_ms(self) -> float:
        """Of one stream, in the process that is measured."""
        return self.cpu_s * 1000 / len(self.load.timings)


@dataclass(frozen=True, slots=True)
class Memory:
    streams: int
    before_mib: float
    after_mib: float


@dataclass(frozen=True, slots=True)
class Counts:
    """The same generations, as the callers, the stand-in, the ledger and quota have them."""

    answered: int
    given: Count
    recorded: Count
    totalled: Count

    @property
    def agree(self) -> bool:
        return self.answered == self.given.generations and self.given == self.recorded == self.totalled


@dataclass(frozen=True, slots=True)
class Figures:
    samples: Mapping[tuple[str, int], Sequence[Sample]]
    memory: Mapping[str, Memory]
    syncs_s: Sequence[float]
    counts: Counts

    def typical(self, name: str, callers: int, of: Callable[[Sample], float]) -> float:
        """The median of the rounds."""
        return median(map(of, self.samples[name, callers]))

    def added(self, name: str, callers: int, of: Callable[[Sample], float]) -> float:
        """The median of what each round shows over the stand-in called directly."""
        pairs = zip(self.samples[name, callers], self.samples[DIRECT, callers], strict=True)
        return median(of(sample) - of(direct) for sample, direct in pairs)


def report(figures: Figures, cores: Cores) -> Iterator[RenderableType]:
    table = Table("", *NAMES, "to limit", "aim", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for title, rows in _sections(figures):
        table.add_row(Text(title, style="bold"))
        for label, *cells in rows:
            table.add_row(f"  {label}", *cells)
    yield table
    yield ""
    yield from _notes(figures, cores)


Row = tuple[str, ...]


def _sections(figures: Figures) -> Iterator[tuple[str, Iterator[Row]]]:
    for callers in LATENCY_CALLERS:
        yield f"{_callers(callers)}: ms, ms added", _latency(figures, callers)
    yield "Streams a second", _throughput(figures)
    yield "CPU ms a stream", _cpu(figures)
    yield "Streams a second of CPU", _capacity(figures)
    yield "Memory, MiB", _memory(figures)
    yield "Measured core: ours / all", _busy(figures, "measured_core")
    yield "Other cores: ours / all", _busy(figures, "other_cores")


def _latency(figures: Figures, callers: int) -> Iterator[Row]:
    measures: dict[str, Callable[[Sample], float]] = {
        "p50": lambda sample: sample.load.whole_ms(0.50),
        "p95": lambda sample: sample.load.whole_ms(0.95),
        "p99": lambda sample: sample.load.whole_ms(0.99),
        "first byte, p50": lambda sample: sample.load.first_byte_ms(0.50),
    }
    for label, of in measures.items():
        direct = figures.typical(DIRECT, callers, of)
        limit, chat = (figures.added(name, callers, of) for name in (LIMIT, CHATRAIL))
        aim = _aim(f"≤ {ADDED_MS_MAX:+.2f}", chat <= ADDED_MS_MAX) if (label, callers) == ("p50", 1) else ""
        yield label, f"{direct:.2f}", f"{limit:+.2f}", f"{chat:+.2f}", _ratio(chat, limit), aim


def _throughput(figures: Figures) -> Iterator[Row]:
    for callers in THROUGHPUT_CALLERS:
        direct, limit, chat = (figures.typical(name, callers, lambda s: s.load.streams_per_s) for name in NAMES)
        yield _callers(callers), f"{direct:,.0f}", f"{limit:,.0f}", f"{chat:,.0f}", *_share(chat, limit)


def _cpu(figures: Figures) -> Iterator[Row]:
    for callers in THROUGHPUT_CALLERS:
        limit, chat = (figures.typical(name, callers, lambda s: s.cpu_ms) for name in (LIMIT, CHATRAIL))
        yield _callers(callers), "", f"{limit:.2f}", f"{chat:.2f}", _ratio(chat, limit), ""


def _capacity(figures: Figures) -> Iterator[Row]:
    """What one core could carry, were it never kept waiting: the rate that other work on the machine hurts least."""
    for callers in THROUGHPUT_CALLERS:
        limit, chat = (1000 / figures.typical(name, callers, lambda s: s.cpu_ms) for name in (LIMIT, CHATRAIL))
        yield _callers(callers), "", f"{limit:,.0f}", f"{chat:,.0f}", *_share(chat, limit)


def _memory(figures: Figures) -> Iterator[Row]:
    limit, chat = figures.memory[LIMIT], figures.memory[CHATRAIL]
    before, after = (limit.before_mib, chat.before_mib), (limit.after_mib, chat.after_mib)
    for label, sizes in (("at first", before), (f"after {chat.streams:,} streams", after)):
        yield label, "", f"{sizes[0]:.0f}", f"{sizes[1]:.0f}", _ratio(sizes[1], sizes[0]), ""


def _busy(figures: Figures, cores: str) -> Iterator[Row]:
    """How busy with our work, and with all; what else ran on this machine is the difference."""
    ours, everybodys = attrgetter(f"{cores}.ours"), attrgetter(f"{cores}.everybodys")
    for callers in CALLERS:
        busy = (
            f"{figures.typical(name, callers, ours):.0%} / {figures.typical(name, callers, everybodys):.0%}"
            for name in NAMES
        )
        yield _callers(callers), *busy, "", ""


def _notes(figures: Figures, cores: Cores) -> Iterator[str]:
    if cores.is_one_for_all:
        yield "This machine has one core for everything: nothing here was measured alone."
    elsewhere = [
        sample.measured_core.everybodys - sample.measured_core.ours for sample in figures.samples[CHATRAIL, 16]
    ]
    if median(elsewhere) > DISTURBED:
        yield (
            f"Other work took {median(elsewhere):.0%} of the measured core: all that is timed is worse than it is. "
            "Go by the CPU, and by what is beside each other."
        )
    ours, helpers = attrgetter("measured_core.ours"), attrgetter("other_cores.ours")
    for name in (LIMIT, CHATRAIL):
        if any(figures.typical(name, n, helpers) > figures.typical(name, n, ours) for n in THROUGHPUT_CALLERS):
            yield f"What stands around {name} was busier than {name} itself: its streams a second could be more."
    yield (
        f"One fsync of this disk takes {median(figures.syncs_s) * 1000:.2f} ms. A stream of ChatRail waits for two "
        "(quota's hold, its own outbox), one of the bare limit for the broker's."
    )
    counts = figures.counts
    verdict = "all the same" if counts.agree else "NOT THE SAME"
    yield (
        f"ChatRail answered {counts.answered:,} streams; the stand-in gave {_said(counts.given)}, the ledger has "
        f"{_said(counts.recorded)}, quota's totals {_said(counts.totalled)}: {verdict}."
    )


def _said(count: Count) -> str:
    return f"{count.generations:,} ({count.tokens:,} tokens)"


def _callers(callers: int) -> str:
    return "1 caller" if callers == 1 else f"{callers} callers"


def _ratio(figure: float, limit: float) -> str:
    return f"{figure / limit:.1f} x" if limit > 0 else ""


def _share(rate: float, limit: float) -> tuple[str, str]:
    share = rate / limit
    return f"{share:.0%}", _aim(f"≥ {SHARE_OF_LIMIT_MIN:.0%}", share >= SHARE_OF_LIMIT_MIN)


def _aim(words: str, is_met: bool) -> str:
    return f"{words} {'met' if is_met else 'missed'}"
