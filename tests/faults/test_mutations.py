"""Classic mistakes, put back one at a time, are each found: else "lost 0, doubled 0" would say nothing."""

import subprocess
import sys

import pytest

from tests.faults.machine.mutants import MUTANTS
from tests.stack import PROJECT, environment

# A quarter of a minute on a machine that has nothing else to do.
WITHIN_S = 240


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds_a_classic_mistake(name: str) -> None:
    command = [sys.executable, "-m", "tests.faults.machine", "--mutant", name, "--discard"]
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as machine:
        try:
            said, _ = machine.communicate(timeout=WITHIN_S)
        finally:
            machine.terminate()  # it ends what it has started
    assert machine.returncode == 1, said
    assert MUTANTS[name].finds in said, said
