"""Clients that share one sampler: the first one, which made it, is number 0; every further one joins."""

import sqlalchemy as sa

from tinsmith.store.tables import insert, sampler_clients


def join(conn: sa.Connection, sampler_id: str) -> int:
    """A number, from 1, that no other client of the sampler has or will have."""
    statement = insert(conn, sampler_clients).values(sampler_id=sampler_id, joined=1)
    one_more = {"joined": sampler_clients.c.joined + 1}
    upsert = statement.on_conflict_do_update(index_elements=["sampler_id"], set_=one_more)
    number: int = conn.execute(upsert.returning(sampler_clients.c.joined)).scalar_one()
    return number
