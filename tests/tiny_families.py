"""Tiny random models of all families that are served, for tests and benchmarks. Knows nothing of our own code."""

from collections.abc import Callable

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
"""Both kinds of layers, each with a rope of its own."""

GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN3_MOE = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
    "tie_word_embeddings": False,
}
"""Keys that are wider than values, and as many key/value heads as query heads; no experts."""

DEEPSEEK_MOE = LATENT | {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
DELTA = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rms_norm_eps": 0.02,
    "tie_word_embeddings": False,
}
"""One layer with a recurrent state, one with gated attention. A delta net's output is normalised, however small it is:
with the usual epsilon, fp32 leaves 1e-4 of difference between one way to add up and another."""

SHARED_EXPERT = {
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 20,
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen2-biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **QWEN3_MOE, tie_word_embeddings=False)),
    "qwen3-moe-mixed": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **QWEN3_MOE, mlp_only_layers=[0], norm_topk_prob=True, tie_word_embeddings=True)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **GPT_OSS, tie_word_embeddings=False)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5, tie_word_embeddings=False)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA)),
    "deepseek-mla": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZES | LATENT))),
    "deepseek-moe": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZES | DEEPSEEK_MOE))),
    "qwen3-next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **DELTA, mlp_only_layers=[0, 1])),
    "qwen3-next-moe": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(**SIZES, **DELTA, **SHARED_EXPERT, mlp_only_layers=[1])
    ),
    "qwen3.5-moe": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**SIZES, **DELTA, **SHARED_EXPERT)),
    "qwen3.5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES, **DELTA)),
    "phi3-fused": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, tie_word_embeddings=False)),
}

MIXTURES = ["qwen3-moe", "qwen3-moe-mixed", "gpt-oss", "deepseek-moe"]
RECURRENT = ["qwen3-next", "qwen3.5", "qwen3-next-moe", "qwen3.5-moe"]
BEYOND_LLAMA = [*MIXTURES, "gemma3", "deepseek-mla", *RECURRENT]
"""The families whose layers are not those of Llama with other numbers."""

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
"""Sizes at which a matrix product of few rows rounds differently from one of many."""


BROAD = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1}
"""Sizes at which products of hundreds of rows round differently, with two threads those of dozens."""


def wide() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**(SIZES | WIDE), head_dim=32, tie_word_embeddings=True))


def broad() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**(SIZES | BROAD), head_dim=32, tie_word_embeddings=True))


SIZED = {"wide": wide, "broad": broad}


def randomize(module: PreTrainedModel, seed: int) -> None:
    """Larger weights than the usual initialisation, norms and biases included: mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
