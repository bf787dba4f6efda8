"""Samplers and requests to sample from them."""

import time
from dataclasses import replace

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.bodies import compute, decode_json
from tinsmith.api.calls import Call, answer
from tinsmith.api.catalog import Catalog
from tinsmith.api.paths import SCHEME, parse_path
from tinsmith.api.submission import require_open_session
from tinsmith.api.weights import check_base
from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.protocols import BASE_SNAPSHOT
from tinsmith.store import queue, quotas, records
from tinsmith.wire import sampling_types, service_types, training_types
from tinsmith.wire.codec import Limits
from tinsmith.wire.jobs import GONE_SNAPSHOT, Job
from tinsmith.wire.sample_codec import sample_call, sample_cost
from tinsmith.wire.sampling_types import SampleRequest


async def create_sampling_session(call: Call) -> Response:
    """POST /create_sampling_session: a sampler of the base model, or of a checkpoint."""
    body = await call.json(sampling_types.CreateSamplingSessionRequest)
    catalog = call.services.catalog
    snapshot, model_id = BASE_SNAPSHOT, None
    if body.model_path is not None:
        checkpoint = await _require_weights(call, body.model_path, body.base_model)
        snapshot, model_id, base = checkpoint.path, checkpoint.model_id, checkpoint.base
        base_name = body.base_model or checkpoint.base_name
    elif body.base_model is not None:
        base, base_name = catalog.require(body.base_model).base, body.base_model
    else:
        raise UserError("create_sampling_session needs a base_model or a model_path")
    sampler = records.SamplerRecord(
        id=f"{body.session_id}:sample:{body.sampling_session_seq_id}",
        session_id=body.session_id,
        owner=call.owner,
        base=base,
        base_name=base_name,
        snapshot=snapshot,
        model_id=model_id,
        created_at=time.time(),
    )
    await call.services.database.write_async(_create_sampler, sampler, call.caller.has_key)
    return answer(sampling_types.CreateSamplingSessionResponse(sampler.id))


async def _require_weights(call: Call, text: str, base_model: str | None) -> records.Checkpoint:
    """The checkpoint to sample from, of the base model if one is named. Raises UserError, NotFoundError."""
    path = parse_path(text)
    checkpoint = await call.services.database.read_async(records.require_checkpoint, str(path), call.owner)
    check_base(call, checkpoint, base_model)
    return checkpoint


def _create_sampler(conn: sa.Connection, sampler: records.SamplerRecord, is_keys: bool) -> None:
    require_open_session(conn, sampler.session_id, sampler.owner)
    existing = quotas.create_sampler(conn, sampler, is_keys=is_keys)
    if existing.snapshot != sampler.snapshot:
        raise UserError(
            f"sampler {sampler.id!r} exists already, with other weights; use the next sampling_session_seq_id"
        )


async def asample(call: Call) -> Response:
    """POST /asample. Sequences are named before they exist: later training requests refer to them."""
    services = call.services
    content = await call.content(services.settings.max_body_bytes)
    request = await compute(len(content), decode_json, content, SampleRequest)
    limits = services.limits(await services.base_of(request.sampling_session_id, call.owner))
    job = await compute(len(content), _job, request, limits, call)
    await call.admit(job.subject, job.seq, len(job.body), job.tokens, ordered=False)
    request_id = await services.database.write_async(_submit, services.catalog, job)
    services.doorbell.ring("jobs")
    call.accepted(request_id)
    sequence_ids = [f"{request_id}-{index}" for index in range(request.num_samples)]
    return answer(training_types.SampleFuture(request_id, sequence_ids))


def _job(request: SampleRequest, limits: Limits, call: Call) -> Job:
    """The job as far as the request says it: the base is the sampler's."""
    packed = sample_call(request, limits)
    tokens = sample_cost(packed, limits.max_context)
    subject, seq = request.sampling_session_id, request.seq_id
    return Job(subject, seq, "sample", call.owner, "", packed.to_bytes(), tokens, call.trace)


def _submit(conn: sa.Connection, catalog: Catalog, job: Job) -> str:
    sampler = records.require_sampler(conn, job.subject, job.owner)
    catalog.require_base(sampler.base, f"sampler {sampler.id!r}")
    if sampler.snapshot == GONE_SNAPSHOT:
        raise GoneError(
            f"the weights of sampler {sampler.id!r} were deleted: they had no name, their model has saved newer ones, "
            "and nobody had sampled from them for long. Give a name to what you want to keep: "
            "save_weights_for_sampler(name=...)"
        )
    return queue.submit(conn, replace(job, base=sampler.base))


async def cancel_future(call: Call) -> Response:
    """POST /cancel_future: the client no longer waits for a sample. One that has ended keeps its result."""
    body = await call.json(service_types.CancelFutureRequest)
    services = call.services
    given_up = await services.database.write_async(_give_up, body.request_id, call.owner)
    if given_up:
        services.doorbell.ring("jobs", given_up)
        services.doorbell.ring("done", given_up)
    return answer({})


def _give_up(conn: sa.Connection, request_id: str, owner: str) -> list[str]:
    future = queue.find(conn, request_id)
    if future is None or future.owner != owner:
        raise NotFoundError(f"there is no request {request_id!r}")
    if future.kind != "sample":
        raise UserError(f"{request_id!r} is a {future.kind}; only samples can be cancelled")
    subject, _, seq = future.request_id.rpartition(":")
    return queue.give_up(conn, subject, int(seq))


async def get_sampler(call: Call) -> Response:
    """GET /samplers/{sampler_id}."""
    sampler = await call.services.database.read_async(records.require_sampler, call.path("sampler_id"), call.viewer)
    path = sampler.snapshot if sampler.snapshot.startswith(SCHEME) else None
    return answer(sampling_types.SamplerInfo(sampler.id, sampler.base_name, path))
