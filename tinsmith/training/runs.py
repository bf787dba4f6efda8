"""One model's trainable state, and one call's way through its micro-batches: losses, outcome, undoing on failure.

Knows flat weights and losses; not how a forward pass is made.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tinsmith.errors import TinsmithError, UserError
from tinsmith.models.full import FullModel
from tinsmith.models.lora import Adapter
from tinsmith.models.transfer import on_device
from tinsmith.training.batching import Cut
from tinsmith.training.custom_loss import summed
from tinsmith.training.loss_bounds import CustomLossError
from tinsmith.training.losses import LOSS_FUNCTIONS, LossCase, Metrics
from tinsmith.training.optimizers import AdamW
from tinsmith.wire.losses import LOSSES
from tinsmith.wire.packing import Float32, TrainCall, TrainOutput


@dataclass(slots=True)
class Trainable:
    """A tenant's model. `accumulated` says whether its gradient buffer holds anything since the last step."""

    weights: Adapter | FullModel
    optimizer: AdamW = field(default_factory=AdamW)
    accumulated: bool = False

    def clear_gradient(self) -> None:
        if self.accumulated and self.weights.grad is not None:
            self.weights.grad.zero_()
        self.accumulated = False


class GradientBackup:
    """A model's accumulated gradient at one moment; nothing is copied if there was none."""

    def __init__(self, model: Trainable) -> None:
        self._model = model
        self._accumulated = model.accumulated
        grad = model.weights.grad
        self._grad = grad.clone() if model.accumulated and grad is not None else None

    def restore(self) -> None:
        """Also takes back what a broken backward pass has added, which the model does not know of."""
        grad = self._model.weights.grad
        if self._grad is not None and grad is not None:
            grad.copy_(self._grad)
        elif grad is not None:
            grad.zero_()
        self._model.accumulated = self._accumulated


@dataclass(frozen=True, slots=True)
class CutLoss:
    """The gradient of a cut's loss in its logprobs; on the device, whether all is finite, the loss and its metrics."""

    gradient_M: Tensor
    names: Sequence[str]
    values: Tensor


