"""Losses end to end: what the trainer adds to a gradient equals autograd through a PEFT module and the bare formula."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.parity import reference
from tests.parity.conftest import Folders, NewTrainer
from tests.parity.reference import SPECS, Datum, as_call, random_datum
from tests.parity.training_lab import add, outputs
from tinsmith.protocols import ModelCall
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.losses import LOSSES

pytestmark = reference.PEFTS_WARNINGS

CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.6, "clip_high_threshold": 1.5},
    "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3},
    "dro": {"beta": 0.3},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.6},
    "stable_reinforce": {"clip_high_threshold": 1.2, "kl_coeff": 0.4},
}


def formula(loss: str, lp: Tensor, given: dict[str, Tensor], c: dict[str, float]) -> Tensor:
    """One datum's loss, from the API's documentation."""
    if loss == "cross_entropy":
        return -(given["weights"] * lp).sum()
    q, a = given["logprobs"], given["advantages"]
    r = torch.exp(lp - q)
    low, high = (
        given.get(name, torch.tensor(c.get(name, 0.0))) for name in ("clip_low_threshold", "clip_high_threshold")
    )
    if loss == "gspo":
        mask = given["sequence_ratio_mask"]
        s = ((lp.detach() - q) * mask).sum() / mask.sum().clamp(min=1)
        r = torch.exp(s + lp - lp.detach())
    match loss:
        case "importance_sampling":
            return -(r * a).sum()
        case "ppo" | "gspo":
            return -torch.minimum(r * a, torch.maximum(torch.minimum(r, high), low) * a).sum()
        case "cispo":
            return -(torch.maximum(torch.minimum(r, high), low).detach() * lp * a).sum()
        case "dro":
            return -(lp * a - 0.5 * c["beta"] * (lp - q) ** 2).sum()
        case _:
            return (-torch.minimum(r, high).detach() * a * lp + c["kl_coeff"] * 0.5 * (lp - q) ** 2).sum()


def trainer_with_adapter(new_trainer: NewTrainer, folders: Folders) -> tuple[TorchTrainer, nn.Module]:
    """A trainer with the model `m`, and the same adapter in a PEFT module."""
    trainer = new_trainer("qwen3-untied", micro_batch_tokens=24)
    add(trainer, "m", SPECS["all"])
    return trainer, reference.peft_module(folders("qwen3-untied"), trainer._models["m"].weights)


def near_the_sampler(module: nn.Module, data: Sequence[Datum]) -> None:
    """Sampler's logprobs whose ratios lie on both sides of every bound."""
    for number, datum in enumerate(data):
        with torch.no_grad():
            lp = reference.logprobs(module, datum).numpy()
        noise = np.random.default_rng(number).normal(scale=0.5, size=lp.shape)
        datum.inputs["logprobs"] = (lp + noise).astype(np.float32)


def assert_gradient(trainer: TorchTrainer, module: nn.Module, loss: Tensor) -> None:
    module.zero_grad()
    loss.backward()
    adapter = trainer._models["m"].weights
    gradients = adapter.layout.named_views(adapter.grad)
    for name, parameter in reference.lora_parameters(module).items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("per_token", [False, True], ids=["settings", "per token"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_losses_gradient_equals_autograd_through_peft(
    loss: str, per_token: bool, new_trainer: NewTrainer, folders: Folders
) -> None:
    trainer, module = trainer_with_adapter(new_trainer, folders)
    rng = np.random.default_rng(1)
    data = [random_datum(rng, length, LOSSES[loss].inputs) for length in (9, 14, 3, 11)]
    if "logprobs" in LOSSES[loss].inputs:
        near_the_sampler(module, data)
    if per_token:
        for name, start in (("clip_low_threshold", 0.5), ("clip_high_threshold", 1.05)):
            if name in LOSSES[loss].optional:
                for datum in data:
                    datum.inputs[name] = (start + 0.4 * rng.random(len(datum.tokens))).astype(np.float32)
    [output] = outputs(trainer, ModelCall("m", as_call(data, loss, **CONFIGS[loss])))

    losses = [
        formula(
            loss,
            reference.logprobs(module, datum),
            {name: torch.from_numpy(values) for name, values in datum.inputs.items()},
            CONFIGS[loss],
        )
        for datum in data
    ]
    total = torch.stack(losses).sum()
    assert output.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-4, abs=1e-4)
    assert_gradient(trainer, module, total)


def dpo(chosen: Tensor, rejected: Tensor, frozen: Sequence[float], beta: float = 0.5) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290), of two sequences' logprobs and their reference's."""
    return -torch.nn.functional.logsigmoid(beta * ((chosen.sum() - frozen[0]) - (rejected.sum() - frozen[1])))


def test_a_loss_that_the_client_differentiates_trains_as_if_the_server_knew_it(
    new_trainer: NewTrainer, folders: Folders
) -> None:
    trainer, module = trainer_with_adapter(new_trainer, folders)
    rng = np.random.default_rng(2)
    pair = [random_datum(rng, 8), random_datum(rng, 12)]
    frozen = (-40.0, -52.0)
    for datum in pair:
        datum.inputs["weights"][:] = 0
    [forward] = outputs(trainer, ModelCall("m", as_call(pair, forward_only=True)))
    leaves = [torch.tensor(part, requires_grad=True) for part in np.split(forward.logprobs_M, [8])]
    dpo(*leaves, frozen).backward()
    for datum, leaf in zip(pair, leaves, strict=True):
        assert leaf.grad is not None
        datum.inputs["weights"][:] = -leaf.grad.numpy()
    assert (pair[0].inputs["weights"] > 0).all()
    assert (pair[1].inputs["weights"] < 0).all()
    [backward] = outputs(trainer, ModelCall("m", as_call(pair)))
    assert np.array_equal(backward.logprobs_M, forward.logprobs_M)
    assert_gradient(trainer, module, dpo(*(reference.logprobs(module, datum) for datum in pair), frozen))
