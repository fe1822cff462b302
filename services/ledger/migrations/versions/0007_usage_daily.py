"""The sums of each user's days, by model: history reads them instead of every record."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


def upgrade() -> None:
    op.create_table(
        "usage_daily",
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("usage_date", sa.Date, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("tokens_used", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in COUNTS),
        sa.Column("generations", sa.BigInteger, nullable=False),
        # Room for a new version of each row beside it: an index need not hear of it, and a page is used again.
        postgresql_with={"fillfactor": 50},
    )
    if op.get_bind().dialect.name == "postgresql":
        # What is recorded from now on waits, and is then in the sums, too.
        op.execute("LOCK TABLE usage IN SHARE ROW EXCLUSIVE MODE")
    op.execute(
        f"INSERT INTO usage_daily (user_id, usage_date, model, tokens_used, {', '.join(COUNTS)}, generations)"  # noqa: S608
        " SELECT user_id, usage_date, coalesce(model, ''), sum(tokens_used),"
        f" {', '.join(f'coalesce(sum({name}), 0)' for name in COUNTS)},"
        " count(*) FILTER (WHERE event_type = 'generation.completed')"
        " FROM usage WHERE tokens_used <> 0 GROUP BY user_id, usage_date, coalesce(model, '')"
    )
