"""Records that cost a client nothing to make: how many the holder of a key may make.

Sessions and samplers are bounded by the day, and forgotten in time (see `forgetting`); custom losses by number and
size. Functions take a connection inside a transaction.
"""

import json
import time
from typing import Any

import sqlalchemy as sa

from tinsmith.errors import LimitError, TooLargeError
from tinsmith.store import records
from tinsmith.store.tables import custom_losses, samplers, sessions

SESSIONS_A_DAY = 5_000  # of one key
SAMPLERS_A_DAY = 100_000  # of one key: more than one a second
SESSION_BYTES = 2**16  # of what a session is called and described by
LOSSES, LOSS_BYTES = 10_000, 2**24  # of one owner, in sessions that are not over; each new one reads what is there
_DAY_SECONDS = 86400.0


def create_session(conn: sa.Connection, session: records.Session, *, is_keys: bool) -> None:
    """Adds a session under a new id. Raises TooLargeError, and LimitError for one too many a day.

    Only of a key's (`is_keys`) there can be too many: where none is needed, all clients are one owner.
    """
    described = [session.tags, session.user_metadata, session.sdk_version, session.project_id, session.display_name]
    if (size := len(json.dumps(described))) > SESSION_BYTES:
        raise TooLargeError(f"tags, metadata and names of the session take {size} bytes; allowed: {SESSION_BYTES}")
    if is_keys and _made_within_a_day(conn, sessions, session.owner, SESSIONS_A_DAY):
        raise LimitError(
            f"this key has created {SESSIONS_A_DAY} sessions within a day, as many as it may; use one for more "
            "(a ServiceClient is a session, and may have any number of training and sampling clients)"
        )
    records.create_session(conn, session)


def create_sampler(conn: sa.Connection, sampler: records.SamplerRecord, *, is_keys: bool) -> records.SamplerRecord:
    """Adds a sampler; the same id again returns the one that exists, unchanged. LimitError for one too many a day.

    Those that a model's saves make count, but are never refused: each has cost its owner an operation.
    """
    if known := records.find_sampler(conn, sampler.id):
        return known
    if is_keys and _made_within_a_day(conn, samplers, sampler.owner, SAMPLERS_A_DAY):
        raise LimitError(
            f"this key has made {SAMPLERS_A_DAY} samplers within a day, as many as it may; use one for more samples "
            "(a SamplingClient is a sampler, which takes any number of requests)"
        )
    return records.create_sampler(conn, sampler)


def _made_within_a_day(conn: sa.Connection, table: sa.Table, owner: str, number: int) -> bool:
    """Whether the owner has made so many rows of a table since a day ago."""
    recent = sa.select(sa.literal(1)).where(table.c.owner == owner, table.c.created_at > time.time() - _DAY_SECONDS)
    return conn.execute(recent.offset(number - 1).limit(1)).first() is not None


def check_losses(conn: sa.Connection, owner: str, program: dict[str, Any]) -> None:
    """Raises LimitError if an owner's custom losses are too many, or too large, with one more."""
    sizes = sa.func.coalesce(sa.func.sum(sa.func.length(sa.cast(custom_losses.c.program, sa.Text))), 0)
    number, size = conn.execute(sa.select(sa.func.count(), sizes).where(custom_losses.c.owner == owner)).one()
    if number >= LOSSES or size + len(json.dumps(program)) > LOSS_BYTES:
        raise LimitError(
            f"this key has {number} custom losses of {size} bytes, of at most {LOSSES} and {LOSS_BYTES} bytes; they go "
            "with their sessions: finish some (ServiceClient.close)"
        )
