"""What each route takes and answers, for the OpenAPI document. Knows types and media, no handlers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinsmith.api.chat import anthropic_types, openai_types
from tinsmith.wire import accounts, sampling_types, service_types, training_types

JSON, PROTOBUF, BYTES, EVENTS = (
    "application/json",
    "application/x-protobuf",
    "application/octet-stream",
    "text/event-stream",
)
_METRICS = ("text/plain", "application/openmetrics-text")


@dataclass(frozen=True, slots=True)
class Described:
    """One route. `takes` and `answers` are types of bodies, `bytes` for what is no JSON, None for none (or any object).

    `media` is that of the request, `answered_as` those of an answer with 200, `status` the types of other answers that
    are no errors, `query` the schemas of parameters of the address (none is needed).
    """

    summary: str
    takes: Any = None
    answers: Any = None
    media: str = JSON
    answered_as: tuple[str, ...] = (JSON,)
    status: Mapping[int, Any] = field(default_factory=dict)
    query: Mapping[str, Any] = field(default_factory=dict)
    is_open: bool = False


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


_PAGE = {"limit": _whole(1, 1000), "offset": _whole(0, 2**31 - 1)}
_TEXT = {"type": "string"}
_RUN = "/training_runs/{run_id}"
_CHECKPOINT = f"{_RUN}/checkpoints/{{segment}}/{{name}}"
_Future, _Sampled = training_types.UntypedFuture, training_types.SampleFuture

_TINKER: dict[tuple[str, str], Described] = {
    ("GET", "/healthz"): Described(
        "Whether requests can be worked on.",
        None,
        service_types.Health,
        status={503: service_types.Health},
        is_open=True,
    ),
    ("GET", "/openapi.json"): Described("This document."),
    ("POST", "/client/config"): Described(
        "Switches of the SDK.", service_types.ClientConfigRequest, service_types.ClientConfigResponse
    ),
    ("POST", "/client/dynamic_config"): Described(
        "Switches that may change.", service_types.ClientConfigRequest, service_types.ClientDynamicConfigResponse
    ),
    ("POST", "/auth/token"): Described("A token in exchange for the key.", None, service_types.AuthTokenResponse),
    ("GET", "/auth/apikey/me"): Described("The key that was used.", None, service_types.KeyInfo),
    ("DELETE", "/auth/apikey/me"): Described("Gives the key that was used back."),
    ("GET", "/get_server_capabilities"): Described("The served models.", None, service_types.ServerCapabilities),
    ("POST", "/telemetry"): Described(
        "Taken and dropped.", service_types.TelemetryRequest, service_types.TelemetryResponse
    ),
    ("POST", "/create_session"): Described(
        "A new session.", service_types.CreateSessionRequest, service_types.CreateSessionResponse
    ),
    ("POST", "/session_heartbeat"): Described(
        "The client is there.", service_types.SessionHeartbeatRequest, service_types.SessionHeartbeatResponse
    ),
    ("POST", "/sessions/{session_id}/finish"): Described("Ends a session.", service_types.FinishSessionRequest),
    ("GET", "/sessions"): Described("Ids of sessions, newest first.", None, service_types.SessionList, query=_PAGE),
    ("GET", "/sessions/{session_id}"): Described("A session's models and samplers.", None, service_types.SessionInfo),
    ("POST", "/sessions/search"): Described(
        "Sessions that fit, newest first.", accounts.SessionSearchRequest, accounts.SessionSearchResponse
    ),
    ("PUT", "/sessions/{session_id}/project"): Described("Moves a session.", accounts.ProjectRequest),
    ("GET", "/sessions/{session_id}/trace_export"): Described("Where its trace is.", None, accounts.TraceExport),
    ("GET", "/traces/{token}"): Described("A session's trace.", is_open=True),
    ("POST", "/create_model"): Described("A new model.", training_types.CreateModelRequest, _Future),
    ("POST", "/get_info"): Described("What a model is.", training_types.GetInfoRequest, training_types.GetInfoResponse),
    ("POST", "/create_custom_loss"): Described("Not supported: refused.", dict[str, Any]),
    ("POST", "/forward_backward"): Described(
        "Gradients of a batch: a ForwardBackwardRequest, compressed with zstd if Content-Encoding says so.",
        bytes,
        _Future,
        media=PROTOBUF,
    ),
    ("POST", "/optim_step"): Described("A step of the optimizer.", training_types.OptimStepRequest, _Future),
    ("POST", "/save_weights"): Described("A checkpoint to train on from.", training_types.SaveWeightsRequest, _Future),
    ("POST", "/save_weights_for_sampler"): Described(
        "Weights to sample from.", training_types.SaveWeightsForSamplerRequest, _Future
    ),
    ("POST", "/save_weights_external"): Described(
        "An export for other software.", training_types.SaveWeightsExternalRequest, _Future
    ),
    ("POST", "/external_weights_upload_start"): Described(
        "Where to put an adapter.",
        training_types.ExternalWeightsUploadStartRequest,
        training_types.ExternalWeightsUploadStarted,
    ),
    ("POST", "/external_weights_upload_finish"): Described(
        "Makes a checkpoint of it.",
        training_types.ExternalWeightsUploadFinishRequest,
        training_types.ExternalWeightsUploadFinished,
    ),
    ("POST", "/load_weights"): Described("Weights of a checkpoint.", training_types.LoadWeightsRequest, _Future),
    ("POST", "/weights_info"): Described(
        "What a checkpoint holds.", training_types.WeightsInfoRequest, training_types.WeightsInfo
    ),
    ("POST", "/copy_weights"): Described(
        "A checkpoint of one's own.", accounts.CopyWeightsRequest, accounts.CopyWeightsResponse
    ),
    ("POST", "/create_sampling_session"): Described(
        "A sampler.", sampling_types.CreateSamplingSessionRequest, sampling_types.CreateSamplingSessionResponse
    ),
    ("POST", "/asample"): Described("Samples.", sampling_types.SampleRequest, _Sampled),
    ("GET", "/samplers/{sampler_id}"): Described("What a sampler samples from.", None, sampling_types.SamplerInfo),
    ("POST", "/join_sampling_session"): Described(
        "A further client of a sampler.", accounts.JoinSamplingSessionRequest, accounts.JoinSamplingSessionResponse
    ),
    ("POST", "/retrieve_future"): Described(
        "A result, once there is one: tensors as protobuf, everything else as JSON.",
        service_types.RetrieveFutureRequest,
        None,
        answered_as=(JSON, PROTOBUF),
        status={408: service_types.TryAgain},
    ),
    ("POST", "/retrieve_futures"): Described(
        "Which results are there.", accounts.RetrieveFuturesRequest, accounts.RetrieveFuturesResponse
    ),
    ("POST", "/cancel_future"): Described("Nobody waits for a sample any more.", service_types.CancelFutureRequest),
    ("GET", "/training_runs"): Described("Models, newest first.", None, training_types.TrainingRunList, query=_PAGE),
    ("GET", _RUN): Described("A model.", None, training_types.TrainingRun),
    ("GET", f"{_RUN}/checkpoints"): Described("A model's checkpoints.", None, training_types.CheckpointList),
    ("GET", "/checkpoints"): Described("Checkpoints, newest first.", None, training_types.CheckpointList, query=_PAGE),
    ("DELETE", _CHECKPOINT): Described("Deletes a checkpoint."),
    ("POST", f"{_CHECKPOINT}/publish"): Described("Everybody here may use it."),
    ("DELETE", f"{_CHECKPOINT}/publish"): Described("Only its owner may use it."),
    ("PUT", f"{_CHECKPOINT}/ttl"): Described("When it ends.", training_types.TtlRequest),
    ("GET", f"{_RUN}/checkpoints/external_weights/{{name}}/external_weights_urls"): Described(
        "Addresses of an export's files.", None, training_types.ExternalWeightsUrls
    ),
    ("GET", "/files/{token}/{name}"): Described(
        "A file of an export.", None, bytes, answered_as=(BYTES,), is_open=True
    ),
    ("PUT", "/uploads/{token}/{name}"): Described("A file of an adapter.", bytes, media=BYTES, is_open=True),
    ("GET", "/audit"): Described(
        "What was done on a day.", None, accounts.AuditLog, query={"event_type": _TEXT, "day": _TEXT}
    ),
    # Any object: its events are of several forms, which msgspec cannot put into one schema.
    ("GET", "/billing/usage/events"): Described("What was used.", query={"starting_on": _TEXT, "ending_before": _TEXT}),
    ("GET", "/billing/usage/checkpoints/current"): Described(
        "What is stored.", None, accounts.StorageReport, query={"project_id": _TEXT}
    ),
}

_OPENAI: dict[tuple[str, str], Described] = {
    ("POST", "/chat/completions"): Described(
        "An answer in a conversation.",
        openai_types.ChatRequest,
        openai_types.ChatCompletion,
        answered_as=(JSON, EVENTS),
    ),
    ("POST", "/completions"): Described(
        "A text's continuation.", openai_types.CompletionRequest, openai_types.Completion, answered_as=(JSON, EVENTS)
    ),
}
_ANTHROPIC: dict[tuple[str, str], Described] = {
    ("POST", "/messages"): Described(
        "An answer in a conversation.",
        anthropic_types.MessagesRequest,
        anthropic_types.SaidMessage,
        answered_as=(JSON, EVENTS),
    ),
    ("POST", "/messages/count_tokens"): Described(
        "A conversation's length.", anthropic_types.CountRequest, anthropic_types.TokenCount
    ),
}


def _models(one: Any, several: Any) -> dict[tuple[str, str], Described]:
    return {
        ("GET", "/models"): Described("What may be named as a model.", None, several),
        ("GET", "/models/{model:path}"): Described("One of them.", None, one),
    }


_OPENAI_MODELS = _models(openai_types.Model, openai_types.ModelList)
_ANTHROPIC_MODELS = _models(anthropic_types.Model, anthropic_types.ModelList)
_BY_PREFIX = {
    "/api/v1": _TINKER,
    "/oai/api/v1": _OPENAI | _OPENAI_MODELS,
    "/anthropic/api/v1": _ANTHROPIC | _ANTHROPIC_MODELS,
    # The same list for both, in the form that the client's headers ask for.
    "/v1": _OPENAI | _ANTHROPIC | _models(openai_types.Model, openai_types.ModelList),
    "": {
        ("GET", "/metrics"): Described("For Prometheus; operators only.", None, bytes, answered_as=_METRICS),
        ("GET", "/status"): Described("For people; operators only."),
    },
}

DESCRIBED: dict[tuple[str, str], Described] = {
    (method, prefix + path): described
    for prefix, routes in _BY_PREFIX.items()
    for (method, path), described in routes.items()
}
"""(method, path) → description, of every route."""
