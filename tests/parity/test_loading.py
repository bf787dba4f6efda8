"""Which models are served, and the reasons given for the others."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.parity.conftest import Bases, Folders, NewTrainer, load
from tests.parity.reference import SPECS, as_call, random_datum, warm
from tests.tiny_families import FAMILIES, SIZES, randomize
from tinsmith.errors import ConfigError, UserError
from tinsmith.models.attention import CacheShape, Heads, PackedAttention
from tinsmith.models.lora import Segment
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

KEYS_AND_VALUES = {"deepseek-mla": (4, 20, 16), "deepseek-moe": (4, 20, 16)} | dict.fromkeys(
    ("llama", "qwen2-biases", "mistral-window", "phi3-fused"), (2, 8, 8)
)

LONG_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "logits scaled": (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)), "does not know of"),
    "softcap": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)), "softcap"),
    "mixture of experts": (
        lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES, num_local_experts=4)),
        "mixture of experts",
    ),
    "other layout": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2)), "model.layers"),
    "rope by length": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LONG_ROPE)), "dynamic"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_be_computed_wrongly_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    module = make()
    randomize(module, seed=0)
    module.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load"):
        load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_tells_its_sizes(family: str, bases: Bases) -> None:
    model = bases(family)
    assert (model.vocab_size, model.max_context, model.num_layers) == (97, 256, 2)
    heads, key_dim, value_dim = KEYS_AND_VALUES.get(family, (2, 16, 16))
    layers = (1,) if family.startswith(("qwen3-next", "qwen3.5")) else (0, 1)
    assert model.cache_shape == CacheShape(layers, heads, key_dim, value_dim)
    assert model.parameters == sum(parameter.numel() for parameter in model.full_copy(trainable=False).parameters())


@pytest.mark.parametrize("spec", [SPECS["all"], ModelSpec(rank=0, seed=0)], ids=["lora", "full"])
def test_a_low_precision_model_trains_float32_weights(spec: ModelSpec, folders: Folders) -> None:
    call = as_call([random_datum(np.random.default_rng(0), length) for length in (9, 20)])
    logprobs, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = TorchTrainer(load(folders("llama"), dtype), micro_batch_tokens=20, max_adapters=2, max_rank=8)
        trainer.add("m", spec)
        weights = trainer._models["m"].weights
        assert (weights.weights.dtype, weights.compute.dtype) == (torch.float32, dtype)
        [output] = trainer.forward_backward([ModelCall("m", call)])
        logprobs.append(output.logprobs_M)
        gradients.append(weights.grad.clone())
        trainer.optim_step("m", AdamParams(learning_rate=0.01))
        assert torch.equal(weights.compute, weights.weights.to(dtype))
    assert trainer.capabilities().dtype == "bfloat16"
    np.testing.assert_allclose(*logprobs, atol=0.15)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_window_limits_what_a_packed_row_sees() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, 14, 8) for heads in (4, 2, 2))
    bounds = [0, 3, 14]
    output_THd = PackedAttention(bounds)(0, Heads(query, key, value, 0.3, 4))
    for start, end in itertools.pairwise(bounds):
        for row in range(start, end):
            seen = slice(max(start, row - 3), row + 1)
            for head in range(4):
                weights = (0.3 * query[head, row] @ key[head // 2, seen].T).softmax(0)
                torch.testing.assert_close(output_THd[row, head], weights @ value[head // 2, seen])


def test_the_hidden_states_of_a_sequence_do_not_depend_on_its_neighbours(bases: Bases) -> None:
    model = bases("qwen3-tied")
    adapters = [model.new_adapter(SPECS["all"]) for _ in range(2)]
    for seed, adapter in enumerate(adapters):
        warm(adapter, seed)
    tokens = torch.randint(97, (50,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(30)])
    with torch.no_grad():
        segments = [Segment(adapters[0], 0, 20), Segment(adapters[1], 20, 50)]
        both = model.hidden(tokens, positions, segments, PackedAttention([0, 20, 50]))
        second = model.hidden(tokens[20:], positions[20:], [Segment(adapters[1], 0, 30)], PackedAttention([0, 30]))
    assert torch.equal(both[20:], second)


def test_a_trainer_refuses_models_beyond_its_limits(new_trainer: NewTrainer) -> None:
    trainer = new_trainer(max_adapters=2, max_rank=8)
    trainer.add("m", SPECS["all"])
    for spec, complaint in (
        (ModelSpec(rank=9, seed=0), "rank 9"),
        (ModelSpec(rank=4, seed=0, optimizer="dimuon"), "dimuon"),
        (ModelSpec(rank=4, seed=0, train_attn=False, train_mlp=False, train_unembed=False), "at least one"),
    ):
        with pytest.raises(UserError, match=complaint):
            trainer.add("n", spec)
    with pytest.raises(UserError, match="exists already"):
        trainer.add("m", SPECS["all"])
    trainer.add("n", SPECS["mlp"])
    with pytest.raises(UserError, match="2 models already"):
        trainer.add("o", SPECS["mlp"])
    trainer.drop("n")
    trainer.add("o", SPECS["mlp"])
