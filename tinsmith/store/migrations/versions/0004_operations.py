"""What operators see: a trace id of every job, and each engine's statistics and starts."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("trace", sa.Text()))
    op.add_column("engines", sa.Column("statistics", sa.JSON()))
    for name, begins in (("starts", "1"), ("recoveries", "0")):
        op.add_column("engines", sa.Column(name, sa.Integer(), nullable=False, server_default=begins))
