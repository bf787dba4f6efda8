"""Custom losses: graphs of allowed operations, checked and kept here, computed by the trainer."""

from typing import Any

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.bodies import SMALL_BODY
from tinsmith.api.calls import Call, answer
from tinsmith.api.submission import require_open_session
from tinsmith.store import custom_losses
from tinsmith.wire.custom_loss import CreateCustomLossRequest, LossFuture, checked_program


async def create_custom_loss(call: Call) -> Response:
    """POST /create_custom_loss: keeps a graph, if all of its operations are allowed; its id is the future's result."""
    body = await call.json(CreateCustomLossRequest, SMALL_BODY)
    program = checked_program(body)
    request_id = await call.services.database.write_async(
        _create, body.session_id, call.owner, body.custom_loss_seq_id, program
    )
    return answer(LossFuture(request_id))


def _create(conn: sa.Connection, session_id: str, owner: str, number: int, program: dict[str, Any]) -> str:
    require_open_session(conn, session_id, owner)
    return custom_losses.create_custom_loss(conn, session_id, owner, number, program)
