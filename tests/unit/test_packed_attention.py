"""Attention of packed sequences of which some continue others: what it computes, and what it keeps for backward."""

import itertools

import pytest
import torch
from torch import Tensor

from tinsmith.models.attention import Heads, PackedAttention

HEADS, KV_HEADS, WIDTH = 4, 2, 8
PROMPT, ANSWERS = 29, (5, 11, 5, 1)
LAYERS = 3


def heads_of(rows: int, window: int | None, sinks: bool) -> Heads:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(count, rows, WIDTH, generator=generator) for count in (HEADS, KV_HEADS, KV_HEADS))
    sinks_H = torch.randn(HEADS, generator=generator) if sinks else None
    return Heads(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), 0.3, window, sinks_H)


def shared() -> tuple[PackedAttention, int]:
    """A prompt, its answers, and a sequence of its own; and how many rows that is."""
    bounds = [0, *itertools.accumulate((PROMPT, *ANSWERS, 7))]
    return PackedAttention(bounds, [-1, *[0] * len(ANSWERS), -1]), bounds[-1]


@pytest.mark.parametrize("window", [None, 3, 31], ids=["whole", "window within answers", "window into the prompt"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_a_row_of_a_continued_sequence_sees_what_it_would_in_a_sequence_of_its_own(
    window: int | None, sinks: bool
) -> None:
    attention, rows = shared()
    heads = heads_of(rows, window, sinks)
    output_THe = attention(0, heads)
    start = PROMPT
    for answer in ANSWERS:
        rows_L = torch.tensor([*range(PROMPT), *range(start, start + answer)])
        whole = [part[:, rows_L] for part in (heads.query_HTd, heads.key_GTd, heads.value_GTe)]
        alone = PackedAttention([0, len(rows_L)])(0, Heads(*whole, 0.3, window, heads.sinks_H))
        torch.testing.assert_close(output_THe[rows_L], alone, atol=1e-6, rtol=1e-5)
        start += answer


def test_backward_keeps_one_mask_for_all_layers_and_all_answers_of_a_length() -> None:
    """Otherwise masks would take more memory than all the rest, which nobody has counted."""
    attention, rows = shared()
    heads = heads_of(rows, None, sinks=False)
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] in {(answer, PROMPT + answer) for answer in ANSWERS}:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for layer in range(LAYERS):
            attention(layer, heads)
    assert len(kept) == len(set(ANSWERS))
