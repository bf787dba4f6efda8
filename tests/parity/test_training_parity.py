"""Training in packed batches equals Hugging Face, PEFT and torch.optim run alone and unpacked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.parity import reference
from tests.parity.conftest import Folders, NewTrainer
from tests.parity.reference import SPECS, as_call, random_datum
from tests.parity.training_lab import FULL, add, outputs, steps_of
from tests.tiny_families import BEYOND_LLAMA, FAMILIES
from tinsmith.models.lora import Adapter
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec

pytestmark = reference.PEFTS_WARNINGS

PARAMS = AdamParams(learning_rate=0.003, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)
# Where a gradient is nearly zero, Adam makes a step of its sign, which is noise: a larger epsilon keeps that small.
STEADY = replace(PARAMS, eps=1e-5)
SMALL = ModelSpec(rank=3, seed=1)
COURSES = {name: ("qwen3-tied", spec, steps_of(1, 4), PARAMS) for name, spec in SPECS.items()} | {
    family: (family, SMALL, steps_of(1, 20, (9, 5)), STEADY)
    for family in ("qwen3-moe", "gpt-oss", "deepseek-moe", "gemma3", "deepseek-mla", "qwen3-next", "qwen3.5-moe")
}
"""Whole trainings: family, adapter, steps."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_equal_peft(family: str, new_trainer: NewTrainer, folders: Folders) -> None:
    trainers = [new_trainer(family, gradient_checkpointing=chosen) for chosen in (False, True)]
    for trainer in trainers:
        add(trainer, "m", SPECS["all"])
    [data] = steps_of(0, 1)
    module = reference.peft_module(folders(family), trainers[0]._models["m"].weights)
    expected = torch.cat([reference.logprobs(module, datum) for datum in data])
    loss = reference.cross_entropy(module, data)
    loss.backward()
    parameters = reference.lora_parameters(module)
    for trainer in trainers:
        [output] = outputs(trainer, ModelCall("m", as_call(data)))
        np.testing.assert_allclose(output.logprobs_M, expected.detach().numpy(), atol=1e-5)
        assert output.metrics["loss:sum"] == pytest.approx(loss.item(), abs=1e-4)
        adapter = trainer._models["m"].weights
        gradients = adapter.layout.named_views(adapter.grad)
        assert set(parameters) == set(gradients)
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert (gradients[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("course", COURSES)
def test_weights_after_clipped_and_decayed_steps_equal_peft_and_torch(
    course: str, new_trainer: NewTrainer, folders: Folders
) -> None:
    family, spec, steps, params = COURSES[course]
    trainer = new_trainer(family)
    add(trainer, "neighbour", SPECS["all"])
    trainer.add("m", spec)
    adapter = trainer._models["m"].weights
    module = reference.peft_module(folders(family), adapter)
    norms = []
    for data in steps:
        outputs(trainer, ModelCall("neighbour", as_call(data[1:])), ModelCall("m", as_call(data)))
        norms.append(trainer.optim_step("m", params)["grad_norm"])

    parameters = reference.lora_parameters(module)
    assert norms == pytest.approx(reference.train(module, parameters, steps, params), rel=1e-4)
    assert min(norms) > params.grad_clip_norm
    weights = adapter.layout.named_views(adapter.weights)
    assert set(weights) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            weights[name], parameter.data, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        *((family, chosen) for family in ("qwen3-tied", "llama", "qwen2-biases") for chosen in (False, True)),
        *((family, True) for family in BEYOND_LLAMA),
    ],
)
def test_a_full_parameter_model_trains_as_in_torch(
    family: str, checkpointing: bool, new_trainer: NewTrainer, folders: Folders
) -> None:
    params = STEADY if family in BEYOND_LLAMA else PARAMS
    trainer = new_trainer(family, gradient_checkpointing=checkpointing)
    trainer.add("m", FULL)
    before = {name: tensor.clone() for name, tensor in trainer._model.module.named_parameters()}
    steps = steps_of(2, 3)
    for data in steps:
        outputs(trainer, ModelCall("m", as_call(data)))
        trainer.optim_step("m", params)

    module = reference.full_module(folders(family))
    parameters = dict(module.named_parameters())
    reference.train(module, parameters, steps, params)
    model = trainer._models["m"].weights
    weights = model.layout.named_views(model.weights)
    assert set(weights) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            weights[name], parameter.data, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, tensor in trainer._model.module.named_parameters():
        assert torch.equal(tensor, before[name]), f"the shared base changed at {name}"


def test_k_targets_per_position_equal_a_sum_over_k(new_trainer: NewTrainer, folders: Folders) -> None:
    trainer = new_trainer("qwen3-untied", micro_batch_tokens=12)
    add(trainer, "m", SPECS["all"])
    adapter: Adapter = trainer._models["m"].weights
    rng = np.random.default_rng(3)
    data = [random_datum(rng, 7, width=5), random_datum(rng, 6, width=0), random_datum(rng, 3, width=1)]
    data[0].targets[2] = data[0].targets[2, 0]
    [output] = outputs(trainer, ModelCall("m", as_call(data)))

    module = reference.peft_module(folders("qwen3-untied"), adapter)
    expected = torch.cat([reference.logprobs(module, datum).reshape(-1) for datum in data])
    np.testing.assert_allclose(output.logprobs_M, expected.detach().numpy(), atol=1e-5)
    reference.cross_entropy(module, data).backward()
    gradients = adapter.layout.named_views(adapter.grad)
    for name, parameter in reference.lora_parameters(module).items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_fresh_adapter_is_initialised_as_peft_would_and_by_its_seed_alone(new_trainer: NewTrainer) -> None:
    trainer = new_trainer()
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        trainer.add(name, ModelSpec(rank=8, seed=seed))
    one, same, other = (trainer._models[name].weights.weights for name in ("one", "same", "other"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    layout = trainer._models["one"].weights.layout
    for name, view in layout.named_views(one).items():
        if ".lora_B." in name:
            assert not view.any()
        else:
            bound = view.shape[1] ** -0.5
            assert view.abs().max() <= bound
            assert view.abs().max() > 0.95 * bound
