"""A process that runs tests, forked as our programs are (tests/forked.py): what it would import is there already.

python -m tests.worker       what pytest-xdist starts in place of Python: has the process forked, and waits for it
"""

import os
import shlex
import sys

from tests import forked

HERE = "here"


def xdist_spec() -> str:
    """How pytest-xdist is told to start its processes."""
    return f"popen//python={shlex.quote(sys.executable)} -m tests.worker"


def _run_tests() -> None:
    """Does what xdist writes to it. Tests and what they share are imported anew: pytest rewrites what they assert."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    ignored = "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
    os.environ["PYTEST_ADDOPTS"] = f"{os.environ.get('PYTEST_ADDOPTS', '')} -W '{ignored}'"
    exec(eval(sys.stdin.readline()), {"__name__": "__main__"})  # noqa: S102, S307 - as `python -c` of execnet's


if __name__ == "__main__":
    if sys.argv[1:] == [HERE]:
        _run_tests()
    else:
        sys.exit(forked.start_with((0, 1, 2), "tests.worker", HERE, env=os.environ).wait())
