"""Attention of sequences that continue others on a CUDA device, and a whole training of samples that share a prompt."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, INTERPRETED
from tests.parity.conftest import load
from tests.parity.reference import SPECS, as_call
from tests.parity.test_shared_prefixes import samples
from tests.parity.training_lab import FULL, add, gradient, outputs
from tinsmith.models.attention import Heads, PackedAttention
from tinsmith.models.attention_kernels import merge_attention
from tinsmith.models.fused_attention import AttentionChoice, SharedPrefixAttention
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

pytestmark = pytest.mark.gpu
WIDTH, SCALE = 64, 0.125
LENGTHS, PREFIXES = [200, 7, 130, 64, 33, 90, 1, 5], [-1, 0, 0, -1, -1, 4, 4, 4]
needs_device = pytest.mark.skipif(INTERPRETED, reason="torch's attention kernels need a CUDA device")


def random_heads(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries of 14 heads, keys and values of 2, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, WIDTH) for heads in (14, 2, 2, 14)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def packed() -> PackedAttention:
    return PackedAttention([0, *np.cumsum(LENGTHS).tolist()], PREFIXES)


def expected(inputs: list[Tensor], dout_THd: Tensor) -> list[Tensor]:
    """Output and gradients by autograd in float32."""
    leaves = [each.float().requires_grad_() for each in inputs]
    out_THd = packed()(0, Heads(*(leaf.transpose(0, 1) for leaf in leaves), SCALE))
    return [out_THd.detach(), *torch.autograd.grad(out_THd, leaves, dout_THd.float())]


def distance(ours: Tensor, true: Tensor) -> float:
    return float((ours.float() - true).norm() / true.norm())


@needs_device
def test_rows_see_what_their_sequence_continues_forward_and_backward() -> None:
    *inputs, dout_THd = random_heads(torch.bfloat16, DEVICE)
    attention = AttentionChoice().of(packed(), DEVICE)
    assert isinstance(attention, SharedPrefixAttention)
    out_THd, saved = attention.forward(*inputs, SCALE)
    gradients = attention.backward(dout_THd, (inputs[0], inputs[1], inputs[2]), out_THd, saved, SCALE)
    for ours, true in zip((out_THd, *gradients), expected(inputs, dout_THd), strict=True):
        assert distance(ours, true) < 0.01


@pytest.mark.parametrize("heads", [14, 32])
def test_two_attentions_merge_to_that_over_both_sets_of_keys(heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [3 * torch.randn(heads, rows, 9, generator=generator).to(DEVICE) for rows in (6, 4)]
    values = [torch.randn(9, WIDTH, generator=generator).to(DEVICE) for _ in range(2)]
    rows = torch.tensor([5, 0, 2, 3], device=DEVICE)
    parts = [(each.softmax(-1) @ value).transpose(0, 1) for each, value in zip(scores, values, strict=True)]
    out, more = (part.contiguous() for part in parts)
    logsumexp, more_logsumexp = (each.logsumexp(-1) for each in scores)
    both = torch.cat([scores[0][:, rows], scores[1]], -1)
    true, true_logsumexp = out.clone(), logsumexp.clone()
    true[rows] = (both.softmax(-1) @ torch.cat(values)).transpose(0, 1)
    true_logsumexp[:, rows] = both.logsumexp(-1)
    merge_attention(out, logsumexp, more, more_logsumexp, rows)
    torch.testing.assert_close(out, true, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logsumexp, true_logsumexp, atol=1e-5, rtol=1e-5)


def trained(folder: Path, dtype: torch.dtype, spec: ModelSpec, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Logprobs and gradient of samples of two prompts, together or datum by datum."""
    trainer = TorchTrainer(load(folder, dtype, "cuda"), micro_batch_tokens=1024, max_adapters=2, max_rank=32)
    add(trainer, "m", spec)
    calls = [[datum] for datum in samples()] if apart else [samples()]
    results = [outputs(trainer, ModelCall("m", as_call(data)))[0] for data in calls]
    return torch.from_numpy(np.concatenate([each.logprobs_M for each in results])), gradient(trainer, "m").cpu()


@needs_device
@pytest.mark.parametrize("spec", [SPECS["all"], SPECS["attention"], FULL], ids=["all", "attention", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "gemma3"])
def test_samples_that_share_a_prompt_train_as_well_as_alone(
    family: str, spec: ModelSpec, folders: Callable[[str], Path]
) -> None:
    """In bfloat16 as far from float32 as datum by datum, times 1.3."""
    true, alone, shared = (
        trained(folders(family), dtype, spec, apart=apart)
        for dtype, apart in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False))
    )
    for ours, theirs, exact in zip(shared, alone, true, strict=True):
        assert distance(ours, exact) <= max(1.3 * distance(theirs, exact), 0.01)
