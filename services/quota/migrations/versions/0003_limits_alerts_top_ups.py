"""Several limits, weights by model, alerts, top-ups, and all changes of plans: months can be anchored to them."""

import sqlalchemy as sa
from alembic import op

from shared.database import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # What was settled before has no model: it weighs as every model does that the plan does not name.
    op.add_column("settlements", sa.Column("model", sa.Text))
    op.add_column("usage_totals", sa.Column("models", sa.Text, nullable=False, server_default="{}"))
    for table in ("settlements", "usage_totals"):
        for name in ("top_up_tokens", "lasting_top_up_tokens"):
            op.add_column(table, sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("subscriptions", sa.Column("subscribed_at", UtcDateTime))
    op.execute("UPDATE subscriptions SET subscribed_at = changed_at")
    op.create_table(
        "plan_changes",
        sa.Column("event_id", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("time_zone", sa.Text),
        sa.Column("changed_at", UtcDateTime, nullable=False),
    )
    op.create_index("plan_changes_by_user", "plan_changes", ["user_id", "changed_at", "event_id"])
    op.execute(
        "INSERT INTO plan_changes (event_id, user_id, tier, time_zone, changed_at)"
        " SELECT event_id, user_id, tier, time_zone, changed_at FROM subscriptions"
    )
    op.drop_index("holds_by_user", "holds")
    op.create_index("holds_by_user", "holds", ["user_id", "expires_at", "tokens", "started_at"])
    op.create_table(
        "alerts",
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("period_start", UtcDateTime, primary_key=True),
        sa.Column("period_end", UtcDateTime, primary_key=True),
        sa.Column("percent", sa.Integer, primary_key=True),
        sa.Column("event_id", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("is_published", sa.Boolean, nullable=False),
    )
    op.create_index("alerts_to_publish", "alerts", ["event_id"], sqlite_where=sa.text("NOT is_published"),
                    postgresql_where=sa.text("NOT is_published"))  # fmt: skip
