"""Everything that can die does, under load, for three minutes: no token is lost and none is counted twice."""

import random

from tests import forked
from tests.faults.machine.__main__ import SEED_MAX
from tests.stack import environment

MINUTES = 3
# Other tests need the machine meanwhile. By itself it has a load several times as large.
PAUSE_S = 1.2
# The parts start before the faults, and all comes right again after them.
WITHIN_S = MINUTES * 60 + 300


async def test_whatever_dies_every_token_is_counted_once() -> None:
    """With another seed each time: a run that fails prints its own, and `make faults SEED=` has the same schedule."""
    seed = random.randrange(SEED_MAX)  # noqa: S311 - no secret
    print(f"make faults SEED={seed} MINUTES={MINUTES} ARGS='--pause-s {PAUSE_S}'")  # noqa: T201 - to type when it fails
    arguments = ("--seed", str(seed), "--minutes", str(MINUTES), "--pause-s", str(PAUSE_S))
    ended = await forked.run("tests.faults.machine", *arguments, env=environment(), timeout_s=WITHIN_S)
    print(ended.out)  # noqa: T201
    assert ended.status == 0, ended.out
    assert "lost 0 (0 tokens), doubled 0 (0 tokens), wrong 0 (0 tokens)" in ended.out
