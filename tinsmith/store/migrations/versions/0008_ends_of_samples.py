"""An index by which the latest ends of a sampler's samples are found among all that it ever had."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    where = sa.text("kind = 'sample' AND finished_at IS NOT NULL")
    op.create_index("ix_jobs_sampled", "jobs", ["subject", "finished_at"], sqlite_where=where, postgresql_where=where)
