"""JSON bodies about the service itself, sessions and futures."""

from typing import Any, Literal

import msgspec

from tinsmith.wire.types import Id, Labels, Metadata, Request, Response, Text, check_nesting


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
    tags: list[Text] = msgspec.field(default_factory=list)
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
