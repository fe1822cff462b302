"""The proving machine, from the command line. Its exit status is 1 when anything is lost, doubled or wrong."""

import asyncio
import logging
import os
import random
import shutil
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Coroutine
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import structlog

from tests import forked
from tests.faults.machine.log import OperationLog
from tests.faults.machine.mutants import MUTANTS, SQLITE, Mutant
from tests.faults.machine.run import Run
from tests.faults.machine.schedule import KINDS, Shape, schedule
from tests.faults.machine.system import System, can_mount

SEED_MAX = 1_000_000
STOPPED = 130
MUTANT_PAUSE_S, PAUSE_S = 0.8, 0.15


def main() -> int:
    told = _arguments()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    # A database that runs as somebody else reads it.
    folder = Path(mkdtemp(prefix="chatrail-faults-", dir="/tmp"))
    folder.chmod(0o755)
    if told.mutant:
        return _tidied(folder, _status(_find(told.mutant, told.seed or 0, folder)), told)
    seed = random.randrange(SEED_MAX) if told.seed is None else told.seed  # noqa: S311 - no secret
    status = _tidied(folder, _status(_prove(seed, told, folder)), told)
    if status == 1:
        _say(f"seed {seed} FAILED; the same schedule again: make faults SEED={seed} MINUTES={told.minutes:g}")
    return status


def _arguments() -> Namespace:
    parser = ArgumentParser(prog="python -m tests.faults.machine", description="Faults under load, and a count.")
    parser.add_argument("--seed", type=int, help="decides parts, faults and their times; by default a new one")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long faults happen")
    parser.add_argument("--pause-s", type=float, default=PAUSE_S, help="what each of the load waits, on average")
    parser.add_argument("--only", choices=KINDS, action="append", help="a kind of fault; repeatable; by default all")
    parser.add_argument("--ledger", choices=["sqlite", "postgresql"], help="instead of what the seed chooses")
    parser.add_argument("--quota", choices=["sqlite", "postgresql"])
    parser.add_argument("--mutant", choices=MUTANTS, help="a classic mistake, and the faults that expose it")
    parser.add_argument("--keep", action="store_true", help="the folder of the run, also when all is well")
    parser.add_argument("--discard", action="store_true", help="the folder of the run, also when something is wrong")
    return parser.parse_args()


async def _prove(seed: int, told: Namespace, folder: Path) -> int:
    """A run by the schedule of its seed."""
    chosen = Shape.of(seed)
    shape = Shape(told.ledger or chosen.ledger, told.quota or chosen.quota)
    stored = f"ledger on {shape.ledger}, quota on {shape.quota}"
    _say(f"seed {seed}: {told.minutes:g} minutes of faults, {stored}: {', '.join(shape.services)}")
    kinds = tuple(told.only or KINDS)
    if "full disk" in kinds and not can_mount(folder):
        _say("full disk is left out: no tmpfs can be mounted here")
        kinds = tuple(kind for kind in kinds if kind != "full disk")
    faults = schedule(seed, told.minutes * 60, shape, kinds)
    log = OperationLog(folder / "operations.ndjson")
    async with System(shape, folder, log) as system:
        await Run(system, seed=seed, pause_s=told.pause_s).carry_out(faults)
        found = await system.audit(), await _checked(system)
        return int(any(found))


async def _find(name: str, seed: int, folder: Path) -> int:
    """A run with a mistake in the services, and the faults that expose it."""
    mutant: Mutant = MUTANTS[name]
    log = OperationLog(folder / "operations.ndjson")
    async with System(SQLITE, folder, log, mutant=name, stream_bytes_max=mutant.stream_bytes_max) as system:
        await Run(system, seed=seed, pause_s=MUTANT_PAUSE_S).carry_out(mutant.faults)
        return await _checked(system)


async def _checked(system: System) -> int:
    """The checker's exit status: it is a process of its own, and reads while the system is still up."""
    system.places.save(system.folder)
    found = await forked.run("tests.faults.machine.checker", str(system.folder), env=dict(os.environ))
    _say(found.out)
    return found.status


def _status(running: Coroutine[Any, Any, int]) -> int:
    """Of the whole run. One that is told to stop ends what it has started, and says nothing about the product."""

    async def stoppable() -> int:
        this = asyncio.current_task()
        assert this
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, this.cancel)
        return await running

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        return STOPPED


def _tidied(folder: Path, status: int, told: Namespace) -> int:
    """The folder stays where something is to be looked up in it."""
    if (status == 1 or told.keep) and not told.discard:
        _say(f"what it left is in {folder}")
    else:
        shutil.rmtree(folder)
    return status


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command


if __name__ == "__main__":
    sys.exit(main())
