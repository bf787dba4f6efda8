"""Training passes that apply all adapters together, as GPUs do, against those that apply them one after the other."""

import numpy as np
import pytest
import torch

from tests.parity.conftest import NewTrainer
from tests.parity.reference import as_call, random_datum
from tests.parity.training_lab import add, gradient, outputs
from tinsmith.models.grouped import GroupedAdapters
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

SPECS = {
    "first": ModelSpec(8, 1),
    "second": ModelSpec(8, 2),
    "attention": ModelSpec(8, 3, train_mlp=False, train_unembed=False),
    "wide": ModelSpec(16, 4),
}


def trained(trainer: TorchTrainer) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    for model_id, spec in SPECS.items():
        add(trainer, model_id, spec)
    calls = [ModelCall(model_id, as_call([random_datum(rng, length) for length in (3, 17)])) for model_id in SPECS]
    calls.append(ModelCall("first", as_call([random_datum(rng, 12)])))
    logprobs = [output.logprobs_M for output in outputs(trainer, *calls)]
    return logprobs, {model_id: gradient(trainer, model_id) for model_id in SPECS}


def test_adapters_applied_together_train_as_those_applied_in_turn(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    original = GroupedAdapters.add_gradients
    monkeypatch.setattr(GroupedAdapters, "add_gradients", lambda self: used.append(self) or original(self))
    for checkpointing in (False, True):
        expected_logprobs, expected_grads = trained(new_trainer(gradient_checkpointing=checkpointing))
        assert not used
        trainer = new_trainer(gradient_checkpointing=checkpointing)
        monkeypatch.setattr(trainer._model, "groups_adapters", True)
        logprobs, grads = trained(trainer)
        monkeypatch.setattr(trainer._model, "groups_adapters", False)
        assert used, "the adapters were applied in turn"
        used.clear()
        for ours, expected in zip(logprobs, expected_logprobs, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        for model_id, grad in grads.items():
            scale = expected_grads[model_id].norm()
            assert (grad - expected_grads[model_id]).norm() <= 1e-6 * scale, model_id
