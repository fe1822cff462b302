"""The proving machine, from the command line."""

import asyncio
import logging
import random
import shutil
import signal
import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import mkdtemp

import structlog

from tests.faults.machine.log import OperationLog
from tests.faults.machine.run import Run
from tests.faults.machine.schedule import KINDS, Kind, Shape, schedule
from tests.faults.machine.system import System

SEED_MAX = 1_000_000


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.faults.machine", description="Faults under load, and a count.")
    parser.add_argument("--seed", type=int, help="decides parts, faults and their times; by default a new one")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long faults happen")
    parser.add_argument("--only", choices=KINDS, action="append", help="a kind of fault; repeatable; by default all")
    parser.add_argument("--ledger", choices=["sqlite", "postgresql"], help="instead of what the seed chooses")
    parser.add_argument("--quota", choices=["sqlite", "postgresql"])
    parser.add_argument("--keep", action="store_true", help="the folder of the run, also when all is well")
    told = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    seed = random.randrange(SEED_MAX) if told.seed is None else told.seed  # noqa: S311 - no secret
    chosen = Shape.of(seed)
    shape = Shape(told.ledger or chosen.ledger, told.quota or chosen.quota)
    # A database that runs as somebody else reads it.
    folder = Path(mkdtemp(prefix="chatrail-faults-", dir="/tmp"))
    folder.chmod(0o755)
    status = asyncio.run(_run(seed, told.minutes, shape, tuple(told.only or KINDS), folder))
    if status == 0 and not told.keep:
        shutil.rmtree(folder)
    else:
        _say(f"what it left is in {folder}")
    if status:
        _say(f"seed {seed} FAILED; the same schedule again: make faults SEED={seed} MINUTES={told.minutes:g}")
    return status


async def _run(seed: int, minutes: float, shape: Shape, kinds: tuple[Kind, ...], folder: Path) -> int:
    this = asyncio.current_task()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)  # type: ignore[union-attr]
    log = OperationLog(folder / "operations.ndjson")
    parts = f"ledger on {shape.ledger}, quota on {shape.quota}"
    _say(f"seed {seed}: {minutes:g} minutes of faults, {parts}: {', '.join(shape.services)}")
    async with System(shape, folder, log) as system:
        if "full disk" in kinds and not system.can_fill_disks:
            _say("full disk is left out: no tmpfs can be mounted here")
            kinds = tuple(kind for kind in kinds if kind != "full disk")
        faults = schedule(seed, minutes * 60, shape, kinds)
        log.write("run", seed=seed, minutes=minutes, ledger=shape.ledger, quota=shape.quota, faults=len(faults))
        await Run(system, seed=seed).carry_out(faults)
        system.places.save(folder)
        checker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.machine.checker", str(folder)
        )
        return await checker.wait()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command


if __name__ == "__main__":
    sys.exit(main())
