"""Mixtures of experts: LoRA pairs of every expert, routing, biases, attention sinks.

What holds for every family (training as with PEFT and torch, sampled logprobs, files) is tested with the others.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.parity.conftest import Bases, NewTrainer, saved_and_loaded
from tests.parity.reference import SPECS, as_call, random_datum
from tests.parity.sampling_lab import lora, new_sampler, prompt, run, sample
from tests.parity.training_lab import FULL, add
from tests.tiny_families import MIXTURES, QWEN3_MOE, SIZES
from tinsmith.models.attention import Heads, PackedAttention
from tinsmith.models.experts import MultiAdapterExperts
from tinsmith.models.full import FullModel
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Segment
from tinsmith.models.weights import LoraWeights, load_weights, save_weights
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

EACH = pytest.mark.parametrize("family", MIXTURES)


def wide_mixture() -> PreTrainedModel:
    """Sizes at which a product of few rows rounds differently from one of many, and experts with few rows."""
    sizes = SIZES | {"hidden_size": 512, "num_hidden_layers": 1}
    config = Qwen3MoeConfig(**sizes, **(QWEN3_MOE | {"num_experts": 16, "moe_intermediate_size": 512}))
    return Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("wide")
    return saved_and_loaded(wide_mixture(), folder)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tenant_gets_the_same_bits_alone_and_in_company(wide_base: BaseModel, checkpointing: bool) -> None:
    rng = np.random.default_rng(4)
    specs = {"a": ModelSpec(rank=3, seed=1), "b": SPECS["mlp"], "c": SPECS["attention"], "d": ModelSpec(8, 5)}
    calls = {name: as_call([random_datum(rng, size) for size in (7, 12)]) for name in specs}
    options = {"micro_batch_tokens": 1000, "max_adapters": 8, "max_rank": 8, "gradient_checkpointing": checkpointing}
    together = TorchTrainer(wide_base, **options)
    for name, spec in specs.items():
        add(together, name, spec)
    results = together.forward_backward([ModelCall(name, call) for name, call in calls.items()])
    for (name, spec), result in zip(specs.items(), results, strict=True):
        alone = TorchTrainer(wide_base, **options)
        add(alone, name, spec)
        [expected] = alone.forward_backward([ModelCall(name, calls[name])])
        np.testing.assert_array_equal(result.logprobs_M, expected.logprobs_M)
        gradients = [trainer._models[name].weights.grad for trainer in (together, alone)]
        assert gradients[0].any()
        assert torch.equal(*gradients), name


def test_a_sample_has_the_same_tokens_and_logprobs_alone_and_in_company(wide_base: BaseModel) -> None:
    weights = {"small": lora(wide_base, ModelSpec(rank=2, seed=1)), "large": lora(wide_base, ModelSpec(8, 2), seed=3)}
    calls = [sample("own", prompt(9), "small", max_tokens=8, seed=5)]
    calls += [sample(f"{name}-{n}", prompt(n), name, seed=n) for name in ("base", "small", "large") for n in (3, 20)]
    outputs = []
    for batch in (calls[:1], calls):
        sampler = new_sampler(wide_base)
        for name, own in weights.items():
            sampler.publish(name, own)
        outputs.append(run(sampler, *batch))
    alone, together = outputs[0], outputs[1][0]
    assert alone.tokens_S.tolist() == together.tokens_S.tolist()
    np.testing.assert_allclose(alone.logprobs_S, together.logprobs_S, atol=2e-5, rtol=0)


@EACH
def test_a_saved_adapter_is_the_same_when_loaded(family: str, bases: Bases, tmp_path: Path) -> None:
    weights = lora(bases(family), SPECS["all"])
    save_weights(weights, tmp_path)
    loaded = load_weights(bases(family), tmp_path)
    assert isinstance(loaded, LoraWeights)
    assert torch.equal(loaded.adapter.weights, weights.adapter.weights)


def test_a_full_models_experts_lie_where_a_gpu_can_read_them(bases: Bases) -> None:
    model = FullModel(FULL, bases("gpt-oss").full_copy(trainable=True))
    for name, parameter in model.module.named_parameters():
        if parameter.ndim == 3:
            offset = (parameter.data_ptr() - model.compute.data_ptr()) // parameter.itemsize
            assert offset % 8 == 0, name


def test_a_full_models_buffers_are_saved_and_loaded(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer("deepseek-moe")
    for name in "mn":
        trainer.add(name, FULL)
    path = "model.layers.1.mlp.gate.e_score_correction_bias"
    buffers = [trainer._models[name].weights.module.get_buffer(path) for name in "mn"]
    buffers[0].add_(1.0)
    trainer.save("m", tmp_path, optimizer=False)
    trainer.load("n", tmp_path, optimizer=False)
    assert torch.equal(*buffers)
    loaded = load_weights(trainer._model, tmp_path)
    assert torch.equal(loaded.module.get_buffer(path), buffers[0])


def test_experts_without_rows_get_no_gradient_and_routers_no_adapter(new_trainer: NewTrainer) -> None:
    trainer = new_trainer("qwen3-moe")
    add(trainer, "m", SPECS["mlp"])
    adapter = trainer._models["m"].weights
    assert not any(".gate." in name for name in adapter.layout.names)
    datum = random_datum(np.random.default_rng(5), 2)
    trainer.forward_backward([ModelCall("m", as_call([datum]))])
    name = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    by_expert = adapter.layout.named_views(adapter.grad)[name].view(6, -1)
    assert 2 <= int(by_expert.any(1).sum()) <= 4


def test_a_strangers_rows_that_are_not_finite_stay_its_own(bases: Bases) -> None:
    model = bases("qwen3-moe")
    experts = next(module for module in model.module.modules() if isinstance(module, MultiAdapterExperts))
    rows_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    choice_TK = torch.tensor([[0, 1], [0, 2], [3, 0], [1, 2], [4, 5]])
    weights_TK = torch.full((5, 2), 0.5)
    results = []
    for broken in (False, True):
        x_TD = rows_TD.clone()
        x_TD[0] = torch.nan if broken else 0.0
        x_TD.requires_grad_()
        model._current.segments = [Segment(None, 0, 1), Segment(model.new_adapter(SPECS["mlp"]), 1, 5, trains=False)]
        output_TD = experts(x_TD, choice_TK, weights_TK)
        output_TD[1:].sum().backward()
        results.append((output_TD[1:].detach(), x_TD.grad[1:]))
    for sound, beside_broken in zip(*results, strict=True):
        assert torch.equal(sound, beside_broken)


OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)),
    "glm4-moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
    ),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_of_fused_experts_are_served(kind: str, tmp_path: Path) -> None:
    model = saved_and_loaded(OTHERS[kind](), tmp_path)
    targets = {target.path.rpartition("layers.1.")[2] for target in model.targets}
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= targets
    assert not any(path.endswith(("mlp.gate", "shared_expert_gate")) for path in targets)


@pytest.mark.parametrize("window", [None, 4])
def test_a_sink_takes_its_share_of_every_rows_attention(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    heads_HTd = [torch.randn(heads, 14, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    sinks_H = torch.randn(4, generator=generator, requires_grad=True)
    upstream_THd = torch.randn(14, 4, 8, generator=generator)
    inputs = [*heads_HTd, sinks_H]
    output_THd = PackedAttention([0, 3, 14])(0, Heads(*heads_HTd, 0.3, window, sinks_H))
    gradients = torch.autograd.grad(output_THd, inputs, upstream_THd)

    query, key, value = (part if len(part) == 4 else part.repeat_interleave(2, 0) for part in heads_HTd)
    rows = torch.arange(14)
    sequence = (rows >= 3).long()
    visible = (rows[:, None] >= rows) & (sequence[:, None] == sequence)
    visible &= rows[:, None] - rows < (window or 14)
    scores = (0.3 * query @ key.mT).masked_fill(~visible, -torch.inf)
    weights = torch.cat([scores, sinks_H[:, None, None].expand(-1, 14, 1)], -1).softmax(-1)[..., :-1]
    expected_THd = (weights @ value).transpose(0, 1)
    torch.testing.assert_close(output_THd, expected_THd)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected_THd, inputs, upstream_THd))


def test_a_token_costs_the_activations_of_the_experts_that_it_passes_through(bases: Bases) -> None:
    attention = 32 + 64 + 2 * (32 + 32) + 64 + 32
    one_expert = 32 + 48 + 24 + 32
    model = bases("qwen3-moe")
    assert model.activation_bytes == 2 * 4 * 2 * (attention + 2 * one_expert)
