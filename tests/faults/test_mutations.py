"""Classic mistakes, put back one at a time, are each found: else "lost 0, doubled 0" would say nothing."""

import pytest

from tests import forked
from tests.faults.machine.mutants import MUTANTS
from tests.stack import environment

# A quarter of a minute on a machine that has nothing else to do.
WITHIN_S = 240


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_machine_finds_a_classic_mistake(name: str) -> None:
    arguments = ("--mutant", name, "--discard")
    ended = await forked.run("tests.faults.machine", *arguments, env=environment(), timeout_s=WITHIN_S)
    assert ended.status == 1, ended.out
    assert MUTANTS[name].finds in ended.out, ended.out
