"""That a settlement came late is noted once, and never taken back."""

from alembic import op

revision = "0008"
down_revision = "0007"

TAKEN_BACK = "OLD.is_late AND NOT NEW.is_late"


def upgrade() -> None:
    trigger = "CREATE TRIGGER settlements_stays_late BEFORE UPDATE OF is_late ON settlements FOR EACH ROW WHEN"
    if op.get_bind().dialect.name == "sqlite":
        refused = "settlements is append-only: update is refused"
        op.execute(f"{trigger} {TAKEN_BACK} BEGIN SELECT RAISE(ABORT, '{refused}'); END")
    else:
        op.execute(f"{trigger} ({TAKEN_BACK}) EXECUTE FUNCTION refuse_change()")
