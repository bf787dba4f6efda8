"""Every JSON body of the Tinker API, one definition each: requests with their bounds, responses as the SDK reads them.

Requests refuse fields they do not know; what a single value may be stands in its type. What depends on the served
model or on stored objects is checked elsewhere. forward_backward and results of tensors travel as protobuf: see codec.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

MAX_INT64 = 2**63 - 1
MAX_SEQ = 10**18 - 1
TTL_RANGE = (3600, 10 * 365 * 24 * 3600)

Id = Annotated[str, Meta(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text = Annotated[str, Meta(max_length=2000, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seq = Annotated[int, Meta(ge=1, le=MAX_SEQ)]
Seed = Annotated[int, Meta(ge=0, le=MAX_INT64)]
Ttl = Annotated[int, Meta(ge=TTL_RANGE[0], le=TTL_RANGE[1])]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
Labels = dict[str, str]


Metadata = dict[str, Any]
MAX_NESTING = 16
"""Of lists and objects in a value of metadata: whoever walks through it later must not run out of stack."""


def check_nesting(metadata: Metadata | None) -> None:
    """Raises ValueError for metadata that is nested deeper than MAX_NESTING."""
    # Not a type of that depth: msgspec would take seconds to prepare it.
    level: list[Any] = list((metadata or {}).values())
    for _ in range(MAX_NESTING + 1):
        inside = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))
        ]
        if not inside:
            return
        level = [value for values in inside for value in values]
    raise ValueError(f"metadata is nested more than {MAX_NESTING} deep")


class Request(Struct, forbid_unknown_fields=True):
    """A body that clients send."""


class Response(Struct, omit_defaults=False):
    """A body that clients receive."""


# Service and sessions


class ClientConfigRequest(Request):
    sdk_version: Text = ""


class ClientConfigResponse(Response):
    """Switches that the SDK asks for once; those not named keep the SDK's own defaults."""

    pjwt_auth_enabled: bool
    sample_use_retrieve_futures: bool
    sample_join_sampling_session: bool = True
    custom_loss_server_side: bool = True
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = True


class AuthTokenResponse(Response):
    jwt: str


class NamedOrganization(Response):
    name: str


class KeyUser(Response):
    email: str


class KeyDetails(Response):
    org_details: NamedOrganization
    user_details: KeyUser


class KeyInfo(Response):
    """A key without its secret, as its holder sees it."""

    key_id: int
    name: str
    note: str
    details: KeyDetails


class ClientDynamicConfigResponse(Response):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = True


class Health(Response):
    status: str
    progress: str | None = None


class SupportedModel(Response):
    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


class ServerCapabilities(Response):
    supported_models: list[SupportedModel]


class TelemetryRequest(Request):
    events: list[dict[str, Any]]
    platform: str
    sdk_version: str
    session_id: str
    process_uuid: str = ""


class TelemetryResponse(Response):
    status: Literal["accepted"] = "accepted"


class CreateSessionRequest(Request):
    tags: list[Text] = []
    user_metadata: Metadata | None = None
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None
    type: Literal["create_session"] = "create_session"

    def __post_init__(self) -> None:
        check_nesting(self.user_metadata)


class CreateSessionResponse(Response):
    session_id: str
    type: Literal["create_session"] = "create_session"


class SessionHeartbeatRequest(Request):
    session_id: Id
    type: Literal["session_heartbeat"] = "session_heartbeat"


class SessionHeartbeatResponse(Response):
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(Request):
    type: Literal["success", "errored", "interrupted"]


class FinishSessionRequest(Request):
    reason: FinishReason
    detail: Text | None = None


class SessionList(Response):
    sessions: list[str]


class SessionInfo(Response):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: Labels
    display_name: str | None


# Models and training


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
    eps: NotNegative = 1e-12
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


# Sampling


class CreateSamplingSessionRequest(Request):
    session_id: Id
    sampling_session_seq_id: Count
    base_model: Id | None = None
    model_path: Id | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class CreateSamplingSessionResponse(Response):
    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class EncodedText(Request, tag="encoded_text"):
    tokens: list[int]


class Image(Struct, tag="image"):
    """Known, so that it can be refused by name."""


class ImageAssetPointer(Struct, tag="image_asset_pointer"):
    """Known, so that it can be refused by name."""


class Dmel(Struct, tag="dmel"):
    """Known, so that it can be refused by name."""


class ModelInput(Request):
    chunks: list[EncodedText | Image | ImageAssetPointer | Dmel]


class TensorData(Request):
    """A dense tensor, row-major, or a sparse one in CSR form."""

    data: list[int | float]
    dtype: Literal["float32", "int64"]
    shape: list[Count] | None = None
    sparse_crow_indices: list[Annotated[int, Meta(ge=0, le=MAX_INT64)]] | None = None
    sparse_col_indices: list[Annotated[int, Meta(ge=0, le=MAX_INT64)]] | None = None


class SamplingParams(Request):
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    stop: str | list[str | int] | None = None
    temperature: NotNegative = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0


MAX_SAMPLES = 4096
MAX_TOPK = 1024


class SampleRequest(Request, kw_only=True):
    prompt: ModelInput
    sampling_params: SamplingParams
    sampling_session_id: Id
    seq_id: Annotated[int, Meta(ge=0, le=MAX_SEQ)]
    num_samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOPK)] = 0
    topk_sample_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOPK)] = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: Annotated[int, Meta(ge=0, le=MAX_TOPK)] = 0
    prompt_logprobs_last_n: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


class SamplerInfo(Response):
    sampler_id: str
    base_model: str
    model_path: str | None


# Futures


class RetrieveFutureRequest(Request):
    request_id: Id
    allow_metadata_only: bool = False


class CancelFutureRequest(Request):
    request_id: Id


class TryAgain(Response):
    request_id: str
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"]
    queue_state_reason: str | None = None
    type: Literal["try_again"] = "try_again"


class RequestFailed(Response):
    error: str
    category: str


# Training runs and checkpoints


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
