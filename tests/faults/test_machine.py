"""Everything that can die does, under load, for three minutes: no token is lost and none is counted twice."""

import random
import subprocess
import sys

from tests.faults.machine.__main__ import SEED_MAX
from tests.stack import PROJECT, environment

MINUTES = 3
# The parts start before the faults, and all comes right again after them.
WITHIN_S = MINUTES * 60 + 300


def test_whatever_dies_every_token_is_counted_once() -> None:
    """With another seed each time: a run that fails prints its own, and `make faults SEED=` has the same schedule."""
    seed = random.randrange(SEED_MAX)  # noqa: S311 - no secret
    print(f"make faults SEED={seed} MINUTES={MINUTES}")  # noqa: T201 - what to type when it fails
    command = [sys.executable, "-m", "tests.faults.machine", "--seed", str(seed), "--minutes", str(MINUTES)]
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as machine:
        try:
            said, _ = machine.communicate(timeout=WITHIN_S)
        finally:
            machine.terminate()  # it ends what it has started
    print(said)  # noqa: T201
    assert machine.returncode == 0, said
    assert "lost 0 (0 tokens), doubled 0 (0 tokens), wrong 0 (0 tokens)" in said
