"""API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("used_at", sa.Float()),
        sa.Column("expires_at", sa.Float()),
        sa.Column("revoked_at", sa.Float()),
        sa.Column("tokens_per_second", sa.Float()),
        sa.Column("max_models", sa.Integer()),
        sa.Column("max_storage", sa.BigInteger()),
        sa.PrimaryKeyConstraint("digest", name="pk_keys"),
    )
    op.create_index("ix_keys_owner", "keys", ["owner"])
    not_revoked = sa.text("revoked_at IS NULL")
    op.create_index(
        "ix_keys_name", "keys", ["name"], unique=True, sqlite_where=not_revoked, postgresql_where=not_revoked
    )
