"""The operations on a model: create it, forward and backward, optimizer steps, and what it is."""

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.bodies import OverlongBodyError, compute, plain, read_raw
from tinsmith.api.calls import Call, answer
from tinsmith.api.submission import Draft, json_draft, refuse, require_open_session, submit, submit_json
from tinsmith.errors import LimitError, UserError
from tinsmith.protocols import Capabilities, ModelSpec
from tinsmith.store import queue, records, retention
from tinsmith.store.custom_losses import require_custom_loss
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire import training_types, types
from tinsmith.wire.codec import (
    Address,
    Limits,
    decompress_beginning,
    parse_forward_backward,
    peek_address,
    train_call,
)
from tinsmith.wire.custom_codec import custom_call, loss_id
from tinsmith.wire.jobs import Job

OPTIMIZER = "adamw"
_ADDRESS_BYTES = 1024  # of the beginning, which hold model and seq


async def create_model(call: Call) -> Response:
    """POST /create_model: a record and, as its seq 0, the job that makes it."""
    body = await call.json(training_types.CreateModelRequest)
    services = call.services
    base = services.catalog.require(body.base_model).base
    check_optimizer(body.optimizer_config)
    spec = _spec(body.lora_config, services.catalog.capabilities(base))
    named = (base, body.base_model)
    model = new_model(call, body.session_id, body.model_seq_id, named, spec=spec, metadata=body.user_metadata)
    draft = json_draft("create_model")
    most = call.caller.max_models
    request_id = await services.database.write_async(create_with_job, model, draft, most, call.trace)
    services.doorbell.ring("jobs")
    call.accepted(request_id)
    return answer(training_types.UntypedFuture(request_id, model.id))


def new_model(
    call: Call,
    session_id: str,
    number: int,
    base: tuple[str, str],
    *,
    spec: ModelSpec,
    metadata: types.Metadata | None,
) -> records.Model:
    """The record of a model that is about to be created. `base` is its base model's key, and what the client says.

    Raises UserError for metadata that asks for what cannot be.
    """
    retention.wanted(metadata or {}, 0)
    now = time.time()
    return records.Model(
        id=f"{session_id}:train:{number}",
        session_id=session_id,
        owner=call.owner,
        base=base[0],
        base_name=base[1],
        spec=spec.to_dict(),
        user_metadata=metadata or {},
        state="creating",
        recovery_seq=None,
        recovery_folder=None,
        created_at=now,
        used_at=now,
    )


def create_with_job(conn: sa.Connection, model: records.Model, draft: Draft, most: int | None, trace: str) -> str:
    """Adds the model and its first job, or finds both; returns the request id.

    `most` is how many models its owner may have open, this one included. Raises NotFoundError, GoneError, LimitError.
    """
    require_open_session(conn, model.session_id, model.owner)
    if most is not None and records.find_model(conn, model.id) is None:
        _check_number(records.open_models(conn, model.owner), most)
    records.create_model(conn, model)
    return queue.submit(conn, Job(model.id, 0, draft.kind, model.owner, model.base, draft.body, trace=trace))


def _check_number(models: Sequence[records.Model], most: int) -> None:
    if len(models) >= most:
        sessions = list(dict.fromkeys(model.session_id for model in models))
        raise LimitError(
            f"this key has {len(models)} open models of at most {most}, in {len(sessions)} sessions "
            f"({', '.join(sessions[:3])}{', …' if len(sessions) > 3 else ''}); finishing a session closes its models "
            f"(ServiceClient.close, or POST /api/v1/sessions/{sessions[0]}/finish)"
        )


def check_optimizer(config: training_types.OptimizerConfig | None) -> None:
    if config is not None and config.type != OPTIMIZER:
        raise UserError(f"optimizer {config.type!r} is not supported; this server trains with {OPTIMIZER!r}")


