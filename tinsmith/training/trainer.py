"""The trainer: many tenants' LoRA and full-parameter models on one base model, in shared forward and backward passes.

Implements `protocols.Trainer`. Knows models and losses; neither requests' origin nor what runs next.

A pass that breaks (out of memory, say) is undone, and its calls run again one by one, so that only the culprit fails.

Shapes: `T` rows of a packed micro-batch, `U` logprobs, `M` target entries that these belong to, `D` hidden size.
"""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinsmith import sizing
from tinsmith.errors import NotFoundError, TinsmithError, UserError
from tinsmith.lost_device import raise_if_lost
from tinsmith.models.attention import PackedAttention
from tinsmith.models.full import FullModel
from tinsmith.models.head import pick_rows, target_logprobs
from tinsmith.models.hosted_experts import adopt_hosted
from tinsmith.models.invariant import RowInvariance
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, Segment
from tinsmith.models.transfer import on_device
from tinsmith.models.weights import FullWeights, LoraWeights, adapter_spec
from tinsmith.protocols import AdamParams, Capabilities, ModelCall, ModelSpec
from tinsmith.training.batching import MicroBatch, pack, plan
from tinsmith.training.runs import GradientBackup, Run, Trainable, check_call
from tinsmith.training.shared_prefixes import worth_sharing
from tinsmith.training.states import load_state, save_state
from tinsmith.training.warming import warm_up
from tinsmith.wire.packing import TrainOutput

log = logging.getLogger(__name__)

_USUAL_RANK = 32
_MOST_DATUMS = 32_768
"""Of a pass: attention has a row of programs for each, and a device takes 65,535. What datums share is one more."""
_MOST_PICKED = 1.25
"""Rows of the head for each row before it, where datums with other targets share rows: of more, each row has several
targets, since every row of the head takes memory and time for the whole vocabulary."""
_FEW_ROWS, _MANY_ROWS = 256, 16_384  # for which kernels are compiled in their own ways


