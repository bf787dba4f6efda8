"""The whole backend surface: what the engine asks of a trainer and of a sampler, and nothing else.

Any object with these methods serves: the modules in `training/` and `sampling/`, a group of workers behind
`cluster/`, another system's engine. Calls are synchronous and made from one thread. Errors that belong to one request
are returned or raised as `TinsmithError` and leave every other request untouched.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tinsmith.errors import TinsmithError
from tinsmith.wire.packing import SampleCall, SampleOutput, TrainCall, TrainOutput
from tinsmith.wire.progress import Progress

BASE_SNAPSHOT = "base"
"""The snapshot id under which the untouched base model can be sampled."""

LORA_ALPHA = 32.0
"""The Tinker API has no field for alpha; its documentation gives 32."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What makes a tenant's trainable model: a LoRA adapter of `rank` ≥ 1, or a full-parameter model (`rank` 0).

    `seed` initialises the adapter (its A matrices); it is always set, so that a restored model is the same model.
    """

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = LORA_ALPHA
    optimizer: str = "adamw"

    @property
    def is_lora(self) -> bool:
        return self.rank > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AdamParams:
    """One AdamW step's parameters. `grad_clip_norm` 0 turns clipping off; weight decay is decoupled."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the loaded base model can do; the API validates requests against it. Sizes in tokens."""

    architecture: str
    vocab_size: int
    max_context: int
    max_lora_rank: int
    max_adapters: int
    parameters: int
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One request's datums, for one model."""

    model_id: str
    call: TrainCall


@dataclass(frozen=True, slots=True)
class SnapshotCall:
    """One sampling request, against one snapshot. `request_id` names it in the results and for `cancel`.

    Tenants that want the sampler at once share it equally, or by the `weight` that all tenants of one `owner` have
    together; a tenant without an owner stands for itself.
    """

    request_id: str
    snapshot_id: str
    tenant: str
    call: SampleCall
    owner: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A sampling request that ended: its output, or its own error."""

    request_id: str
    output: SampleOutput | TinsmithError


@dataclass(frozen=True, slots=True)
class SamplerUsage:
    """What a sampler holds at this moment, and (the last three) what it has done since it was made."""

    running: int  # sequences
    waiting: int
    kv_tokens: int  # the cache's size
    kv_tokens_held: int  # by sequences that run
    kv_tokens_kept: int  # for reuse, should the same beginning come again
    snapshots: int
    snapshot_bytes: int
    prefilled: int  # tokens of prompts that were run, not found in the cache; again after a preemption
    sampled: int  # tokens
    preempted: int  # sequences


@runtime_checkable
class Weights(Protocol):
    """An immutable copy of a model's weights, on the device. Only trainer and sampler look inside."""

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Trainer(Protocol):
    """Holds the trainable models of one base model: weights, gradients, optimizer state."""

    def capabilities(self) -> Capabilities: ...

    def add(self, model_id: str, spec: ModelSpec) -> None:
        """A new model: a fresh adapter from `spec.seed`, or a copy of all base weights. Raises UserError."""

    def excess_bytes(self, spec: ModelSpec | None = None) -> int:
        """By how many bytes the models, and a further one of `spec`, exceed their share of memory; 0 if they fit."""

    def drop(self, model_id: str) -> None:
        """Forgets the model and frees its memory."""

    def forward_backward(
        self, calls: Sequence[ModelCall], pause: Callable[[], None] | None = None
    ) -> list[TrainOutput | TinsmithError]:
        """Runs all calls, of any models, ranks and losses, together; one outcome per call, in order.

        Gradients add to the model's accumulated gradient unless `forward_only`. A failed call adds nothing.
        `pause` is called between micro-batches, when the device is free for others.
        """

    def optim_step(self, model_id: str, params: AdamParams) -> dict[str, float]:
        """Updates the weights from the accumulated gradient and clears it; returns metrics (`grad_norm`, …).

        Without an accumulated gradient nothing changes. A gradient that is not finite raises UserError, clears the
        gradient and leaves weights and optimizer state as they were.
        """

    def discard_gradient(self, model_id: str) -> None:
        """Clears what forward_backward accumulated."""

    def save(self, model_id: str, folder: Path, *, optimizer: bool, gradient: bool = False) -> None:
        """Writes weights (and optimizer state, and accumulated gradient) as safetensors into the empty `folder`."""

    def load(self, model_id: str, folder: Path, *, optimizer: bool, gradient: bool = False) -> None:
        """Replaces the weights of an added model, and its optimizer state (or resets that).

        The accumulated gradient becomes the one saved with them if `gradient` is true, and is cleared otherwise.
        """

    def describe(self, folder: Path) -> ModelSpec:
        """The model that `load` can fill from an adapter's folder, whoever wrote it. Raises UserError."""

    def adopt(self, folder: Path, spare: Path) -> Path:
        """Where `load` finds the adapter of `folder`: there, or, if it has another form, in `spare`, which is made.

        Raises UserError.
        """

    def snapshot(self, model_id: str) -> Weights:
        """An immutable copy of the weights as they are now, for `Sampler.publish`."""


@runtime_checkable
class Sampler(Protocol):
    """Samples from snapshots in one continuously running batch."""

    def capabilities(self) -> Capabilities: ...

    def publish(self, snapshot_id: str, weights: Weights | Path) -> None:
        """Makes a snapshot available: a copy made by `Trainer.snapshot`, or a folder written by `Trainer.save`.

        Publishing an id again replaces its weights for requests submitted later.
        """

    @property
    def excess_bytes(self) -> int:
        """By how many bytes the published snapshots exceed their share of memory; 0 if they fit."""

    def retract(self, snapshot_id: str) -> None:
        """Forgets a snapshot; requests under way on it finish first."""

    def save(self, snapshot_id: str, folder: Path) -> None:
        """Writes a published snapshot into the existing, empty `folder`, as `Trainer.save` would."""

    def submit(self, call: SnapshotCall) -> None:
        """Adds a request to the batch. Raises UserError if it can never run (too long, unknown snapshot)."""

    def cancel(self, request_id: str) -> None:
        """Ends a request without a result; unknown ids are ignored."""

    def step(self) -> list[Finished]:
        """Advances every running request by about one token; returns those that ended, also by their own error."""

    def progress(self) -> list[Progress]:
        """What requests with `stream` have got since the last call; of one that has ended, nothing more."""

    def usage(self) -> SamplerUsage:
        """For whoever watches; callable from any thread."""

    @property
    def load(self) -> int:
        """Requests submitted and not finished."""
