"""Unnamed snapshots that nobody samples from any more: which they are, and that they are gone.

A sampler that was made without a name holds weights on disk for as long as its session lasts. One that its model has
superseded by a newer one, and that has not been asked for anything in a long time, is not worth that. Functions take a
connection; the files are the caller's to remove, also those of snapshots that were released before.
"""

import sqlalchemy as sa

from tinsmith.store.queue import OPEN
from tinsmith.store.records import LIVING
from tinsmith.store.tables import jobs, models, samplers
from tinsmith.wire.jobs import GONE_SNAPSHOT

AT_ONCE = 10  # released in one transaction; whoever removes their files does nothing else meanwhile

Released = list[tuple[str, str]]
"""(Sampler, which its snapshot was called after; the model that it came from)."""

_MODELS = sa.select(models.c.id).where(models.c.base == sa.bindparam("of_base"), LIVING)
_newer = samplers.alias("newer")
# Spelt out: only then do the databases use the partial index.
_IS_THERE, _NEWER_IS_THERE = sa.text("samplers.snapshot != 'gone'"), sa.text("newer.snapshot != 'gone'")


def release_superseded(conn: sa.Connection, base: str, unused_since: float) -> Released:
    """Marks those as gone, some at a time, that were superseded, and neither written nor asked for since that time.

    By one that was written: a save that waits still, or has failed, leaves the older ones as they are. What is shared
    by all inflight samplers of a model is never superseded, only replaced.
    """
    superseded = _superseded(unused_since)
    released = [(sampler_id, model_id) for sampler_id, model_id in conn.execute(superseded, {"of_base": base})]
    are_released = samplers.c.id.in_([sampler_id for sampler_id, _ in released])
    conn.execute(sa.update(samplers).where(are_released).values(snapshot=GONE_SNAPSHOT))
    return released


def _superseded(unused_since: float) -> sa.Select[str, str]:
    is_unnamed = (_newer.c.snapshot == _newer.c.id) | _newer.c.snapshot.endswith(":inflight", autoescape=True)
    has_newer = (
        sa.exists()
        .where(_newer.c.model_id == samplers.c.model_id, _newer.c.created_at > samplers.c.created_at)
        .where(_NEWER_IS_THERE, is_unnamed, _newer.c.written_at.is_not(None))
    )
    is_used = (
        sa.exists()
        .where(jobs.c.subject == samplers.c.id)
        .where(OPEN | (jobs.c.created_at >= unused_since) | (jobs.c.finished_at >= unused_since))
    )
    is_fresh = samplers.c.written_at >= unused_since  # its save may have waited for long
    return (
        sa.select(samplers.c.id, samplers.c.model_id)
        .where(samplers.c.model_id.in_(_MODELS), samplers.c.created_at < unused_since)
        .where(samplers.c.written_at.is_(None) | ~is_fresh)
        .where(_IS_THERE, samplers.c.snapshot == samplers.c.id, has_newer, ~is_used)
        .order_by(samplers.c.created_at)
        .limit(AT_ONCE)
    )


def released(conn: sa.Connection, base: str) -> Released:
    """All that are gone, of models that are not: files of theirs may still be there."""
    gone = sa.select(samplers.c.id, samplers.c.model_id).where(
        samplers.c.snapshot == GONE_SNAPSHOT, samplers.c.model_id.in_(_MODELS)
    )
    return [(sampler_id, model_id) for sampler_id, model_id in conn.execute(gone, {"of_base": base})]
