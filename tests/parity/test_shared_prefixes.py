"""Datums that begin alike share rows in training: equal to PEFT and Hugging Face, which compute each of them alone."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.parity import reference
from tests.parity.conftest import Folders, NewTrainer
from tests.parity.reference import SPECS, Datum, as_call, random_datum
from tests.parity.training_lab import FULL, add, gradient, outputs
from tests.tiny_families import FAMILIES
from tinsmith.models.attention import Heads, PackedAttention
from tinsmith.protocols import ModelCall
from tinsmith.training.batching import cut
from tinsmith.training.shared_prefixes import LEAST_SHARED

pytestmark = reference.PEFTS_WARNINGS

PROMPT = LEAST_SHARED + 5


def samples(lengths: Sequence[int] = (5, 1, 9), seed: int = 0, width: int = 0) -> list[Datum]:
    """Continuations of two prompts in turn, with targets of their own in the prompts, and texts between them."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 97, (2, PROMPT)).tolist()
    data = []
    for length in lengths:
        for prompt in prompts:
            datum = random_datum(rng, PROMPT + length, ("weights",), width)
            data.append(Datum(prompt + datum.tokens[PROMPT:], datum.targets, datum.inputs))
        data.append(random_datum(rng, 7, ("weights",), width))
    return data


def share_rows(data: Sequence[Datum], budget: int) -> bool:
    call = as_call(data)
    return sum(piece.rows for piece in cut(0, call, budget, share=True)) < call.num_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_of_samples_that_share_a_prompt_equal_peft(
    family: str, new_trainer: NewTrainer, folders: Folders
) -> None:
    data = samples()
    trainers = [new_trainer(family, micro_batch_tokens=budget) for budget in (128, 1024)]
    for trainer in trainers:
        add(trainer, "m", SPECS["all"])
    module = reference.peft_module(folders(family), trainers[0]._models["m"].weights)
    expected = torch.cat([reference.logprobs(module, datum) for datum in data])
    loss = reference.cross_entropy(module, data)
    loss.backward()
    parameters = reference.lora_parameters(module)
    for trainer, budget in zip(trainers, (128, 1024), strict=True):
        assert share_rows(data, budget)
        [output] = outputs(trainer, ModelCall("m", as_call(data)))
        np.testing.assert_allclose(output.logprobs_M, expected.detach().numpy(), atol=1e-5)
        assert output.metrics["loss:sum"] == pytest.approx(loss.item(), abs=1e-4)
        adapter = trainer._models["m"].weights
        for name, view in adapter.layout.named_views(adapter.grad).items():
            assert (view - parameters[name].grad).norm() < 1e-5 * parameters[name].grad.norm(), name


def test_a_head_that_is_frozen_and_several_targets_for_each_token_may_share_rows(new_trainer: NewTrainer) -> None:
    data = samples(width=3)
    together, apart = (new_trainer(micro_batch_tokens=1024) for _ in range(2))
    for trainer in (together, apart):
        add(trainer, "m", SPECS["attention"])
    assert share_rows(data, 1024)
    [shared] = outputs(together, ModelCall("m", as_call(data)))
    alone = [outputs(apart, ModelCall("m", as_call([datum])))[0] for datum in data]
    np.testing.assert_allclose(shared.logprobs_M, np.concatenate([each.logprobs_M for each in alone]), atol=1e-5)
    assert (gradient(together, "m") - gradient(apart, "m")).norm() < 1e-5 * gradient(apart, "m").norm()


def test_all_weights_are_trained_alike_where_rows_are_shared(new_trainer: NewTrainer) -> None:
    data = samples()
    together, apart = (new_trainer(micro_batch_tokens=1024) for _ in range(2))
    for trainer in (together, apart):
        add(trainer, "m", FULL)
    [shared] = outputs(together, ModelCall("m", as_call(data)))
    alone = [outputs(apart, ModelCall("m", as_call([datum])))[0] for datum in data]
    np.testing.assert_allclose(shared.logprobs_M, np.concatenate([each.logprobs_M for each in alone]), atol=1e-5)
    assert (gradient(together, "m") - gradient(apart, "m")).norm() < 1e-5 * gradient(apart, "m").norm()


def test_a_call_that_fails_beside_samples_of_a_prompt_changes_no_gradient(new_trainer: NewTrainer) -> None:
    data, spoiled = samples(), samples(seed=1)
    spoiled[1].inputs["weights"][0] = np.inf
    beside, alone = (new_trainer(micro_batch_tokens=1024) for _ in range(2))
    for trainer in (beside, alone):
        for model_id in ("m", "other"):
            add(trainer, model_id, SPECS["all"])
    _, failed = beside.forward_backward([ModelCall("m", as_call(data)), ModelCall("other", as_call(spoiled))])
    assert isinstance(failed, Exception)
    outputs(alone, ModelCall("m", as_call(data)))
    torch.testing.assert_close(gradient(beside, "m"), gradient(alone, "m"), atol=1e-5, rtol=1e-4)
    assert not gradient(beside, "other").any()


def test_samples_for_which_memory_has_no_room_when_they_share_rows_are_computed_each_alone(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass that shares has copies of the prompt's keys and values, beside the rows that are counted."""
    data, attend = samples(), PackedAttention.__call__
    short, ample = (new_trainer(micro_batch_tokens=128) for _ in range(2))
    for trainer in (short, ample):
        add(trainer, "m", SPECS["all"])
    [expected] = outputs(ample, ModelCall("m", as_call(data)))

    def out_of_memory(attention: PackedAttention, layer: int, heads: Heads) -> torch.Tensor:
        if attention.prefixes is not None and layer:
            raise torch.OutOfMemoryError("no room for copies")
        return attend(attention, layer, heads)

    monkeypatch.setattr(PackedAttention, "__call__", out_of_memory)
    [output] = outputs(short, ModelCall("m", as_call(data)))
    np.testing.assert_allclose(output.logprobs_M, expected.logprobs_M, atol=1e-5)
    assert (gradient(short, "m") - gradient(ample, "m")).norm() < 1e-5 * gradient(ample, "m").norm()
