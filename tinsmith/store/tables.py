"""The tables. SQLite and Postgres share them; `migrations/` creates and changes them.

Times are seconds since the epoch (float). JSON columns hold small dictionaries. `base` is the name of the served base
model, the key by which an engine finds its work.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _partial_index(name: str, condition: str, *columns: str, unique: bool = False) -> sa.Index:
    """An index of the rows in one state; a query uses it only if it spells `condition` out, without parameters."""
    where = sa.text(condition)
    return sa.Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


def insert(conn: sa.Connection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT in the database's dialect, for its ON CONFLICT clauses."""
    return postgresql.insert(table) if conn.dialect.name == "postgresql" else sqlite.insert(table)


keys = sa.Table(
    "keys",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),  # SHA-256 of the key, hexadecimal
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("prefix", sa.Text, nullable=False),  # the key's beginning, by which people tell keys apart
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),  # user, admin
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("used_at", sa.Float),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
    sa.Column("tokens_per_second", sa.Float),  # limits: NULL is none
    sa.Column("max_models", sa.Integer),  # open at once
    sa.Column("max_storage", sa.BigInteger),  # bytes of checkpoints
    sa.Column("weight", sa.Float, nullable=False, server_default="1"),  # its share, while others want theirs
    sa.Index(None, "owner"),
    _partial_index("ix_keys_name", "revoked_at IS NULL", "name", unique=True),
)

base_models = sa.Table(
    "base_models",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("base", sa.Text, nullable=False, unique=True),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("dtype", sa.Text, nullable=False),  # auto, float32, bfloat16
    sa.Column("max_context", sa.Integer, nullable=False),  # 0: what it was made for
    sa.Column("trust_remote_code", sa.Boolean, nullable=False),
    sa.Column("architecture", sa.Text, nullable=False),
    sa.Column("parameters", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # open, finished
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("sdk_version", sa.Text, nullable=False),
    sa.Column("project_id", sa.Text),
    sa.Column("display_name", sa.Text),
    sa.Column("finish_reason", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Index(None, "owner", "created_at"),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # "{session}:train:{model_seq_id}"
    sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id"), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("base_name", sa.Text, nullable=False),  # as the user named it (an alias, perhaps)
    sa.Column("spec", sa.JSON, nullable=False),  # protocols.ModelSpec
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # creating, ready, failed, closed
    sa.Column("recovery_seq", sa.BigInteger),  # the last seq contained in the recovery point, if there is one
    sa.Column("recovery_folder", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("used_at", sa.Float, nullable=False),
    sa.Index(None, "session_id"),
    sa.Index(None, "owner", "created_at"),
    _partial_index("ix_models_living", "state != 'closed'", "base"),
)

samplers = sa.Table(
    "samplers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # "{session}:sample:{sampling_session_seq_id}"
    sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id"), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("base_name", sa.Text, nullable=False),
    sa.Column("snapshot", sa.Text, nullable=False),  # "base", a tinker:// path, or an ephemeral snapshot's id
    sa.Column("model_id", sa.Text),  # the model it was saved from, if any
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("written_at", sa.Float),  # its ephemeral snapshot; NULL if it has none, or the save has not ended well
    sa.Index(None, "session_id"),
    sa.Index(None, "owner", "created_at"),
    _partial_index("ix_samplers_there", "snapshot != 'gone'", "model_id", "created_at"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("path", sa.Text, primary_key=True),  # tinker://{model id}/{weights, sampler_weights, …}/{name}
    sa.Column("model_id", sa.Text, sa.ForeignKey("models.id"), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),  # training, sampler, external
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("base_name", sa.Text, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("public", sa.Boolean, nullable=False, default=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Index(None, "model_id"),
    sa.Index(None, "owner", "created_at"),
    sa.Index(None, "expires_at"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", Serial, primary_key=True, autoincrement=True),  # order of arrival
    sa.Column("subject", sa.Text, nullable=False),  # the model or sampler that it is for
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),  # what it costs, for batching and fairness
    sa.Column("state", sa.Text, nullable=False),  # queued, running, done, failed, expired
    sa.Column("engine", sa.Text),  # who runs it
    sa.Column("error", sa.Text),
    sa.Column("category", sa.Text),  # user, server
    sa.Column("trace", sa.Text),  # the id that log lines about it name
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.UniqueConstraint("subject", "seq"),
    _partial_index("ix_jobs_queued", "state = 'queued'", "base", "number"),
    _partial_index("ix_jobs_running", "state = 'running'", "base", "number"),
    _partial_index("ix_jobs_finished", "state IN ('done', 'failed')", "finished_at"),
    _partial_index("ix_jobs_expired", "state = 'expired'", "finished_at"),
    _partial_index("ix_jobs_sampled", "kind = 'sample' AND finished_at IS NOT NULL", "subject", "finished_at"),
    sqlite_autoincrement=True,
)

payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("number", Serial, sa.ForeignKey("jobs.number"), primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

results = sa.Table(
    "results",
    metadata,
    sa.Column("number", Serial, sa.ForeignKey("jobs.number"), primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

engines = sa.Table(
    "engines",
    metadata,
    sa.Column("base", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, nullable=False),  # new at every start
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # loading, ready, stopped, failed, lost
    sa.Column("progress", sa.Text, nullable=False),
    sa.Column("capabilities", sa.JSON),
    sa.Column("beat_at", sa.Float, nullable=False),
    sa.Column("statistics", sa.JSON),  # wire.statistics, as of the last beat
    sa.Column("starts", sa.Integer, nullable=False, server_default="1"),
    sa.Column("recoveries", sa.Integer, nullable=False, server_default="0"),  # starts after one that did not stop
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", Serial, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),  # whose object it was
    sa.Column("event", sa.Text, nullable=False),  # {resource}_{action}
    sa.Column("details", sa.JSON, nullable=False),
    sa.Index(None, "at"),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),  # since the epoch
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("base", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),  # train, prefill, cached_prefill, sample
    sa.Column("tokens", sa.BigInteger, nullable=False),
)

storage = sa.Table(  # how long each checkpoint took how much room; its row outlives it
    "storage",
    metadata,
    sa.Column("number", Serial, primary_key=True, autoincrement=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("until", sa.Float),
    sa.Index(None, "until"),
    _partial_index("ix_storage_path", "until IS NULL", "path", unique=True),
)

server_secrets = sa.Table(
    "server_secrets",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)

sampler_clients = sa.Table(
    "sampler_clients",
    metadata,
    sa.Column("sampler_id", sa.Text, sa.ForeignKey("samplers.id"), primary_key=True),
    sa.Column("joined", sa.Integer, nullable=False),  # clients beside the first one
)

custom_losses = sa.Table(
    "custom_losses",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # "{session}:loss:{custom_loss_seq_id}"
    sa.Column("session_id", sa.Text, sa.ForeignKey("sessions.id"), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("program", sa.JSON, nullable=False),  # wire.custom_loss, already checked
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index(None, "session_id"),
    sa.Index(None, "owner"),
)

receipts = sa.Table(  # of transactions on Postgres, one row for each process that writes
    "receipts",
    metadata,
    sa.Column("writer", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),  # of its latest transaction
    sa.Column("left_at", sa.Float, nullable=False),
)
