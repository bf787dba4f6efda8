"""Running a sampler in tests: calls with few words, a check of the cache after every step, and exact references."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.parity.reference import full_module, peft_module, warm
from tinsmith.errors import TinsmithError
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import FullWeights, LoraWeights
from tinsmith.protocols import ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.wire.packing import SampleCall, SampleOutput

VOCAB = 97
END = 3
"""The tokenizer's end-of-sequence token."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token i reads "ti" (with a space between tokens); its own end-of-sequence token is `END`."""
    inner = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCAB)}, unk_token="t0"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"t{END}")


def new_sampler(model: BaseModel, **overrides: Any) -> TorchSampler:
    options: dict[str, Any] = {"kv_tokens": 1024, "max_running": 16, "block_size": 8} | overrides
    return TorchSampler(model, word_tokenizer(), **options)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(4, VOCAB, length).astype(np.int32)


def sample(request_id: str, tokens: Iterable[int], snapshot: str = "base", tenant: str = "a", **options: Any) -> Any:
    """A call that never stops early unless asked to."""
    options = {"seed": 1, "max_tokens": 12, "stop_at_eos": False} | options
    return SnapshotCall(request_id, snapshot, tenant, SampleCall(np.array(list(tokens), np.int32), **options))


def drain(sampler: TorchSampler, steps: int = 2000) -> dict[str, SampleOutput | TinsmithError]:
    """Steps until nothing is left, checking the books each time."""
    results = {}
    for _ in range(steps):
        for finished in sampler.step():
            assert finished.request_id not in results
            results[finished.request_id] = finished.output
        sampler.check()
        if not sampler.load:
            return results
    raise AssertionError(f"{sampler.load} requests are left after {steps} steps")


def run(sampler: TorchSampler, *calls: SnapshotCall) -> Any:
    """The outputs of the calls, submitted together; a single one bare."""
    for call in calls:
        sampler.submit(call)
    results = drain(sampler)
    return results[calls[0].request_id] if len(calls) == 1 else [results[call.request_id] for call in calls]


def sequences(output: SampleOutput) -> list[list[int]]:
    bounds = output.offsets.tolist()
    return [output.tokens_S[start:end].tolist() for start, end in pairwise(bounds)]


def lora(model: BaseModel, spec: ModelSpec, seed: int = 7) -> LoraWeights:
    adapter = model.new_adapter(spec)
    warm(adapter, seed)
    return LoraWeights(adapter, model.folder)


def full(model: BaseModel, seed: int = 5) -> FullWeights:
    """The base with changed weights."""
    module = model.full_copy(trainable=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return FullWeights(module)


def reference(folder: Path, weights: LoraWeights | FullWeights | None) -> nn.Module:
    """The same weights in a Hugging Face (and PEFT) module of their own."""
    if isinstance(weights, LoraWeights):
        return peft_module(folder, weights.adapter)
    module = full_module(folder)
    if isinstance(weights, FullWeights):
        module.load_state_dict(weights.module.state_dict())
    return module


@torch.no_grad()
def all_logprobs(module: nn.Module, tokens: Iterable[int], temperature: float = 1.0) -> torch.Tensor:
    """[T, V]: row i is the distribution of token i + 1."""
    logits = module(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].double()
    return (logits / temperature).log_softmax(-1)


def expected_logprobs(module: nn.Module, start: np.ndarray, tokens: list[int], temperature: float) -> np.ndarray:
    """Logprobs of `tokens` after the prompt `start`, from one forward pass over all of it."""
    table = all_logprobs(module, [*start.tolist(), *tokens], temperature)[len(start) - 1 : -1]
    return table.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
