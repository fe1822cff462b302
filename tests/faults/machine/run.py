"""A run: the parts, the load, the faults, and then a while in which all of it must come right again."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import psycopg
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from tests.faults.machine.load import Load
from tests.faults.machine.parts import StepFailed
from tests.faults.machine.schedule import Fault
from tests.faults.machine.system import NotInTime, Service, System
from tests.proxy import Mode

READY_AT_FIRST_S = 60.0
# After the last fault, every service must be ready within this; then the rest of the work must be done within that.
READY_WITHIN_S = 30.0
QUIET_WITHIN_S = 60.0
# A little more load once all are ready: a service that says so must also work.
AFTERWARDS_S = 3.0
WATCH_EVERY_S = 1.0
OPERATOR_PATIENCE_S = 40.0


class Run:
    """Faults under load, on a system that runs."""

    def __init__(self, system: System, *, seed: int, pause_s: float) -> None:
        self.system, self.log, self._seed, self._pause_s = system, system.log, seed, pause_s

    async def carry_out(self, faults: Sequence[Fault]) -> None:
        await self.system.ready(READY_AT_FIRST_S)
        load = Load(self.system.urls["chat"], self.system.nats_url, self.log, seed=self._seed, pause_s=self._pause_s)
        await load.prepare()
        load.start()
        self._begun = time.monotonic()
        watching = asyncio.create_task(self._watch_readiness())
        await asyncio.gather(*(self._inflict(fault) for fault in faults))
        await self._await("ready", self.system.ready, READY_WITHIN_S)
        await asyncio.sleep(AFTERWARDS_S)
        watching.cancel()
        await load.stop()
        await self._await("quiet", self.system.quiet, QUIET_WITHIN_S)

    async def _watch_readiness(self) -> None:
        """A line in the log for each change, by which it is told what a fault did and for how long."""
        known: list[str] | None = None
        while True:
            absent = sorted(await self.system.not_ready())
            if absent != known:
                self.log.write("readiness", absent=absent)
            known = absent
            await asyncio.sleep(WATCH_EVERY_S)

    async def _await(self, what: str, wait: Any, within_s: float) -> None:
        begun = time.monotonic()
        missing = ""
        try:
            await wait(within_s)
        except NotInTime as problem:
            missing = str(problem)
        self.log.write(what, after_s=round(time.monotonic() - begun, 2), within_s=within_s, missing=missing)

    async def _inflict(self, fault: Fault) -> None:
        await asyncio.sleep(self._begun + fault.begins_s - time.monotonic())
        told = {"fault": fault.kind, "target": fault.target, "detail": fault.detail}
        self.log.write("fault begins", **told)
        await _insisting(partial(self._begin, fault))
        await asyncio.sleep(self._begun + fault.ends_s - time.monotonic())
        await _insisting(partial(self._end, fault))
        self.log.write("fault ends", **told)

    async def _begin(self, fault: Fault) -> None:
        system = self.system
        match fault.kind:
            case "kill":
                system.parts[fault.target].signal(signal.SIGKILL)
            case "terminate":
                system.parts[fault.target].signal(signal.SIGTERM)
            case "stop":
                system.parts[fault.target].signal(signal.SIGSTOP)
            case "cut":
                system.links[fault.target].set("cut")
            case "half-open":
                system.links[fault.target].set(cast(Mode, fault.detail))
            case "slow":
                system.links[fault.target].set("slow")
            case "full disk":
                await asyncio.to_thread(system.fill_disk, fault.target)
            case "lock":
                await system.lock(cast(Service, fault.target))
            case "delete consumer":
                with suppress(NotFoundError):
                    await system.delete_consumer(fault.target)
            case "restore":
                await system.copy_database(cast(Service, fault.target))

    async def _end(self, fault: Fault) -> None:
        system = self.system
        match fault.kind:
            case "stop":
                system.parts[fault.target].signal(signal.SIGCONT)
            case "cut" | "half-open" | "slow":
                system.links[fault.target].set("pass")
            case "full disk":
                await system.free_disk(fault.target)
            case "lock":
                await system.unlock(cast(Service, fault.target))
            case "delete consumer":
                await system.set_up_streams()
            case "restore":
                await system.put_back_database(cast(Service, fault.target))


async def _insisting(act: Callable[[], Awaitable[None]]) -> None:
    """As an operator does whose broker or database is away just then, because of another fault."""
    deadline = time.monotonic() + OPERATOR_PATIENCE_S
    while True:
        try:
            return await act()
        except (NatsError, psycopg.OperationalError, StepFailed, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(1)