class Run:
    """One call under way."""

    def __init__(self, model_id: str, model: Trainable, call: TrainCall) -> None:
        self.model_id = model_id
        self.model = model
        self.call = call
        self._config = call.config if call.custom else {**LOSSES[call.loss].config, **call.config}
        self._logprobs_M = np.empty(len(call.targets_M), np.float32)
        self.restart()

    def restart(self) -> None:
        """Forgets what was computed, and what was backed up; the gradient is the caller's business."""
        self.error: TinsmithError | None = None
        self._metrics: dict[str, float] = {}
        self._before: GradientBackup | None = None

    def back_up(self) -> GradientBackup:
        """The model's gradient at this moment, which a failing call goes back to."""
        self._before = GradientBackup(self.model)
        return self._before

    def begin(self, cut: Cut) -> None:
        """Before the micro-batch that holds `cut`: makes sure that the call's gradient can be taken back."""
        self.model.weights.require_grad()
        if cut.opens and self._before is None:
            self.back_up()

    def settle(self) -> None:
        """After the last micro-batch: nothing is to be taken back any more."""
        self._before = None

    def lose(self, cut: Cut, logprobs_M: Tensor, datum_M: Tensor) -> "CutLoss":
        """The loss of a cut with these logprobs and its gradient; `take` has to follow."""
        leaf_M = logprobs_M.detach().requires_grad_()
        try:
            with torch.enable_grad():
                loss, metrics = self._loss(cut, leaf_M, datum_M)
                gradient_M = self._gradient(loss, leaf_M)
        except CustomLossError as error:
            self.error = error
            return CutLoss(torch.zeros_like(logprobs_M), [], torch.tensor([1.0, 0.0], device=logprobs_M.device))
        finite = loss.isfinite() & gradient_M.isfinite().all()
        values = torch.stack([finite.float(), loss.detach().float(), *(value.float() for value in metrics.values())])
        return CutLoss(gradient_M, list(metrics), values)

    def take(self, cut: Cut, names: Sequence[str], values: Sequence[float], logprobs_M: Float32) -> bool:
        """Takes the cut's logprobs, and a `CutLoss`'s values; returns whether the call trains on."""
        self._logprobs_M[self._span(cut)] = logprobs_M
        finite, *values = values
        if self.error is not None:
            self._go_back()
        elif not finite:
            self._fail(values[0])
        self._add_metrics(zip(["loss:sum", *names], values, strict=True))
        return not (self.error or self.call.forward_only)

    def _span(self, cut: Cut) -> slice:
        return slice(int(self.call.target_offsets[cut.first]), int(self.call.target_offsets[cut.last]))

    def _loss(self, cut: Cut, lp_M: Tensor, datum_M: Tensor) -> tuple[Tensor, Metrics]:
        if self.call.custom is not None:
            return summed(self.call, cut.first, cut.last, lp_M)
        span, device = self._span(cut), lp_M.device
        inputs = {name: on_device(values[span].copy(), device) for name, values in self.call.inputs.items()}
        return LOSS_FUNCTIONS[self.call.loss](LossCase(lp_M, inputs, self._config, datum_M))

    def _gradient(self, loss: Tensor, lp_M: Tensor) -> Tensor:
        try:
            (gradient_M,) = torch.autograd.grad(loss, lp_M)
        except RuntimeError as error:
            if self.call.custom is None:
                raise
            reason = str(error).partition("\n")[0]
            raise CustomLossError(f"the custom loss has no gradient: {reason}") from None
        return gradient_M

    def outcome(self) -> TrainOutput | TinsmithError:
        if self.error:
            return self.error
        return TrainOutput(self._logprobs_M, self.call.target_offsets, self.call.widths_N, self._metrics)

    def _add_metrics(self, metrics: Iterable[tuple[str, float]]) -> None:
        for name, value in metrics:
            if name not in self._metrics:
                self._metrics[name] = value
            elif name.endswith(":max"):
                self._metrics[name] = max(value, self._metrics[name])
            else:
                self._metrics[name] += value

    def break_off(self, reason: str) -> None:
        """Ends a call whose pass breaks even without company."""
        self.error = TinsmithError(
            f"the server could not compute this request of {self.call.num_tokens} tokens, also when run alone: "
            f"{reason}. Nothing of it was added to the gradient. If memory ran out, a smaller train_tokens helps, or "
            f"shorter datums"
        )

    def _go_back(self) -> None:
        if self._before is not None:
            self._before.restore()
            self._before = None

    def _fail(self, loss: float) -> None:
        self._go_back()
        self.error = UserError(
            f"the loss {self.call.loss!r} or its gradient is not finite (loss {loss}); nothing of this request was "
            "added to the gradient. Either inputs, importance ratios, or what a custom loss computes are beyond fp32's "
            "range, or the model's weights have probably diverged (by too large steps)"
        )


def check_call(call: TrainCall, *, vocab_size: int, max_context: int) -> None:
    """Refuses with UserError what would fail, or read out of bounds, in a batch with others."""
    if call.custom is None and call.loss not in LOSS_FUNCTIONS:
        raise UserError(f"unknown loss {call.loss!r}; known are {sorted(LOSS_FUNCTIONS)}")
    for name in () if call.custom else LOSSES[call.loss].inputs:
        if name not in call.inputs:
            raise UserError(f"loss {call.loss!r} needs the input {name!r}; given are {sorted(call.inputs)}")
    for name, values in call.inputs.items():
        if len(values) != len(call.targets_M):
            raise UserError(f"input {name!r} has {len(values)} entries for {len(call.targets_M)} targets")
    lengths = np.diff(call.token_offsets)
    if not len(lengths) or lengths.min() < 1 or lengths.max() > max_context:
        raise UserError(
            f"a call has at least one datum, of 1 to {max_context} tokens each; given are {lengths.tolist()}"
        )
    if not np.array_equal(np.diff(call.target_offsets), lengths * np.maximum(call.widths_N, 1)):
        raise UserError("every token of a datum needs as many targets as the datum's width says")
    for name, tokens in (("tokens", call.tokens_T), ("target_tokens", call.targets_M)):
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise UserError(f"{name} must lie in 0 to {vocab_size - 1}, not {tokens.min()} to {tokens.max()}")
