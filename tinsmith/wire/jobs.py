"""A job as it is submitted, planned, ended and awaited. Plain records: no SQL, no tensors."""

from dataclasses import dataclass

BATCHED = frozenset({"forward", "forward_backward"})
"""The kinds of a model's jobs that share batches with other models'; every other is a barrier of its own model."""

GONE_SNAPSHOT = "gone"
"""In place of a sampler's snapshot, once that was superseded, long unused, and deleted."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a client submits. `tokens` is its cost; `body` is the packed request (see `packing`) or JSON.

    `seq` orders the jobs of one subject (a model, or a sampler); (subject, seq) makes a retry the same job. `trace`
    is the id that log lines about it name.
    """

    subject: str
    seq: int
    kind: str
    owner: str
    base: str
    body: bytes
    tokens: int = 0
    trace: str | None = None

    @property
    def request_id(self) -> str:
        return f"{self.subject}:{self.seq}"


@dataclass(frozen=True, slots=True)
class Header:
    """A job without its payload: all that planning needs. `number` is the order of arrival."""

    number: int
    subject: str
    seq: int
    kind: str
    owner: str
    tokens: int
    created_at: float
    trace: str | None = None

    @property
    def request_id(self) -> str:
        return f"{self.subject}:{self.seq}"

    @property
    def session_id(self) -> str:
        """The ids of models and samplers begin with their session's."""
        return self.subject.partition(":")[0]

    @property
    def is_barrier(self) -> bool:
        return self.kind not in BATCHED


@dataclass(frozen=True, slots=True)
class Past:
    """A job that ended, done or failed; `category` is that of its error.

    `ran` is false if it was refused at the door; `chunked` says that it was one part of a client's larger call.
    """

    header: Header
    category: str | None
    ran: bool
    chunked: bool

    @property
    def state(self) -> str:
        return "done" if self.category is None else "failed"


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that one job used, by kind: train, prefill, cached_prefill, sample."""

    owner: str
    request_id: str
    tokens: dict[str, int]

    @property
    def session_id(self) -> str:
        """The ids of models and samplers begin with their session's."""
        return self.request_id.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: a result, or an error with whose fault it was (`user` or `server`)."""

    number: int
    body: bytes | None = None
    error: str | None = None
    category: str | None = None
    used: Usage | None = None


@dataclass(frozen=True, slots=True)
class Future:
    """A job as its client sees it. `body` is the result once the state is `done`."""

    request_id: str
    kind: str
    owner: str
    state: str
    body: bytes | None
    error: str | None
    category: str | None
    trace: str | None = None
