"""Saving and loading a model's weights, and what a checkpoint holds. The files are the engine's business."""

import time
from functools import partial

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.age import read_recipients
from tinsmith.api.bodies import SMALL_BODY, decode_json
from tinsmith.api.calls import Call, answer
from tinsmith.api.paths import CheckpointPath, check_name, parse_path
from tinsmith.api.submission import Draft, json_address, json_draft, refuse, submit, submit_json
from tinsmith.api.training import check_optimizer, create_with_job, new_model
from tinsmith.errors import UserError
from tinsmith.protocols import ModelSpec
from tinsmith.store import queue, records
from tinsmith.wire import training_types
from tinsmith.wire.codec import Address


async def save_weights(call: Call) -> Response:
    """POST /save_weights: weights and optimizer state, to go on training from."""
    return await submit_json(call, "save_weights", training_types.SaveWeightsRequest, _prepare_save)


def _prepare_save(body: training_types.SaveWeightsRequest, conn: sa.Connection, model: records.Model) -> Draft:
    path = _new_path(conn, model, "training", body.path or f"{body.seq_id:06d}", overwrite=body.overwrite)
    return json_draft(
        "save_weights",
        name=path.name,
        path=str(path),
        ttl_seconds=body.ttl_seconds,
        overwrite=body.overwrite,
        user_metadata=body.user_metadata,
    )


def _new_path(
    conn: sa.Connection, model: records.Model, kind: str, name: str, *, overwrite: bool = False
) -> CheckpointPath:
    """Where a checkpoint will be. Raises UserError if the name is not allowed, or taken."""
    path = CheckpointPath(model.id, kind, check_name(name))
    if not overwrite and records.find_checkpoint(conn, str(path)) is not None:
        hint = ", delete it, or save with overwrite=true" if kind == "training" else " or delete it"
        raise UserError(f"{path} exists already; choose another name{hint}")
    return path


async def save_weights_for_sampler(call: Call) -> Response:
    """POST /save_weights_for_sampler: a named checkpoint, or an unnamed snapshot with a sampler of its own."""
    return await submit_json(
        call, "save_weights_for_sampler", training_types.SaveWeightsForSamplerRequest, _prepare_snapshot
    )


def _prepare_snapshot(
    body: training_types.SaveWeightsForSamplerRequest, conn: sa.Connection, model: records.Model
) -> Draft:
    number = body.sampling_session_seq_id
    if number is not None and body.path is not None:
        raise UserError(f"path {body.path!r} and sampling_session_seq_id {number} exclude each other; give one of them")
    if number is None and body.path is None:
        raise UserError("save_weights_for_sampler needs a path (a name) or a sampling_session_seq_id")
    path, sampler_id = None, None
    if number is None:
        path = _new_path(conn, model, "sampler", body.path or "")
    else:
        sampler_id = _new_sampler(conn, model, number, body.seq_id)
    return json_draft(
        "save_weights_for_sampler",
        name=path.name if path else None,
        path=str(path) if path else None,
        sampler_id=sampler_id,
        kind=body.kind,
        ttl_seconds=body.ttl_seconds,
        user_metadata=body.user_metadata,
    )


def _new_sampler(conn: sa.Connection, model: records.Model, number: int, seq: int) -> str:
    """The id of a sampler on the snapshot that is about to be made, which is called as the sampler is."""
    sampler_id = f"{model.session_id}:sample:{number}"
    is_retry = queue.find(conn, f"{model.id}:{seq}") is not None
    if records.find_sampler(conn, sampler_id) is not None and not is_retry:
        raise UserError(f"sampling_session_seq_id {number} is taken by another sampler of session {model.session_id!r}")
    sampler = records.SamplerRecord(
        id=sampler_id,
        session_id=model.session_id,
        owner=model.owner,
        base=model.base,
        base_name=model.base_name,
        snapshot=sampler_id,
        model_id=model.id,
        created_at=time.time(),
    )
    return records.create_sampler(conn, sampler).id


async def save_weights_external(call: Call) -> Response:
    """POST /save_weights_external: weights in the form that other software reads."""
    return await submit_json(call, "save_weights_external", training_types.SaveWeightsExternalRequest, _prepare_export)