class TorchTrainer:
    """Trains on one device. `micro_batch_tokens` bounds the rows of one pass; a longer datum passes alone, and
    full-parameter models have shorter passes where adapters are trained through layers that keep less.
    `micro_batch_datums` bounds its datums (0: what a device takes does).

    If `deterministic`, every call runs in passes of its own: products of other shapes round differently (by about
    1e-7), so only then are a call's bits a matter of that call, its model, `micro_batch_tokens` and the machine. On a
    GPU an operation without a deterministic algorithm fails the call, by name.
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        micro_batch_tokens: int,
        micro_batch_datums: int = 0,
        max_adapters: int,
        max_rank: int,
        model_bytes: int | None = None,
        gradient_checkpointing: bool | int = False,
        deterministic: bool = False,
    ) -> None:
        """`gradient_checkpointing`: whether backward recomputes the layers; a number: in passes of more rows.

        Models should take at most `model_bytes` of memory (None: any number); `excess_bytes` says when they take more.
        """
        self._model = model
        self._budget = micro_batch_tokens
        self._datums = micro_batch_datums or _MOST_DATUMS
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._model_bytes = model_bytes
        self._deterministic = deterministic
        self._models: dict[str, Trainable] = {}
        self._checkpointing = gradient_checkpointing

    def warm_up(self, on_progress: Callable[[str], None]) -> None:
        """Does beforehand what would otherwise make the first requests wait: compiling, where there are kernels."""
        if self._model.fused is None and self._model.exact is None:
            return
        on_progress("compiling training's kernels")
        ranks = {min(_USUAL_RANK, self._max_rank), self._max_rank}
        warm_up(self, sorted(ranks), (_FEW_ROWS, max(_FEW_ROWS, min(_MANY_ROWS, self._budget))))

    def capabilities(self) -> Capabilities:
        model = self._model
        return Capabilities(
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            max_lora_rank=self._max_rank,
            max_adapters=self._max_adapters,
            parameters=model.parameters,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )

    def add(self, model_id: str, spec: ModelSpec) -> None:
        """A fresh model. Raises UserError."""
        self._check_spec(model_id, spec)
        if spec.is_lora:
            self._models[model_id] = Trainable(self._model.new_adapter(spec))
        else:
            self._models[model_id] = Trainable(self._full_model(spec))

    def _full_model(self, spec: ModelSpec) -> FullModel:
        model = FullModel(spec, self._model.full_copy(trainable=True))
        if self._model.fused is not None:
            model.fuse(self._model.fused.of_full(model))
        return model

    def excess_bytes(self, spec: ModelSpec | None = None) -> int:
        """By how much the models, and a further one of `spec`, exceed their share of memory."""
        if self._model_bytes is None:
            return 0
        specs = [model.weights.spec for model in self._models.values()] + ([spec] if spec else [])
        return max(0, self._bytes_of(specs) - self._model_bytes)

    def _bytes_of(self, specs: Sequence[ModelSpec]) -> int:
        adapters = [self._model.layout(spec).total for spec in specs if spec.is_lora]
        full = [self._model.parameters for spec in specs if not spec.is_lora]
        return sizing.model_bytes(adapters, full, self._model.dtype.itemsize)

    def drop(self, model_id: str) -> None:
        """Forgets a model; an unknown one is forgotten already."""
        self._models.pop(model_id, None)

    def forward_backward(
        self, calls: Sequence[ModelCall], pause: Callable[[], None] | None = None
    ) -> list[TrainOutput | TinsmithError]:
        """Runs all calls together; one outcome per call, in order. A failed call adds nothing to any gradient.

        `pause` is called after each micro-batch.
        """
        started = [self._start(call) for call in calls]
        runs = [run for run in started if isinstance(run, Run)]
        for group in ([run] for run in runs) if self._deterministic else _groups(runs):
            self._run(group, pause)
        return [run.outcome() if isinstance(run, Run) else run for run in started]

    def optim_step(self, model_id: str, params: AdamParams) -> dict[str, float]:
        """One AdamW step from the accumulated gradient, which is cleared. Without one, nothing changes."""
        model = self._find(model_id)
        grad = model.weights.grad
        if not model.accumulated or grad is None:
            return {"grad_norm": 0.0}
        try:
            norm = model.optimizer.step(model.weights.weights, grad, params)
        finally:
            model.clear_gradient()
        model.weights.weights_changed()
        return {"grad_norm": norm}

    def discard_gradient(self, model_id: str) -> None:
        self._find(model_id).clear_gradient()

    def save(self, model_id: str, folder: Path, *, optimizer: bool, gradient: bool = False) -> None:
        """Writes the state of a model into the existing, empty `folder`."""
        save_state(self._find(model_id), self._model.folder, folder, optimizer=optimizer, gradient=gradient)

    def load(self, model_id: str, folder: Path, *, optimizer: bool, gradient: bool = False) -> None:
        """Replaces the state of an added model. Raises UserError, changing nothing, if the files do not fit it."""
        load_state(self._find(model_id), folder, optimizer=optimizer, gradient=gradient)

    def describe(self, folder: Path) -> ModelSpec:
        """What the files of an adapter say that it is. Raises UserError."""
        return adapter_spec(folder)

    def adopt(self, folder: Path, spare: Path) -> Path:
        """Brings experts of the hosted service's form into PEFT's; everything else is left alone. Raises UserError."""
        return adopt_hosted(self._model, folder, spare)

    def snapshot(self, model_id: str) -> LoraWeights | FullWeights:
        """A copy of the weights, on the device."""
        weights = self._find(model_id).weights
        if isinstance(weights, Adapter):
            return LoraWeights(weights.copy(), self._model.folder)
        return FullWeights(weights.frozen_copy())

    def _find(self, model_id: str) -> Trainable:
        if model_id not in self._models:
            raise NotFoundError(f"the trainer has no model {model_id!r}")
        return self._models[model_id]

    def _check_spec(self, model_id: str, spec: ModelSpec) -> None:
        if model_id in self._models:
            raise UserError(f"model {model_id!r} exists already")
        if spec.optimizer != "adamw":
            raise UserError(f"optimizer {spec.optimizer!r} is not supported; use 'adamw'")
        if spec.rank > self._max_rank or spec.rank < 0:
            raise UserError(
                f"rank {spec.rank} is out of range; allowed are 1 to {self._max_rank}, or 0 to train all weights"
            )
        if spec.is_lora and not (spec.train_attn or spec.train_mlp or spec.train_unembed):
            raise UserError("an adapter must train at least one of train_attn, train_mlp and train_unembed")
        if len(self._models) >= self._max_adapters:
            raise UserError(f"the trainer holds {self._max_adapters} models already, which is its limit")

    def _start(self, call: ModelCall) -> Run | TinsmithError:
        try:
            model = self._find(call.model_id)
            check_call(call.call, vocab_size=self._model.vocab_size, max_context=self._model.max_context)
        except UserError as error:
            return error
        return Run(call.model_id, model, call.call)

    def _run(self, group: Sequence[Run], pause: Callable[[], None] | None, *, share: bool = True) -> None:
        """All passes of some calls; if one breaks, each call again, alone, and then with no rows shared.

        A pass that shares rows takes more memory than another of as many: they see more keys and values.
        """
        shares = share and not self._deterministic and not self._model.is_recurrent
        reason = self._attempt(group, pause, share=shares)
        if reason is None:
            return
        if len(group) > 1:
            for run in group:
                self._run([run], pause)
        elif shares and worth_sharing(group[0].call):
            self._run(group, pause, share=False)
        else:
            group[0].break_off(reason)

    def _attempt(self, group: Sequence[Run], pause: Callable[[], None] | None, *, share: bool) -> str | None:
        """Returns why a pass broke, with every gradient as it was before; None if none did."""
        calls = [run.call for run in group]
        backups: list[GradientBackup] = []
        budget = int(self._budget * self._share(group))
        for cuts in plan(calls, [run.model_id for run in group], budget, self._datums, share=share):
            try:
                backups = backups or _back_up(group)
                with _deterministic(self._model.device) if self._deterministic else nullcontext():
                    self._pass(group, pack(calls, cuts))
            except Exception as error:  # whatever it was, it must not reach the neighbours
                raise_if_lost(error)
                log.exception("a pass of %d requests broke", len(group))
                for backup in backups:
                    backup.restore()
                for run in group:
                    run.restart()
                return f"{type(error).__name__}: {error}"
            if pause is not None:
                pause()
        for run in group:
            run.settle()
        return None

    def _pass(self, group: Sequence[Run], batch: MicroBatch) -> None:
        """Forward of one micro-batch, every call's own loss, and one backward for all that did not fail."""
        runs = [group[cut.call] for cut in batch.cuts]
        weights = runs[0].model.weights
        full = None if isinstance(weights, Adapter) else weights
        training = not runs[0].call.forward_only
        if training:
            self._checkpoint_gradients(self._recomputes(len(batch.tokens_T), self._share(runs)), full)
            for run, cut in zip(runs, batch.cuts, strict=True):
                run.begin(cut)
        segments = _segments(runs, batch)
        with torch.set_grad_enabled(training):
            logprobs_M = self._logprobs(batch, segments, full)
        upstream_M = _losses(runs, batch, segments, logprobs_M.detach())
        if any(segment.trains for segment in segments):
            logprobs_M.backward(upstream_M)
            for run, segment in zip(runs, segments, strict=False):
                run.model.accumulated |= segment.trains

    def _share(self, runs: Sequence[Run]) -> float:
        """The part of the usual rows that a pass of these calls may have."""
        weights = [run.model.weights for run in runs]
        return self._model.rows_share([each if isinstance(each, Adapter) else None for each in weights])

    def _recomputes(self, rows: int, share: float) -> bool:
        """Whether backward of a pass of so many rows computes the inside of each layer again."""
        return self._checkpointing if isinstance(self._checkpointing, bool) else rows > self._checkpointing * share

    def _checkpoint_gradients(self, enabled: bool, full: FullModel | None) -> None:
        if full is not None and full.layers is not None:
            full.layers.recomputes = enabled
        else:
            self._model.checkpoint_gradients(enabled, None if full is None else full.module)

    def _logprobs(self, batch: MicroBatch, segments: Sequence[Segment], full: FullModel | None) -> Tensor:
        """[M]: of each entry."""
        hidden_TD = self._hidden(batch, segments, full)
        targets_U = self._tensor(batch.targets_U)
        rows_U = None if batch.rows_U is None else self._tensor(batch.rows_U)
        if batch.picks_M is None or rows_U is None:
            return self._target_logprobs(hidden_TD, segments, rows_U, targets_U, full)
        if len(targets_U) > _MOST_PICKED * len(hidden_TD):
            logprobs_U = self._target_logprobs(hidden_TD, segments, rows_U, targets_U, full)
        else:
            hidden_UD, parts = pick_rows(hidden_TD, segments, rows_U)
            logprobs_U = self._target_logprobs(hidden_UD, parts, None, targets_U, full)
        return logprobs_U[self._tensor(batch.picks_M)]

    def _hidden(self, batch: MicroBatch, segments: Sequence[Segment], full: FullModel | None) -> Tensor:
        tokens_T, positions_T = map(self._tensor, (batch.tokens_T, batch.positions_T))
        attention = PackedAttention(batch.cu_seqlens, batch.prefixes_S)
        if full is not None and full.layers is not None:
            return full.layers.hidden(tokens_T, positions_T, attention)
        module = None if full is None else full.module
        return self._model.hidden(tokens_T, positions_T, segments, attention, module)

    def _target_logprobs(
        self,
        hidden_TD: Tensor,
        segments: Sequence[Segment],
        rows_U: Tensor | None,
        targets_U: Tensor,
        full: FullModel | None,
    ) -> Tensor:
        """fp32 [U]."""
        if full is not None and full.layers is not None and rows_U is None:
            return full.layers.logprobs(hidden_TD, targets_U)
        module = None if full is None else full.module
        return target_logprobs(self._model, hidden_TD, segments, rows_U, targets_U, module)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return on_device(array, self._model.device)


