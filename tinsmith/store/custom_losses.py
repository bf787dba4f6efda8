"""Custom losses of a session: checked graphs, under ids that never mean another graph."""

import json
import time
from typing import Any

import sqlalchemy as sa

from tinsmith.errors import NotFoundError, UserError
from tinsmith.store import queue
from tinsmith.store.quotas import check_losses
from tinsmith.store.tables import custom_losses, insert, jobs
from tinsmith.wire.jobs import Job, Outcome

MOST = 1000  # of one session
KIND = "create_custom_loss"


def create_custom_loss(conn: sa.Connection, session_id: str, owner: str, number: int, program: dict[str, Any]) -> str:
    """Keeps a loss and, as a job that has ended already, the answer with its id. Returns the request id.

    The same number again changes nothing. Raises UserError if it is another loss's, or the session has too many, and
    LimitError if its owner has.
    """
    subject = f"{session_id}:loss"
    loss_id = f"{subject}:{number}"
    if number >= MOST:
        raise UserError(f"a session can have {MOST} custom losses; create another one for more")
    known = conn.execute(sa.select(custom_losses.c.id).where(custom_losses.c.id == loss_id)).first()
    if known is None:
        check_losses(conn, owner, program)
    row = {"id": loss_id, "session_id": session_id, "owner": owner, "program": program, "created_at": time.time()}
    conn.execute(insert(conn, custom_losses).values(row).on_conflict_do_nothing(index_elements=["id"]))
    if require_custom_loss(conn, loss_id, owner) != program:
        raise UserError(f"custom loss {number} of session {session_id!r} exists already, and is another one")
    request_id = queue.submit(conn, Job(subject, number, KIND, owner, "", b""))
    job = sa.select(jobs.c.number).where(jobs.c.subject == subject, jobs.c.seq == number)
    body = json.dumps({"loss_id": loss_id, "type": KIND}).encode()
    queue.complete(conn, [Outcome(conn.execute(job).scalar_one(), body)])
    return request_id


def require_custom_loss(conn: sa.Connection, loss_id: str, owner: str) -> dict[str, Any]:
    """The owner's loss. Raises NotFoundError."""
    statement = sa.select(custom_losses.c.program).where(custom_losses.c.id == loss_id, custom_losses.c.owner == owner)
    row = None if "\0" in loss_id else conn.execute(statement).first()
    if row is None:
        raise NotFoundError(f"there is no custom loss {loss_id!r}")
    program: dict[str, Any] = row.program
    return program
