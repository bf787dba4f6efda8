"""Keeping the latest checkpoints of a model only, where its owner or the server asks for that.

What is in use is never touched: a published checkpoint, one that a sampler of an open session samples from, one that an
accepted request names, nor one with a lifetime of its own. Functions take a connection inside a transaction.
"""

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from tinsmith.errors import UserError
from tinsmith.store import records
from tinsmith.store.queue import OPEN
from tinsmith.store.tables import checkpoints, jobs, payloads, samplers, sessions

KEEP = "keep_checkpoints"
"""In a model's user_metadata: how many of its checkpoints of each kind are kept."""


def wanted(metadata: Mapping[str, Any], otherwise: int) -> int:
    """How many to keep; 0 is all. Raises UserError if the metadata asks for what is no such number."""
    value = metadata.get(KEEP, otherwise)
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"user_metadata[{KEEP!r}] is {value!r}; allowed: a number of checkpoints, or 0 for all")
    return int(text)


def drop_superseded(conn: sa.Connection, model_id: str, kind: str, otherwise: int) -> list[records.Checkpoint]:
    """Forgets a model's checkpoints of a kind behind the latest ones, and returns them: their files are to be removed.

    `otherwise` is how many are kept if the model does not say.
    """
    model = records.find_model(conn, model_id)
    keep = 0 if model is None else wanted(model.user_metadata, otherwise)
    if not keep:
        return []
    newest_first = (
        sa.select(checkpoints.c.path, checkpoints.c.public)
        .where(checkpoints.c.model_id == model_id, checkpoints.c.kind == kind, checkpoints.c.expires_at.is_(None))
        .order_by(checkpoints.c.created_at.desc(), checkpoints.c.path.desc())
    )
    rows = conn.execute(newest_first)
    behind = [path for path, is_public in list(rows)[keep:] if not is_public]
    if not behind:
        return []
    used = _sampled(conn, behind) | _named(conn)
    return [records.delete_checkpoint(conn, path) for path in behind if path not in used]


def _sampled(conn: sa.Connection, paths: list[str]) -> set[str]:
    statement = (
        sa.select(samplers.c.snapshot)
        .join(sessions, sessions.c.id == samplers.c.session_id)
        .where(samplers.c.snapshot.in_(paths), sessions.c.state == "open")
    )
    return set(conn.scalars(statement))


def _named(conn: sa.Connection) -> set[str]:
    """Paths in requests to load that have not ended."""
    statement = sa.select(payloads.c.body).join(jobs, jobs.c.number == payloads.c.number)
    bodies = conn.scalars(statement.where(OPEN, jobs.c.kind == sa.literal_column("'load_weights'")))
    return {path for body in bodies if (path := json.loads(body).get("path"))}
