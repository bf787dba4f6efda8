"""Probing a model: the logprobs of a few short prompts, as Hugging Face's module computes them and as we do.

Whoever has changed a module's layers, or a model's files, compares the two. Knows no tolerances.

Shapes: `T` rows of a packed batch, `M` targets of all prompts.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinsmith.models.attention import Attention, PackedAttention
from tinsmith.models.head import HasHead, target_logprobs
from tinsmith.models.lora import Adapter, Segment

_LENGTHS = (11, 6)


class HasLayers(HasHead, Protocol):
    """What is asked of a base model."""

    device: torch.device

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        segments: Sequence[Segment],
        attention: Attention,
        module: nn.Module | None = None,
    ) -> Tensor:
        """[T, D] after the final norm."""


def probe_prompts(vocab_size: int, device: torch.device) -> list[Tensor]:
    """The same random tokens every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).to(device) for length in _LENGTHS]


@torch.no_grad()
def plain_logprobs(module: Any, prompts: Sequence[Tensor]) -> Tensor:
    """fp32 [M] of every token after the first of each prompt, by the module's own forward, one prompt at a time."""
    return torch.cat([_plain_logprobs(module, prompt_T) for prompt_T in prompts])


def _plain_logprobs(module: Any, prompt_T: Tensor) -> Tensor:
    logits_TV = module(input_ids=prompt_T[None], use_cache=False).logits[0].float()
    return logits_TV[:-1].log_softmax(-1).gather(1, prompt_T[1:, None])[:, 0]


@torch.no_grad()
def packed_logprobs(
    model: HasLayers, prompts: Sequence[Tensor], adapter: Adapter | None = None, module: nn.Module | None = None
) -> Tensor:
    """fp32 [M] of the same tokens, by our packed computation with an adapter, or of a full model's own module."""
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
    tokens_T = torch.cat(list(prompts))
    positions_T = torch.cat([torch.arange(len(prompt), device=model.device) for prompt in prompts])
    rows_M = [row for end, prompt in zip(ends, prompts, strict=True) for row in range(end - len(prompt), end - 1)]
    segments = [Segment(adapter, 0, len(tokens_T))]
    hidden_TD = model.hidden(tokens_T, positions_T, segments, PackedAttention([0, *ends]), module)
    rows = torch.tensor(rows_M, device=model.device)
    return target_logprobs(model, hidden_TD, segments, rows, tokens_T[rows + 1], module)
