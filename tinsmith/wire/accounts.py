"""JSON bodies about owners and what they have: audit, usage, search, copies, traces. Rules as in `types`."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from tinsmith.wire.types import Count, Id, Labels, Request, Response, Text, Ttl

MAX_FOUND = 200


class AuditEntry(Response):
    """One act; `event` is `{resource}_{action}`."""

    timestamp: str
    event: str
    event_details: dict[str, object]
    model_id: str | None = None
    tinker_path: str | None = None


class AuditLog(Response):
    entries: list[AuditEntry]


class TokenUse(Struct):
    """Tokens of one kind in one hour."""

    type: Literal["training", "sampling_prefill", "sampling_sample"]
    token_count: int


class PrefillUse(Struct):
    """Tokens of prompts, read anew or known already."""

    cached: bool
    token_count: int
    type: Literal["sampling_prefill"] = "sampling_prefill"


class CheckpointUse(Struct):
    """Checkpoints made in one hour."""

    count: int
    type: Literal["checkpoint"] = "checkpoint"


class StorageUse(Struct):
    """What was stored in one hour, in GB (10^9 bytes) times hours."""

    gigabyte_hours: float
    free: bool = False
    type: Literal["storage"] = "storage"


class UsageEvent(Response):
    """What one session used of one kind in one hour. Rates and costs in USD; None without a price."""

    bucket_start: str
    bucket_end: str
    base_model: str
    user_id: str
    user_name: str
    session_id: str
    project_id: str | None
    event_info: TokenUse | PrefillUse | CheckpointUse | StorageUse
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None


class UsageSession(Response):
    user_metadata: Labels


class UsageReport(Response):
    data: list[UsageEvent]
    sessions: dict[str, UsageSession]
    cost_data_through: None = None


class StoredNow(Response):
    """What one owner keeps in one project."""

    project_id: str | None
    org_user_urn: str
    user_name: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None


class StorageReport(Response):
    data: list[StoredNow]
    effective_rate_usd_per_gigabyte_month: float | None


class OwnOwner(Request, tag="own"):
    """The caller's sessions."""


class AccessibleOwner(Request, tag="accessible"):
    """All sessions that the caller may see."""


class UserOwner(Request, tag="user"):
    """Some owners' sessions."""

    owner_urns: Annotated[list[Id], Meta(min_length=1, max_length=10)]


class ActiveQuery(Request, tag="active"):
    """Open sessions with a living client."""


class CancelledQuery(Request, tag="cancelled"):
    """No session of this server is ever cancelled but by its client."""


class FailedQuery(Request, tag="failed"):
    """Nor does the server fail any."""


class FinishedQuery(Request, tag="client_finished"):
    """Sessions that their client finished."""

    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursor(Struct):
    """Where the next page begins."""

    last_created_at: Text
    last_session_id: Id


class SessionSearchRequest(Request):
    session_id: Id | None = None
    project_ids: list[Id] | None = None
    user_metadata: Labels = msgspec.field(default_factory=dict)
    display_name: Annotated[str, Meta(min_length=1, max_length=2000, pattern=r"^[^\x00]*$")] | None = None
    owner: OwnOwner | AccessibleOwner | UserOwner = msgspec.field(default_factory=OwnOwner)
    statuses: list[ActiveQuery | CancelledQuery | FailedQuery | FinishedQuery] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_FOUND)] = 50
    cursor: SearchCursor | None = None


class FinishedStatus(Struct, tag="client_finished"):
    """The client said how it ended."""

    reason: dict[str, str]
    detail: str | None = None


class ActiveStatus(Struct, tag="active"):
    """The client is alive."""


class SessionSummary(Response):
    session_id: str
    created_at: str
    owner: str
    project_id: str
    status: FinishedStatus | ActiveStatus | None
    checkpoints_count: int
    display_name: str | None
    user_metadata: Labels
    checkpoint_storage_bytes: int


class SessionSearchResponse(Response):
    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None


class ProjectRequest(Request):
    project_id: Id


class TraceExport(Response):
    status: Literal["ready"]
    url: str


class CopyWeightsRequest(Request, kw_only=True):
    """Into a new run of a project, or of a session (both of its fields)."""

    source_path: Id
    session_id: Id | None = None
    model_seq_id: Count | None = None
    destination_project_id: Id | None = None
    ttl_seconds: Ttl | None = None
    weights_access_token: Text | None = None


class CopyWeightsResponse(Response):
    tinker_path: str


class JoinSamplingSessionRequest(Request):
    sampling_session_id: Id
    type: Literal["join_sampling_session"] = "join_sampling_session"


class JoinSamplingSessionResponse(Response):
    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class SamplerTarget(Request):
    """The samples that one client asked of one sampler."""

    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Meta(ge=0, le=10**9)] = 0
    type: Literal["sampling_session"] = "sampling_session"


class RetrieveFuturesRequest(Request):
    target: SamplerTarget
    prev_cursor: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    timeout: Annotated[float, Meta(ge=0)] | None = None
    retrieved_request_ids: list[Id] = msgspec.field(default_factory=list)


class Completion(Response):
    """The end of one request, whose result is still to be fetched."""

    request_id: str
    state: Literal["finished", "failed"]
    response_payload_uncompressed_size: int | None = None


class RetrieveFuturesResponse(Response):
    completions: list[Completion]
    cursor: int
