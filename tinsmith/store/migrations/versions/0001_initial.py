"""The first tables. A migration repeats what it needs of `tables.py`, which will change; what this one did will not."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _create_sessions()
    _create_models()
    _create_samplers()
    _create_checkpoints()
    _create_jobs()
    _create_bodies("payloads")
    _create_bodies("results")
    _create_engines()


def _create_sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("sdk_version", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text()),
        sa.Column("display_name", sa.Text()),
        sa.Column("finish_reason", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_owner_created_at", "sessions", ["owner", "created_at"])


def _create_models() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("base_name", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("recovery_seq", sa.BigInteger()),
        sa.Column("recovery_folder", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("used_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_models_session_id"),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
    )
    op.create_index("ix_models_session_id", "models", ["session_id"])
    op.create_index("ix_models_owner_created_at", "models", ["owner", "created_at"])


def _create_samplers() -> None:
    op.create_table(
        "samplers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("base_name", sa.Text(), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_samplers_session_id"),
        sa.PrimaryKeyConstraint("id", name="pk_samplers"),
    )
    op.create_index("ix_samplers_session_id", "samplers", ["session_id"])


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("base_name", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float()),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_checkpoints_model_id"),
        sa.PrimaryKeyConstraint("path", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_model_id", "checkpoints", ["model_id"])
    op.create_index("ix_checkpoints_owner_created_at", "checkpoints", ["owner", "created_at"])
    op.create_index("ix_checkpoints_expires_at", "checkpoints", ["expires_at"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", SERIAL, autoincrement=True, nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("category", sa.Text()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("finished_at", sa.Float()),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sa.UniqueConstraint("subject", "seq", name="uq_jobs_subject_seq"),
        sqlite_autoincrement=True,
    )
    _create_partial_index("ix_jobs_queued", "state = 'queued'", ["base", "number"])
    _create_partial_index("ix_jobs_running", "state = 'running'", ["base", "number"])
    _create_partial_index("ix_jobs_finished", "state IN ('done', 'failed')", ["finished_at"])
    _create_partial_index("ix_jobs_expired", "state = 'expired'", ["finished_at"])


def _create_partial_index(name: str, condition: str, columns: list[str]) -> None:
    op.create_index(name, "jobs", columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))


def _create_bodies(table: str) -> None:
    op.create_table(
        table,
        sa.Column("number", SERIAL, autoincrement=False, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["number"], ["jobs.number"], name=f"fk_{table}_number"),
        sa.PrimaryKeyConstraint("number", name=f"pk_{table}"),
    )


def _create_engines() -> None:
    op.create_table(
        "engines",
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("progress", sa.Text(), nullable=False),
        sa.Column("capabilities", sa.JSON()),
        sa.Column("beat_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("base", name="pk_engines"),
    )
