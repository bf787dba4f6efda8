"""Training in packed batches equals Hugging Face, PEFT and torch.optim run alone and unpacked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import reference
from tests.parity.conftest import FAMILIES
from tests.parity.reference import SPECS, as_call, random_datum
from tinsmith.models.lora import Adapter
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainOutput

# PEFT's own, about transformers and about tied embeddings
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

PARAMS = AdamParams(learning_rate=0.003, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)


def outputs(trainer: TorchTrainer, *calls: ModelCall) -> list[TrainOutput]:
    results = trainer.forward_backward(calls)
    assert all(isinstance(result, TrainOutput) for result in results), results
    return results


def steps_of(rng: np.random.Generator, steps: int = 4) -> list[list[reference.Datum]]:
    return [[random_datum(rng, length) for length in (9, 1, 17, 4)] for _ in range(steps)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradients_equal_peft(
    family: str, checkpointing: bool, new_trainer: Callable[..., TorchTrainer], folders: Callable[[str], Path]
) -> None:
    trainer = new_trainer(family, gradient_checkpointing=checkpointing)
    trainer.add("m", SPECS["all"])
    adapter = trainer._models["m"].weights
    reference.warm(adapter)
    data = steps_of(np.random.default_rng(0), 1)[0]
    [output] = outputs(trainer, ModelCall("m", as_call(data)))

    module = reference.peft_module(folders(family), adapter)
    expected = torch.cat([reference.logprobs(module, datum) for datum in data])
    np.testing.assert_allclose(output.logprobs_M, expected.detach().numpy(), atol=1e-5)
    loss = reference.cross_entropy(module, data)
    loss.backward()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), abs=1e-4)
    gradients = adapter.layout.named_views(adapter.grad)
    parameters = reference.lora_parameters(module)
    assert set(parameters) == set(gradients)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weights_after_clipped_and_decayed_steps_equal_peft_and_torch(
    spec: ModelSpec, new_trainer: Callable[..., TorchTrainer], folders: Callable[[str], Path]
) -> None:
    trainer = new_trainer("qwen3-tied")
    trainer.add("m", spec)
    adapter = trainer._models["m"].weights
    module = reference.peft_module(folders("qwen3-tied"), adapter)
    steps = steps_of(np.random.default_rng(1))
    norms = []
    for data in steps:
        outputs(trainer, ModelCall("m", as_call(data)))
        norms.append(trainer.optim_step("m", PARAMS)["grad_norm"])

    parameters = reference.lora_parameters(module)
    assert norms == pytest.approx(reference.train(module, parameters, steps, PARAMS), rel=1e-4)
    assert min(norms) > PARAMS.grad_clip_norm
    weights = adapter.layout.named_views(adapter.weights)
    for name, parameter in parameters.items():
        torch.testing.assert_close(weights[name], parameter.data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3-tied", "llama", "qwen2-biases"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_full_parameter_model_trains_as_in_torch(
    family: str, checkpointing: bool, new_trainer: Callable[..., TorchTrainer], folders: Callable[[str], Path]
) -> None:
    trainer = new_trainer(family, gradient_checkpointing=checkpointing)
    trainer.add("m", ModelSpec(rank=0, seed=0))
    before = {name: tensor.clone() for name, tensor in trainer._model.module.named_parameters()}
    steps = steps_of(np.random.default_rng(2), 3)
    for data in steps:
        outputs(trainer, ModelCall("m", as_call(data)))
        trainer.optim_step("m", PARAMS)

    module = reference.full_module(folders(family))
    parameters = dict(module.named_parameters())
    reference.train(module, parameters, steps, PARAMS)
    model = trainer._models["m"].weights
    weights = model.layout.named_views(model.weights)
    assert set(weights) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            weights[name], parameter.data, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, tensor in trainer._model.module.named_parameters():
        assert torch.equal(tensor, before[name]), f"the shared base changed at {name}"


def test_k_targets_per_position_equal_a_sum_over_k(
    new_trainer: Callable[..., TorchTrainer], folders: Callable[[str], Path]
) -> None:
    trainer = new_trainer("qwen3-untied", micro_batch_tokens=12)
    trainer.add("m", SPECS["all"])
    adapter: Adapter = trainer._models["m"].weights
    reference.warm(adapter)
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


def test_a_fresh_adapter_is_initialised_as_peft_would_and_by_its_seed_alone(
    new_trainer: Callable[..., TorchTrainer],
) -> None:
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
