from collections.abc import Iterator

import pytest

from tests.stack import Stack


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack to do harm to, and one whose counts can be compared as wholes."""
    with Stack(tmp_path_factory.mktemp("faults") / "data") as stack:
        yield stack
