"""Who did what, what was used and stored, the server's own secrets, clients of samplers, and custom losses."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _create_accounts()
    op.create_table(
        "server_secrets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_server_secrets"),
    )
    op.create_table(
        "sampler_clients",
        sa.Column("sampler_id", sa.Text(), nullable=False),
        sa.Column("joined", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["sampler_id"], ["samplers.id"], name="fk_sampler_clients_sampler_id"),
        sa.PrimaryKeyConstraint("sampler_id", name="pk_sampler_clients"),
    )
    op.create_table(
        "custom_losses",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("program", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_custom_losses_session_id"),
        sa.PrimaryKeyConstraint("id", name="pk_custom_losses"),
    )


def _create_accounts() -> None:
    op.create_table(
        "audit",
        sa.Column("number", SERIAL, autoincrement=True, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_table(
        "usage",
        sa.Column("hour", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "owner", "session_id", "base", "kind", name="pk_usage"),
    )
    op.create_table(
        "storage",
        sa.Column("number", SERIAL, autoincrement=True, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("until", sa.Float()),
        sa.PrimaryKeyConstraint("number", name="pk_storage"),
    )
    op.create_index("ix_storage_until", "storage", ["until"])
    kept = sa.text("until IS NULL")
    op.create_index("ix_storage_path", "storage", ["path"], unique=True, sqlite_where=kept, postgresql_where=kept)
    op.execute(
        "INSERT INTO storage (path, owner, session_id, base, size_bytes, since) "
        "SELECT c.path, c.owner, m.session_id, c.base, c.size_bytes, c.created_at "
        "FROM checkpoints c JOIN models m ON m.id = c.model_id"
    )