def _spec(lora: training_types.LoraConfig | None, capabilities: Capabilities) -> ModelSpec:
    """What the request asks for; without a LoRA configuration, or at rank 0, a full-parameter model."""
    if lora is None:
        return ModelSpec(rank=0, seed=secrets.randbits(63))
    if lora.rank > capabilities.max_lora_rank:
        raise UserError(
            f"lora rank is {lora.rank}; 1 to {capabilities.max_lora_rank} are allowed "
            "(tinsmith serve --max-lora-rank), or 0 to train all parameters"
        )
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise UserError("lora_config trains nothing; one of train_attn, train_mlp, train_unembed must be true")
    if lora.rank == 0 and not (lora.train_attn and lora.train_mlp and lora.train_unembed):
        raise UserError(
            "rank 0 trains all parameters, with train_attn, train_mlp and train_unembed true; "
            "only an adapter (rank 1 and more) can leave parts out"
        )
    seed = secrets.randbits(63) if lora.seed is None else lora.seed
    return ModelSpec(lora.rank, seed, lora.train_attn, lora.train_mlp, lora.train_unembed)


async def get_info(call: Call) -> Response:
    """POST /get_info."""
    body = await call.json(training_types.GetInfoRequest)
    services = call.services
    model = await services.database.read_async(records.require_model, body.model_id, call.viewer)
    spec = ModelSpec(**model.spec)
    catalog = services.catalog
    catalog.find_base(model.base, f"model {model.id!r}")
    architecture, tokenizer = catalog.capabilities(model.base).architecture, catalog.tokenizer(model.base)
    data = training_types.ModelData(architecture, model.base_name, tokenizer)
    return answer(
        training_types.GetInfoResponse(
            model_id=model.id,
            model_data=data,
            is_lora=spec.is_lora,
            lora_rank=spec.rank if spec.is_lora else None,
            model_name=model.base_name,
            optimizer_config=training_types.OptimizerConfig(spec.optimizer),
        )
    )


async def forward_backward(call: Call) -> Response:
    """POST /forward_backward: protobuf, perhaps zstd; with forward_only it is a forward."""
    limit = call.services.settings.max_body_bytes
    raw = b""
    try:
        raw = await read_raw(call.request, limit)
        address, draft = await _decoded(call, partial(plain, call.request, raw, limit), len(raw))
        await call.admit(address.model_id, address.seq, len(draft.body), draft.tokens)
        return await submit(call, address, lambda _conn, _model: draft)
    except UserError as refusal:
        beginning = refusal.beginning if isinstance(refusal, OverlongBodyError) else raw
        return await refuse(call, "forward_backward", _address(call, beginning), refusal)


def _address(call: Call, beginning: bytes) -> Address | None:
    """Model and seq of a request that cannot be taken, if its beginning tells them."""
    if call.request.headers.get("content-encoding", "").lower() == "zstd":
        beginning = decompress_beginning(beginning, _ADDRESS_BYTES)
    return peek_address(beginning[:_ADDRESS_BYTES])


async def _decoded(call: Call, content: partial[bytes], size: int) -> tuple[Address, Draft]:
    services = call.services
    message = await compute(size, _message, content)
    limits = services.limits(await services.base_of(message.model_id, call.owner))
    program = None
    if (loss := loss_id(message)) is not None:
        program = await services.database.read_async(require_custom_loss, loss, call.owner)
    return Address(message.model_id, message.seq_id), await compute(size, _draft, message, limits, program)


def _message(content: partial[bytes]) -> pb.ForwardBackwardRequest:
    message = parse_forward_backward(content())
    if message.seq_id < 1:
        raise UserError(f"seq_id is {message.seq_id}; a model's requests count from 1")
    return message


def _draft(message: pb.ForwardBackwardRequest, limits: Limits, program: dict[str, Any] | None) -> Draft:
    packed = train_call(message, limits) if program is None else custom_call(message, limits, program)
    kind = "forward" if packed.forward_only else "forward_backward"
    return Draft(kind, packed.to_bytes(), packed.num_tokens)


async def optim_step(call: Call) -> Response:
    """POST /optim_step."""
    return await submit_json(call, "optim_step", training_types.OptimStepRequest, _prepare_step)


def _prepare_step(body: training_types.OptimStepRequest, conn: sa.Connection, model: records.Model) -> Draft:
    check_optimizer(body.optimizer_params)
    if body.adam_params is None:
        raise UserError("optim_step needs adam_params")
    return Draft("optim_step", msgspec.json.encode(body.adam_params))