def _groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Calls that can share passes: those of adapters, each full model's call.

    Calls that train do not run with those that only run forward, nor adapters of the head with others: what is
    trained in the head decides how its gradients are computed.
    """
    shared: dict[tuple[bool, bool], list[Run]] = defaultdict(list)
    for run in runs:
        weights = run.model.weights
        if isinstance(weights, Adapter):
            shared[run.call.forward_only, weights.spec.train_unembed].append(run)
        else:
            yield [run]
    yield from shared.values()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Torch's own switch, for a pass only: sampling needs operations that have no deterministic algorithm.

    On a CPU also the arithmetic of a deterministic sampler, so that both give a token the same bits.
    """
    # filling costs time, and shows only reads of garbage
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        with RowInvariance() if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _back_up(group: Sequence[Run]) -> list[GradientBackup]:
    """The gradients to which the calls will add."""
    first: dict[str, Run] = {}
    for run in group:
        if not run.call.forward_only:
            first.setdefault(run.model_id, run)
    return [run.back_up() for run in first.values()]


def _segments(runs: Sequence[Run], batch: MicroBatch) -> list[Segment]:
    """One segment per cut, and one for the padding; a full model's rows have no adapter."""
    segments = []
    for position, run in enumerate(runs):
        weights = run.model.weights
        adapter = weights if isinstance(weights, Adapter) else None
        start, end = batch.row_bounds[position : position + 2]
        segments.append(Segment(adapter, start, end, trains=run.error is None))
    if end < len(batch.tokens_T):
        segments.append(Segment(None, end, len(batch.tokens_T), trains=False))
    return segments


def _losses(runs: Sequence[Run], batch: MicroBatch, segments: Sequence[Segment], logprobs_M: Tensor) -> Tensor:
    """The gradient of all losses in the logprobs; zero, and its segment not trained, where a call failed.

    All losses are computed before anything is fetched from the device, which waits for it only once.
    """
    upstream_M = torch.zeros_like(logprobs_M)
    datum_M = on_device(batch.datum_M, logprobs_M.device)
    spans = [slice(*bounds) for bounds in itertools.pairwise(batch.entry_bounds)]
    parts = list(zip(runs, batch.cuts, spans, strict=True))
    losses = [run.lose(cut, logprobs_M[span], datum_M[span]) for run, cut, span in parts]
    fetched = torch.cat([*(loss.values for loss in losses), logprobs_M]).numpy(force=True)
    values, fetched_M = np.split(fetched, [len(fetched) - len(logprobs_M)])
    numbers = iter(values.tolist())
    for (run, cut, span), loss, segment in zip(parts, losses, segments, strict=False):
        if run.take(cut, loss.names, list(itertools.islice(numbers, len(loss.values))), fetched_M[span]):
            upstream_M[span] = loss.gradient_M
        else:
            segment.trains = False
    return upstream_M
