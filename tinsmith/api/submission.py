"""How a training request enters the queue: accepted once, or refused with its place in the order marked as used.

Clients count on: the same (model, seq) again gives the same request id, whatever has changed meanwhile; and a refused
request's seq is consumed, so that the requests behind it do not wait for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.bodies import SMALL_BODY, decode_json
from tinsmith.api.calls import Call, answer
from tinsmith.errors import GoneError, UserError
from tinsmith.store import queue, records
from tinsmith.wire.codec import Address
from tinsmith.wire.jobs import Job
from tinsmith.wire.training_types import Addressed, TrainingRequest, UntypedFuture

Body = TypeVar("Body", bound=TrainingRequest)

_USE_SECONDS = 30.0  # how exactly a model's last use is noted


@dataclass(frozen=True, slots=True)
class Draft:
    """A job as far as its request says it; model, seq and owner are added on acceptance."""

    kind: str
    body: bytes
    tokens: int = 0


Prepare = Callable[[sa.Connection, records.Model], Draft]
"""Makes the draft, inside the transaction that submits it; may check and create records. Raises UserError."""


async def submit(call: Call, address: Address, prepare: Prepare) -> Response:
    """Accepts a request for a model of the caller's, and answers with its future. Raises UserError."""
    services = call.services
    request_id = await services.database.write_async(_accept, call, address, prepare)
    services.doorbell.ring("jobs")
    call.accepted(request_id)
    return answer(UntypedFuture(request_id, address.model_id))


async def refuse(call: Call, kind: str, address: Address | None, refusal: UserError) -> Response:
    """Marks the request's seq as used and raises `refusal`; a request that was accepted before keeps its future."""
    if address is None:
        raise refusal
    services = call.services
    accepted = await services.database.write_async(_reject, call, kind, address, str(refusal))
    services.doorbell.ring("jobs")
    if not accepted:
        raise refusal
    return answer(UntypedFuture(f"{address.model_id}:{address.seq}", address.model_id))


async def submit_json(
    call: Call, kind: str, body_type: type[Body], prepare: Callable[[Body, sa.Connection, records.Model], Draft]
) -> Response:
    """Reads, checks and submits a training request whose body is JSON."""
    content = b""
    try:
        content = await call.content(SMALL_BODY)
        body = decode_json(content, body_type)
        await call.admit(body.model_id, body.seq_id, len(content))
        return await submit(call, Address(body.model_id, body.seq_id), partial(prepare, body))
    except UserError as refusal:
        return await refuse(call, kind, json_address(content), refusal)


def json_address(content: bytes) -> Address | None:
    """The place of a JSON request in its model's order, if that much of it can be read."""
    try:
        addressed = decode_json(content, Addressed)
    except UserError:
        return None
    return Address(addressed.model_id, addressed.seq_id)


def json_draft(kind: str, /, **fields: object) -> Draft:
    return Draft(kind, msgspec.json.encode(fields))


def require_open_session(conn: sa.Connection, session_id: str, owner: str) -> None:
    """Raises NotFoundError, or GoneError for a finished session."""
    session = records.require_session(conn, session_id, owner)
    if session.state != "open":
        raise GoneError(f"session {session_id!r} is finished ({session.finish_reason}); create a new one")


def _accept(conn: sa.Connection, call: Call, address: Address, prepare: Prepare) -> str:
    model = records.require_model(conn, address.model_id, call.owner)
    call.services.catalog.require_base(model.base, f"model {model.id!r}")
    _check_usable(model)
    draft = prepare(conn, model)
    now = time.time()
    if now - model.used_at > _USE_SECONDS:
        records.update_model(conn, model.id, used_at=now)
    job = Job(model.id, address.seq, draft.kind, call.owner, model.base, draft.body, draft.tokens, call.trace)
    return queue.submit(conn, job)


def _check_usable(model: records.Model) -> None:
    if model.state == "failed":
        raise UserError(f"model {model.id!r} could not be created, so nothing can be done with it; create another one")
    if model.state == "closed":
        raise GoneError(f"model {model.id!r} ended with its session; go on from a checkpoint of it, in a new session")


def _reject(conn: sa.Connection, call: Call, kind: str, address: Address, error: str) -> bool:
    """Whether the request had been accepted earlier. Somebody else's model is left alone."""
    model = records.find_model(conn, address.model_id)
    if model is None or model.owner != call.owner:
        return False
    earlier = queue.find(conn, f"{model.id}:{address.seq}")
    if earlier is None:
        queue.reject(conn, Job(model.id, address.seq, kind, call.owner, model.base, b"", trace=call.trace), error)
    return earlier is not None and earlier.state != "failed"
