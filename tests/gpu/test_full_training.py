"""All weights trained through fused layers against the module and autograd, and both against float32."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, DTYPE, INTERPRETED
from tests.gpu.test_fused_training import PlainChoice, distance, fused_layers
from tests.parity.conftest import load
from tinsmith.models import full_head
from tinsmith.models.full import FullModel
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainCall, TrainOutput

pytestmark = pytest.mark.gpu
LENGTHS = (5, 9, 14, 3, 20, 40)
FULL = ModelSpec(0, 0)


def call(vocabulary: int, width: int = 0, lengths: Sequence[int] = LENGTHS) -> TrainCall:
    """Cross entropy of every token, or of `width` targets for each."""
    rows = sum(lengths)
    tokens, targets = np.random.default_rng(0).integers(0, vocabulary, (2, rows * max(width, 1))).astype(np.int32)
    weights = np.linspace(-0.5, 1, len(targets), dtype=np.float32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    widths = np.full(len(lengths), width, np.int32)
    inputs = {"weights": weights}
    return TrainCall(
        "cross_entropy", {}, False, tokens[:rows], offsets, targets, offsets * max(width, 1), widths, inputs
    )


def trainer_of(base: BaseModel, *, fused: bool, recomputes: bool = False, rows: int = 64) -> TorchTrainer:
    base.fused = fused_layers(base) if fused else None
    trainer = TorchTrainer(base, micro_batch_tokens=rows, max_adapters=1, max_rank=8, gradient_checkpointing=recomputes)
    trainer.add("full", FULL)
    layers = weights_of(trainer).layers
    assert (layers is not None) == fused
    if INTERPRETED and layers is not None:
        layers._attention = PlainChoice()
    return trainer


def weights_of(trainer: TorchTrainer) -> FullModel:
    weights = trainer._find("full").weights
    assert isinstance(weights, FullModel)
    return weights


def run(trainer: TorchTrainer, given: TrainCall) -> dict[str, Tensor]:
    """The logprobs, and every parameter's gradient."""
    (outcome,) = trainer.forward_backward([ModelCall("full", given)])
    assert isinstance(outcome, TrainOutput), outcome
    weights = weights_of(trainer)
    gradients = weights.layout.named_views(weights.require_grad().double().cpu())
    return {"logprobs": torch.from_numpy(outcome.logprobs_M).double(), **gradients}


@pytest.mark.parametrize("width", [0, 2], ids=["one-target", "two-targets"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "qwen2-biases", "qwen3-tied"])
def test_every_weight_has_the_gradient_that_autograd_finds(
    family: str, recomputes: bool, width: int, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 as far from float32 as through the module, times 1.3, of the largest gradient. Two passes, and
    several chunks of the head."""
    monkeypatch.setattr(full_head, "_ROWS", 8)
    monkeypatch.setattr(full_head, "CUDA_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(full_head, "_CHUNKS", 2)
    base = load(folders(family), DTYPE, DEVICE)
    given = call(base.vocab_size, width)
    exact = run(trainer_of(load(folders(family), torch.float32, DEVICE), fused=False), given)
    plain = run(trainer_of(base, fused=False), given)
    ours = run(trainer_of(base, fused=True, recomputes=recomputes), given)
    assert ours.keys() == exact.keys()
    for name, true in exact.items():
        allowed = 1e-4 if INTERPRETED else max(1.3 * distance(plain[name], true), 0.02)
        assert distance(ours[name], true) <= allowed, name


def test_steps_through_fused_layers_change_what_the_module_computes(folders: Callable[[str], Path]) -> None:
    """Weights, gradients and module stay one: after steps a snapshot's logprobs are those of the next pass."""
    base = load(folders("qwen3-tied"), DTYPE, DEVICE)
    trainer, given = trainer_of(base, fused=True), call(base.vocab_size, lengths=(5, 9))
    before = run(trainer, given)["logprobs"]
    trainer.optim_step("full", AdamParams(learning_rate=0.01))
    after = run(trainer, given)["logprobs"]
    weights_of(trainer).layers = None
    expected = run(trainer, given)["logprobs"]
    assert distance(after, expected) <= (1e-5 if INTERPRETED else 0.01) < distance(before, expected)
