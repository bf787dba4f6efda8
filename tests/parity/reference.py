"""What our results are compared with: Hugging Face and PEFT modules run one datum at a time, and torch.optim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tinsmith.models.lora import Adapter
from tinsmith.protocols import AdamParams, ModelSpec
from tinsmith.wire.packing import TrainCall

PEFTS_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]
"""Marks for tests that use PEFT: its own warnings, about transformers and about tied embeddings."""

ATTN = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
]
MLP = ["gate_proj", "up_proj", "down_proj", "gate_up_proj"]


@dataclass(frozen=True)
class Datum:
    """Tokens [N], targets [N] or [N, K], and loss inputs of the targets' shape."""

    tokens: list[int]
    targets: np.ndarray
    inputs: dict[str, np.ndarray]


def random_datum(rng: np.random.Generator, length: int, names: Sequence[str] = ("weights",), width: int = 0) -> Datum:
    """Logprobs around those of a small vocabulary, advantages and weights of both signs."""
    shape = (length, width) if width else (length,)
    inputs = {}
    for name in names:
        values = rng.normal(size=shape)
        if name == "logprobs":
            values = -4.5 + values
        if name == "sequence_ratio_mask":
            values = (rng.random(shape) < 0.7).astype(float)
        inputs[name] = values.astype(np.float32)
    tokens = rng.integers(0, 97, length).tolist()
    return Datum(tokens, rng.integers(0, 97, shape).astype(np.int32), inputs)


def as_call(
    data: Sequence[Datum], loss: str = "cross_entropy", *, forward_only: bool = False, **config: float
) -> TrainCall:
    lengths = [len(datum.tokens) for datum in data]
    return TrainCall(
        loss=loss,
        config=dict(config),
        forward_only=forward_only,
        tokens_T=np.concatenate([np.array(datum.tokens, np.int32) for datum in data]),
        token_offsets=np.cumsum([0, *lengths]),
        targets_M=np.concatenate([datum.targets.reshape(-1) for datum in data]),
        target_offsets=np.cumsum([0, *(datum.targets.size for datum in data)]),
        widths_N=np.array([datum.targets.shape[1] if datum.targets.ndim == 2 else 0 for datum in data], np.int32),
        inputs={name: np.concatenate([datum.inputs[name].reshape(-1) for datum in data]) for name in data[0].inputs},
    )


def peft_module(folder: Path, adapter: Adapter) -> nn.Module:
    """A PEFT model with this adapter's weights; only they are trainable."""
    spec = adapter.spec
    targets = ATTN * spec.train_attn + MLP * spec.train_mlp + ["lm_head"] * spec.train_unembed
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    parameters = None
    if hasattr(module.config, "num_experts_per_tok"):
        # as modules, PEFT would take a linear layer beside experts for theirs
        targets = [name for name in targets if name not in MLP]
        parameters = [f"{name}.weight" for name in MLP] + ["experts.gate_up_proj", "experts.down_proj"]
        parameters = parameters if spec.train_mlp else None
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=targets,
        target_parameters=parameters,
        lora_dropout=0.0,
    )
    module = get_peft_model(module, config).eval()
    for name, parameter in lora_parameters(module).items():
        parameter.data.copy_(adapter.layout.named_views(adapter.weights)[name])
    return module


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by the names of our files."""
    return {
        name.replace(".default", "").replace(
            "base_model.model.lm_head", "base_model.model.model.unembed_tokens"
        ): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def full_module(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs(module: nn.Module, datum: Datum) -> Tensor:
    """[N] or [N, K], of one datum in a batch of its own."""
    logits = module(input_ids=torch.tensor([datum.tokens]), use_cache=False).logits[0].log_softmax(-1)
    targets = torch.from_numpy(datum.targets.astype(np.int64)).reshape(len(datum.tokens), -1)
    return logits.gather(1, targets).reshape(datum.targets.shape)


def cross_entropy(module: nn.Module, data: Sequence[Datum]) -> Tensor:
    losses = [-(torch.from_numpy(datum.inputs["weights"]) * logprobs(module, datum)).sum() for datum in data]
    return torch.stack(losses).sum()


def train(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], steps: Sequence[Sequence[Datum]], params: AdamParams
) -> list[float]:
    """One clipped AdamW step for every list of datums; returns the gradient norms before clipping."""
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    norms = []
    for data in steps:
        optimizer.zero_grad()
        cross_entropy(module, data).backward()
        limit = params.grad_clip_norm or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item())
        optimizer.step()
    return norms


def warm(adapter: Adapter, seed: int = 7) -> None:
    """B is zero in a fresh adapter, which would hide half of the gradients."""
    generator = torch.Generator().manual_seed(seed)
    adapter.weights.add_(0.05 * torch.randn(adapter.weights.shape, generator=generator).to(adapter.weights.device))
    adapter.weights_changed()


SPECS = {
    "all": ModelSpec(rank=8, seed=1),
    "attention": ModelSpec(rank=4, seed=2, train_mlp=False, train_unembed=False),
    "mlp": ModelSpec(rank=2, seed=3, train_attn=False, train_unembed=False),
    "unembedding": ModelSpec(rank=3, seed=4, train_attn=False, train_mlp=False),
}
