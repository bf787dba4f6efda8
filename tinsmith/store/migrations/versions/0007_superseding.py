"""When a sampler's snapshot was written, and indexes for what the engines look for again and again."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_INDEXES = (
    ("ix_models_living", "models", ["base"], "state != 'closed'"),
    ("ix_samplers_there", "samplers", ["model_id", "created_at"], "snapshot != 'gone'"),
    ("ix_samplers_owner_created_at", "samplers", ["owner", "created_at"], None),
    ("ix_custom_losses_session_id", "custom_losses", ["session_id"], None),
    ("ix_custom_losses_owner", "custom_losses", ["owner"], None),
)


def upgrade() -> None:
    op.add_column("samplers", sa.Column("written_at", sa.Float()))
    op.execute("UPDATE samplers SET written_at = created_at WHERE model_id IS NOT NULL")
    for name, table, columns, condition in _INDEXES:
        where = None if condition is None else sa.text(condition)
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