def _prepare_export(
    body: training_types.SaveWeightsExternalRequest, conn: sa.Connection, model: records.Model
) -> Draft:
    read_recipients(body.age_encryption_recipients or [])
    path = _new_path(conn, model, "external", body.path)
    return json_draft(
        "save_weights_external",
        name=path.name,
        path=str(path),
        ttl_seconds=body.ttl_seconds,
        age_encryption_recipients=body.age_encryption_recipients,
    )


async def load_weights(call: Call) -> Response:
    """POST /load_weights: into an existing model, or as the beginning of a new one."""
    content = await call.content(SMALL_BODY)
    try:
        body = decode_json(content, training_types.LoadWeightsRequest)
        _check_load(body)
        if body.session_id is not None and body.model_seq_id is not None:
            return await _load_into_new(call, body, body.session_id, body.model_seq_id)
        if body.model_id is not None and body.seq_id is not None:
            reader = await call.reader(body.weights_access_token)
            return await submit(call, Address(body.model_id, body.seq_id), partial(_prepare_load, body, reader))
        raise UserError("load_weights needs model_id and seq_id, or session_id and model_seq_id (for a new model)")
    except UserError as refusal:
        return await refuse(call, "load_weights", json_address(content), refusal)


def _check_load(body: training_types.LoadWeightsRequest) -> None:
    path = parse_path(body.path)
    if body.model_id is not None and body.session_id is not None:
        raise UserError(f"model_id {body.model_id!r} and session_id {body.session_id!r} exclude each other; give one")
    if path.kind != "training" and body.optimizer:
        raise UserError(f"{path} holds no optimizer state to train on from; load a checkpoint of .../weights/NAME")
    check_optimizer(body.optimizer_config)


def _prepare_load(
    body: training_types.LoadWeightsRequest, reader: str, conn: sa.Connection, model: records.Model
) -> Draft:
    # A checkpoint of the model itself may still be on its way: its save can be queued in front of this request.
    if parse_path(body.path).model_id != model.id:
        checkpoint = records.require_checkpoint(conn, body.path, reader)
        if checkpoint.base != model.base:
            raise UserError(
                f"{body.path} belongs to base model {checkpoint.base_name!r}, and the model that it was to be "
                f"loaded into to {model.base_name!r}; create a model from it instead"
            )
    return json_draft("load_weights", path=body.path, optimizer=body.optimizer, create=False)


async def _load_into_new(call: Call, body: training_types.LoadWeightsRequest, session_id: str, number: int) -> Response:
    services = call.services
    reader = await call.reader(body.weights_access_token)
    checkpoint = await services.database.read_async(records.require_checkpoint, body.path, reader)
    check_base(call, checkpoint, body.base_model)
    model = new_model(
        call,
        session_id,
        number,
        (checkpoint.base, body.base_model or checkpoint.base_name),
        spec=ModelSpec(**checkpoint.spec),
        metadata=body.user_metadata,
    )
    draft = json_draft("load_weights", path=body.path, optimizer=body.optimizer, create=True)
    most = call.caller.max_models
    request_id = await services.database.write_async(create_with_job, model, draft, most, call.trace)
    services.doorbell.ring("jobs")
    call.accepted(request_id)
    return answer(training_types.UntypedFuture(request_id, model.id))


def check_base(call: Call, checkpoint: records.Checkpoint, base_model: str | None) -> None:
    """Raises UserError for a checkpoint of a model that is not served, or of another than the request names."""
    catalog = call.services.catalog
    asked = None if base_model is None else catalog.require(base_model)
    served = catalog.require_base(checkpoint.base, checkpoint.path)
    if asked is not None and asked.base != served.base:
        raise UserError(f"{checkpoint.path} belongs to base model {served.name!r}, not to {base_model!r}")


async def weights_info(call: Call) -> Response:
    """POST /weights_info: what a checkpoint, one's own or a published one, holds."""
    body = await call.json(training_types.WeightsInfoRequest)
    path = str(parse_path(body.tinker_path))
    checkpoint = await call.services.database.read_async(records.require_checkpoint, path, call.viewer)
    spec = ModelSpec(**checkpoint.spec)
    return answer(
        training_types.WeightsInfo(
            base_model=checkpoint.base_name,
            is_lora=spec.is_lora,
            lora_rank=spec.rank if spec.is_lora else None,
            train_unembed=spec.train_unembed,
            train_mlp=spec.train_mlp,
            train_attn=spec.train_attn,
            optimizer_config=training_types.OptimizerConfig(spec.optimizer),
        )
    )
