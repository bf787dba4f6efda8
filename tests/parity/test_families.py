"""Families beyond plain attention: Gemma 3, multi-head latent attention, gated delta nets.

What holds for every family (training as with PEFT and torch, sampled logprobs, files) is tested with the others.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from tests.parity import reference
from tests.parity.conftest import Bases, NewTrainer, saved_and_loaded
from tests.parity.reference import SPECS, as_call
from tests.parity.sampling_lab import full, lora, new_sampler, prompt, run, sample, sequences
from tests.parity.training_lab import add, data_of, gradient
from tests.tiny_families import DELTA, GEMMA, RECURRENT, SIZES
from tinsmith.errors import ConfigError, UserError
from tinsmith.models.delta_nets import run_by_sequence
from tinsmith.models.lora import CurrentPass
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

EACH = pytest.mark.parametrize("family", ["gemma3", "deepseek-mla", *RECURRENT])
EACH_RECURRENT = pytest.mark.parametrize("family", RECURRENT)


@EACH
def test_a_tenant_gets_the_same_alone_and_among_strangers_whatever_is_recomputed(
    family: str, new_trainer: NewTrainer
) -> None:
    results = []
    for strangers, checkpointing in ((0, False), (2, False), (2, True)):
        trainer = new_trainer(family, micro_batch_tokens=200, gradient_checkpointing=checkpointing)
        add(trainer, "m", SPECS["all"])
        calls = [ModelCall("m", as_call(data_of(3)))]
        for number in range(strangers):
            add(trainer, f"stranger {number}", ModelSpec(rank=4 + number, seed=number))
            calls.insert(number, ModelCall(f"stranger {number}", as_call(data_of(4 + number, (5, 30)))))
        outputs = trainer.forward_backward(calls)
        results.append((outputs[-1 if strangers < 2 else 2].logprobs_M, gradient(trainer, "m")))
    expected_logprobs, expected = results[0]
    for logprobs, grad in results[1:]:
        # The sigmoid of a shared expert's gate, one number per row, is rounded differently at the end of a batch.
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-6 if "moe" in family else 0, rtol=0)
        assert (grad - expected).norm() <= (1e-6 if "moe" in family else 0) * expected.norm()
    assert expected.any()


@EACH_RECURRENT
def test_weights_that_are_broken_stay_one_tenants_problem(family: str, new_trainer: NewTrainer) -> None:
    trainer, clean = new_trainer(family), new_trainer(family)
    for each in (trainer, clean):
        add(each, "broken", ModelSpec(rank=2, seed=0))
        add(each, "sound", SPECS["all"])
    trainer._models["broken"].weights.weights.fill_(float("nan"))
    call = as_call(data_of(4))
    broken, _ = trainer.forward_backward([ModelCall("broken", call), ModelCall("sound", call)])
    clean.forward_backward([ModelCall("sound", call)])
    assert isinstance(broken, UserError)
    expected = gradient(clean, "sound")
    assert (gradient(trainer, "sound") - expected).norm() <= (1e-6 if "moe" in family else 0) * expected.norm()
    assert not gradient(trainer, "broken").any()


@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5-moe"])
def test_samples_are_the_same_alone_after_preemption_and_among_strangers(family: str, bases: Bases) -> None:
    model = bases(family)
    weights = {"lora": lora(model, SPECS["all"]), "full": full(model)}
    call = sample("m", prompt(21), "lora", num_samples=4, max_tokens=20, seed=5)
    company = [
        sample(f"{name} {length}", prompt(length), name, num_samples=2, max_tokens=14, seed=length)
        for name, length in (("base", 1), ("lora", 2), ("full", 5), ("lora", 33))
    ]
    outputs = []
    for calls, options in (
        ([call], {}),
        ([*company, call], {"prefill_tokens": 20}),
        ([*company, call], {"kv_tokens": 64}),
    ):
        sampler = new_sampler(model, **options)
        for name, own in weights.items():
            sampler.publish(name, own)
        results = run(sampler, *calls)
        outputs.append(results if len(calls) == 1 else results[-1])
    for other in outputs[1:]:
        assert sequences(other) == sequences(outputs[0])
        np.testing.assert_allclose(other.logprobs_S, outputs[0].logprobs_S, atol=2e-5, rtol=0)
    assert len({tuple(tokens) for tokens in sequences(outputs[0])}) == 4


def test_a_recurrent_model_runs_every_prompt_from_its_beginning(bases: Bases) -> None:
    sampler = new_sampler(bases("qwen3.5"))
    first, again = (run(sampler, sample(name, prompt(50), max_tokens=20)) for name in ("first", "again"))
    assert again.cache_hit_tokens == 0
    assert again.tokens_S.tolist() == first.tokens_S.tolist()


def test_a_cancelled_or_broken_request_leaves_no_state_behind(bases: Bases) -> None:
    model = bases("qwen3-next")
    sampler = new_sampler(model)
    broken = lora(model, SPECS["all"])
    broken.adapter.weights.fill_(float("nan"))
    sampler.publish("broken", broken)
    sampler.submit(sample("a", prompt(12), num_samples=3))
    for _ in range(3):
        sampler.step()
    sampler.check()
    sampler.cancel("a")
    sampler.check()
    assert isinstance(run(sampler, sample("b", prompt(12), "broken", num_samples=3)), UserError)


def test_a_delta_net_that_keeps_its_state_in_another_way_is_refused(bases: Bases) -> None:
    class Forgetful(Qwen3NextGatedDeltaNet):
        def forward(self, hidden_states: torch.Tensor, cache_params: object = None) -> torch.Tensor:
            return super().forward(hidden_states)

    layer = Forgetful(bases("qwen3-next").config, 0)
    with pytest.raises(ConfigError, match="keeps its state"):
        run_by_sequence(layer, CurrentPass())


def conditional() -> dict[str, PreTrainedModel]:
    """Models that see pictures, whose text part is served."""
    qwen = Qwen3_5Config(
        text_config=SIZES | DELTA,
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    gemma = Gemma3Config(
        text_config=SIZES | GEMMA,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    return {"qwen3.5": Qwen3_5ForConditionalGeneration(qwen), "gemma3": Gemma3ForConditionalGeneration(gemma)}


@pytest.mark.parametrize("family", ["qwen3.5", "gemma3"])
def test_the_text_part_of_a_model_with_pictures_is_served(family: str, tmp_path: Path) -> None:
    module = conditional()[family].eval()
    trainer = TorchTrainer(saved_and_loaded(module, tmp_path), micro_batch_tokens=64, max_adapters=1, max_rank=8)
    trainer.add("m", SPECS["all"])
    data = data_of(5)
    [ours] = trainer.forward_backward([ModelCall("m", as_call(data, forward_only=True))])
    expected = torch.cat([reference.logprobs(module, datum) for datum in data])
    np.testing.assert_allclose(ours.logprobs_M, expected.detach().numpy(), atol=1e-5)
