"""As tests.faults.failpoints, but a trim may leave as little of the archive on the stream as is asked for.

    python -m tests.short_overlap services.ledger trim --overlap-s 2

In earnest it is refused: a trim that is killed might come to what is not archived. Tests cannot wait for ten minutes.
"""

import sys

from services.ledger import archive_command
from tests.faults import failpoints

if __name__ == "__main__":
    archive_command.OVERLAP_S_MIN = 1
    failpoints.run(sys.argv[1], sys.argv[2:])
