"""JSON bodies about models, their training, their weights, and the runs and checkpoints that come of it."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from tinsmith.wire.types import (
    BelowOne,
    Count,
    Epsilon,
    Id,
    Labels,
    Metadata,
    NotNegative,
    Request,
    Response,
    Seed,
    Seq,
    Text,
    Ttl,
    check_nesting,
)


class LoraConfig(Request):
    rank: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Struct):
    """Only `type` is ours to read: other families have fields of their own."""

    type: Text = "adamw"


class CreateModelRequest(Request):
    session_id: Id
    model_seq_id: Count
    base_model: Id
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = msgspec.field(default_factory=OptimizerConfig)
    type: Literal["create_model"] = "create_model"

    def __post_init__(self) -> None:
        check_nesting(self.user_metadata)


class UntypedFuture(Response):
    """What every submission is answered with."""

    request_id: str
    model_id: str


class SampleFuture(Response):
    request_id: str
    sample_sequence_ids: list[str]


class GetInfoRequest(Request):
    model_id: Id
    type: Literal["get_info"] = "get_info"


class ModelData(Response):
    arch: str
    model_name: str
    tokenizer_id: str


class GetInfoResponse(Response):
    model_id: str
    model_data: ModelData
    is_lora: bool
    lora_rank: int | None
    model_name: str
    optimizer_config: OptimizerConfig
    type: Literal["get_info"] = "get_info"


class Addressed(Struct):
    """The two fields that say where a training request belongs, whatever else is wrong with it."""

    model_id: Id
    seq_id: Seq


class TrainingRequest(Request, kw_only=True):
    """A request in the order of one model's operations."""

    model_id: Id
    seq_id: Seq


class AdamParams(Request):
    learning_rate: NotNegative = 1e-4
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: Epsilon = 1e-12
    weight_decay: NotNegative = 0.0
    grad_clip_norm: NotNegative = 0.0


class OptimStepRequest(TrainingRequest):
    adam_params: AdamParams | None = None
    optimizer_params: OptimizerConfig | None = None
    type: Literal["optim_step"] = "optim_step"


class SaveWeightsRequest(TrainingRequest):
    path: str | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Labels | None = None
    type: Literal["save_weights"] = "save_weights"


class LoadWeightsRequest(Request, kw_only=True):
    """Into an existing model (model_id, seq_id), or as the first request of a new one (session_id, model_seq_id)."""

    path: Id
    optimizer: bool
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Count | None = None
    base_model: Id | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"

    def __post_init__(self) -> None:
        check_nesting(self.user_metadata)


class SaveWeightsForSamplerRequest(TrainingRequest):
    path: str | None = None
    sampling_session_seq_id: Count | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Labels | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternalRequest(TrainingRequest):
    path: str
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class ExternalWeightsUrls(Response):
    """Where each file of an export can be fetched until `expires`."""

    urls: dict[str, str]
    expires: str


class ExternalWeightsUploadStartRequest(Request):
    base_model: Id
    lora_config: LoraConfig
    destination_project_id: Id | None = None
    type: str | None = None


class ExternalWeightsUploadStarted(Response):
    """Where each file of an adapter is to be PUT until `expires`."""

    upload_id: str
    urls: dict[str, str]
    expires: str


class ExternalWeightsUploadFinishRequest(Request):
    upload_id: Id
    type: str | None = None


class ExternalWeightsUploadFinished(Response):
    tinker_path: str


class Cursor(Response):
    offset: int
    limit: int
    total_count: int


class CheckpointInfo(Response):
    checkpoint_id: str
    checkpoint_type: str
    time: str
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: Labels
    expires_at: str | None


class CheckpointList(Response):
    checkpoints: list[CheckpointInfo]
    cursor: Cursor


class TrainingRun(Response):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    lora_rank: int | None
    corrupted: bool
    last_request_time: str
    last_checkpoint: CheckpointInfo | None
    last_sampler_checkpoint: CheckpointInfo | None
    user_metadata: Labels


class TrainingRunList(Response):
    training_runs: list[TrainingRun]
    cursor: Cursor


class TtlRequest(Request):
    ttl_seconds: Ttl | None


class WeightsInfoRequest(Request):
    tinker_path: Id


class WeightsInfo(Response):
    base_model: str
    is_lora: bool
    lora_rank: int | None
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    optimizer_config: OptimizerConfig
