import gc
import os

import pytest
from hypothesis import settings

# What is imported and collected stays. To look through it again and again takes a fifth of the run's CPU.
gc.disable()

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("chatrail", deadline=None)
settings.load_profile("chatrail")

pytest_plugins = ["tests.stack", "tests.fixtures"]

# What takes longest begins first, and the rest fills all processes to the end. Whoever has one test left gets another
# file at once, and keeps it until that test is over: after the machine it is the ninth, on two cores.
LONGEST_FIRST = (
    "faults/test_machine.py",
    "integration/test_archive.py",
    "integration/test_audit.py",
    "faults/test_links.py",
    "integration/test_replay.py",
    "faults/test_mutations.py",
    "faults/test_cluster.py",
    "e2e/test_archive.py",
    "e2e/test_local_stack.py",
    "containers/test_story.py",
    "integration/test_archive_damaged.py",
    "integration/test_lost.py",
    "integration/test_quota_store.py",
    "faults/test_failpoints.py",
    "faults/test_full_disk.py",
    "browser/test_rail.py",
    "integration/test_ledger_store.py",
    "e2e/test_replay.py",
    "faults/test_storm.py",
    "integration/test_ledger_export.py",
    "faults/test_guards.py",
    "e2e/test_api.py",
    "integration/test_seals.py",
    "integration/test_broker.py",
    "faults/test_away.py",
    "integration/test_quota_service.py",
    "e2e/test_openapi.py",
    "integration/test_ledger_service.py",
)


def pytest_xdist_auto_num_workers() -> int:
    """Four a core: most of the time a test waits for what it has started or harmed."""
    return 4 * (os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()
