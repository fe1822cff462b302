import pytest

from tests.stack import Stack


@pytest.fixture(scope="package")
def stack(counted_stack: Stack) -> Stack:
    """A stack to do harm to, and one whose counts can be compared as wholes."""
    return counted_stack
