"""The schedule of the proving machine: the same for a seed, and such that one fault does not undo another."""

import pytest

from tests.faults.machine.schedule import FIRST_FAULT_S, KINDS, Fault, Shape, schedule, targets

SEEDS = range(30)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_always_has_the_same_parts_and_the_same_faults(seed: int) -> None:
    assert Shape.of(seed) == Shape.of(seed)
    assert schedule(seed, 180, Shape.of(seed)) == schedule(seed, 180, Shape.of(seed))


def test_other_seeds_have_other_parts_and_other_faults() -> None:
    assert {Shape.of(seed) for seed in SEEDS} == {
        Shape(ledger, quota) for ledger in ("sqlite", "postgresql") for quota in ("sqlite", "postgresql")
    }
    shape = Shape("sqlite", "sqlite")
    assert len({tuple(schedule(seed, 60, shape)) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_in_three_minutes_every_kind_of_fault_happens_and_ends_to_a_part_that_there_is(seed: int) -> None:
    shape = Shape.of(seed)
    faults = schedule(seed, 180, shape)
    assert {fault.kind for fault in faults} == set(KINDS)
    for fault in faults:
        assert fault.target in targets(shape, fault.kind)
        assert FIRST_FAULT_S <= fault.begins_s <= fault.ends_s <= 180


@pytest.mark.parametrize("seed", SEEDS)
def test_no_part_has_two_faults_at_once_and_some_parts_have_theirs_together(seed: int) -> None:
    faults = schedule(seed, 300, Shape.of(seed))
    together = [(one, other) for one in faults for other in faults if one is not other and _overlap(one, other)]
    assert together
    assert all(one.target != other.target for one, other in together)
    # Whoever stops a service to put its database back must not have it killed under the copy.
    restored = [(one.target, other.target) for one, other in together if one.kind == "restore"]
    assert not [pair for pair in restored if pair[1].startswith(pair[0]) or pair[1] == "postgres"]


def _overlap(one: Fault, other: Fault) -> bool:
    return one.begins_s < other.ends_s and other.begins_s < one.ends_s


def test_replicas_share_a_database_only_where_it_takes_several_writers() -> None:
    assert Shape("sqlite", "postgresql").services == ["chat", "ledger", "quota-1", "quota-2"]
    assert "quota->postgres" in Shape("sqlite", "postgresql").links
    assert "postgres" not in targets(Shape("sqlite", "sqlite"), "kill")
