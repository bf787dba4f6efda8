"""Random keys that the server signs with: one for each purpose, shared by all its processes through the database."""

import secrets

import sqlalchemy as sa

from tinsmith.store.tables import insert, server_secrets

_BYTES = 32


def require_secret(conn: sa.Connection, name: str) -> bytes:
    """The secret for this purpose; whoever asks first makes it. Writes, so it needs a write transaction."""
    statement = insert(conn, server_secrets).values(name=name, value=secrets.token_bytes(_BYTES))
    conn.execute(statement.on_conflict_do_nothing(index_elements=["name"]))
    value: bytes = conn.execute(sa.select(server_secrets.c.value).where(server_secrets.c.name == name)).scalar_one()
    return bytes(value)
