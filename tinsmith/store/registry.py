"""The base models that a server knows by name: where their files are, and how they are to be served.

Functions take a connection inside a transaction.
"""

from dataclasses import asdict, dataclass

import sqlalchemy as sa

from tinsmith.errors import NotFoundError, UserError
from tinsmith.store.tables import base_models, checkpoints, insert


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """One base model. `base` is its key in every other record, `folder` is on the server's machine."""

    name: str
    base: str
    folder: str
    dtype: str
    max_context: int
    trust_remote_code: bool
    architecture: str
    parameters: int
    created_at: float


def register(conn: sa.Connection, model: RegisteredModel) -> None:
    """Adds a model. Raises UserError if its name or the model itself is registered already."""
    for other in list_registered(conn):
        if model.name == other.name or model.base == other.base:
            raise UserError(
                f"{other.base} is registered already, as {other.name!r}; remove that first (tinsmith models remove "
                f"{other.name})"
            )
    statement = insert(conn, base_models).values(asdict(model)).on_conflict_do_nothing()
    if not conn.execute(statement).rowcount:
        raise UserError(f"{model.name!r} or {model.base} is being registered by somebody else; look again")


def list_registered(conn: sa.Connection) -> list[RegisteredModel]:
    """In the order in which they were added."""
    rows = conn.execute(sa.select(base_models).order_by(base_models.c.created_at, base_models.c.name)).mappings()
    return [RegisteredModel(**row) for row in rows]


def count_checkpoints(conn: sa.Connection, base: str) -> int:
    """How many checkpoints can be used only while this base model is served."""
    counted = sa.select(sa.func.count()).select_from(checkpoints).where(checkpoints.c.base == base)
    return conn.scalar(counted) or 0


def unregister(conn: sa.Connection, name: str, *, force: bool) -> RegisteredModel:
    """Forgets a model, and returns what was known of it. Its files and checkpoints stay.

    Raises NotFoundError, and UserError if checkpoints depend on it and `force` is false.
    """
    model = next((model for model in list_registered(conn) if model.name == name), None)
    if model is None:
        raise NotFoundError(f"no model {name!r} is registered; see tinsmith models list")
    depending = count_checkpoints(conn, model.base)
    if depending and not force:
        raise UserError(
            f"{depending} checkpoints were trained on {name!r} and can be used only while it is served; delete them, "
            "or remove it with --force (they stay, and can be used again once it is added again from the same place)"
        )
    conn.execute(sa.delete(base_models).where(base_models.c.name == name))
    return model
