"""The fused layers against the module's own, and both against float32: outputs and gradients of several tenants."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, DTYPE, INTERPRETED
from tests.parity.conftest import load
from tinsmith.models import fused as fused_module
from tinsmith.models.adapter_table import trainable_ranks
from tinsmith.models.attention import Heads, PackedAttention
from tinsmith.models.fused import FusedLayers
from tinsmith.models.fused_attention import AttentionChoice, FusedAttention
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, Segment
from tinsmith.protocols import ModelSpec

pytestmark = pytest.mark.gpu
SPECS = (
    ModelSpec(8, 1),
    ModelSpec(16, 2, train_mlp=False, train_unembed=False),
    ModelSpec(3, 3, train_attn=False),
    ModelSpec(32, 4, train_unembed=False),
)


class PlainAttention:
    """Stands in for the device's kernels where there are none: each sequence by torch's reference, and autograd."""

    def __init__(self, attention: PackedAttention) -> None:
        self._attention = attention

    def _attend(self, inputs: Sequence[Tensor], scale: float) -> Tensor:
        query, key, value = (each.transpose(0, 1) for each in inputs)
        return self._attention(0, Heads(query, key, value, scale))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, list[Tensor]]:
        return self._attend((query, key, value), scale), []

    def backward(
        self, dout: Tensor, inputs: Sequence[Tensor], out: Tensor, saved: Sequence[Tensor], scale: float
    ) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in inputs]
        with torch.enable_grad():
            return torch.autograd.grad(self._attend(leaves, scale), leaves, dout)


class PlainChoice(AttentionChoice):
    def of(self, attention: PackedAttention, device: torch.device) -> FusedAttention:
        return PlainAttention(attention)


def adapters(base: BaseModel) -> list[Adapter]:
    found = [base.new_adapter(spec) for spec in SPECS]
    for number, adapter in enumerate(found):
        generator = torch.Generator().manual_seed(number)
        adapter.weights.copy_(0.1 * torch.randn(adapter.weights.shape, generator=generator))
        adapter.weights_changed()
    return found


def run(base: BaseModel, fused: FusedLayers | None, lengths: Sequence[int]) -> list[Tensor]:
    """The hidden states of a packed batch of four tenants and nobody, and every tenant's gradient."""
    base.fused, base.groups_adapters = fused, False
    tenants = adapters(base)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    cuts = [ends[number * (len(lengths)) // 6] for number in range(7)]
    owners = [tenants[0], tenants[1], None, tenants[2], tenants[3], tenants[0]]
    segments = [Segment(*each) for each in zip(owners, cuts, cuts[1:], strict=False)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(base.vocab_size, (ends[-1],), generator=generator).to(base.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(base.device)
    hidden = base.hidden(tokens, positions, segments, PackedAttention(ends))
    upstream = torch.randn(hidden.shape, generator=generator).to(base.device, hidden.dtype)
    for adapter in tenants:
        adapter.require_grad()
    hidden.backward(upstream)
    assert all(adapter.grad is not None for adapter in tenants)
    return [each.double().cpu() for each in (hidden.detach(), *(adapter.grad for adapter in tenants))]


def fused_layers(base: BaseModel) -> FusedLayers:
    fused = FusedLayers(base.module, [layer.self_attn.scaling for layer in base.module.model.layers])
    if INTERPRETED:
        fused._attention = PlainChoice()
    return fused


def distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "qwen2-biases", "qwen3-tied"])
def test_fused_layers_compute_what_the_module_does(
    family: str, recomputes: bool, folders: Callable[[str], Path]
) -> None:
    """In bfloat16 they are as far from float32 as the layers one by one, times 1.3. The interpreter runs float32."""
    lengths = [5, 9, 14, 3, 20, 40]
    exact = run(load(folders(family), torch.float32, DEVICE), None, lengths)
    base = load(folders(family), DTYPE, DEVICE)
    plain = run(base, None, lengths)
    fused = fused_layers(base)
    fused.recomputes = recomputes
    ours = run(base, fused, lengths)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert distance(mine, true) <= (1e-4 if INTERPRETED else max(1.3 * distance(theirs, true), 0.01))


def test_who_cannot_use_fused_layers_has_shorter_passes(folders: Callable[[str], Path]) -> None:
    base = load(folders("qwen3-tied"), torch.bfloat16, DEVICE)
    base.fused = None
    plain_bytes = base.activation_bytes
    base.fuse(fused_layers(base))
    usual, large = (base.new_adapter(ModelSpec(rank, 1)) for rank in (128, 136))
    assert base.rows_share([usual, usual]) == 1.0
    assert base.rows_share([None]) == base.activation_bytes / (base.activation_bytes + 2 * base.vocab_size)
    assert base.rows_share([usual, large]) == base.activation_bytes / plain_bytes
    assert not base.fused.fits([large])


def test_heads_that_no_attention_takes_are_told_and_trained_through_the_module(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Llama models of 3,200 numbers with 32 heads, which could not even be loaded."""
    base = load(folders("llama"), torch.bfloat16, DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(base.module.model.layers[0].self_attn, "head_dim", 100)
    told: list[str] = []
    assert fused_module.fused_layers(base, told.append) is None
    assert told == ["training uses the slower layers: no kernels for attention take heads 100 wide"]


def test_few_shapes_of_batches_get_plans_and_only_when_they_come_back() -> None:
    choice = AttentionChoice()
    assert [choice.is_planned((4, 512)) for _ in range(3)] == [False, True, True]
    shapes = [(1, length) for length in range(1000, 11_000)]
    assert not any(map(choice.is_planned, shapes))
    assert not choice.is_planned(shapes[0])  # that was too long ago
    assert [sum([choice.is_planned((2, length)) for length in range(200)]) for _ in range(2)] == [0, 63]
    assert choice.is_planned((4, 512))


@pytest.mark.parametrize(("kib", "most"), [(99, 64), (163, 128), (227, 128)])
def test_a_device_with_little_shared_memory_trains_large_ranks_through_the_module(
    kib: int, most: int, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward for ranks above 64 takes 120 KiB, and 152 on Hopper: more than the devices of 99 KiB have."""
    base = load(folders("qwen3-tied"), torch.bfloat16, DEVICE)
    properties = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert trainable_ranks(torch.device("cuda")) == most
    monkeypatch.setattr(fused_module, "trainable_ranks", lambda device: most)
    base.fuse(fused_layers(base))
    assert base.fused.fits([base.new_adapter(ModelSpec(64, 1)), None])
    assert base.fused.fits([base.new_adapter(ModelSpec(72, 1))]) == (most == 128)
