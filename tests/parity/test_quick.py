"""The quick layers of the CPU, and adapters in batched products, against the modules and adapters in turn."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.conftest import Bases, Folders, load
from tests.parity.reference import SPECS, warm
from tinsmith.backend import left_bytes, load_backend
from tinsmith.config import Settings
from tinsmith.models import head, quick, stacks
from tinsmith.models.attention import PackedAttention
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, AdaptersInTurn, Segment
from tinsmith.models.packed import Product, packed_product
from tinsmith.models.stacks import AdapterStacks, StackedAdapters
from tinsmith.protocols import ModelSpec
from tinsmith.served import Served

LENGTHS = (3, 2, 4, 1, 2, 9)


def adapters_of(model: BaseModel) -> list[Adapter | None]:
    """The base, two of one layout, one that leaves the feed-forward out, and two of another rank."""
    specs = [ModelSpec(rank=8, seed=1), ModelSpec(rank=8, seed=2, alpha=5), SPECS["attention"]]
    adapters = [model.new_adapter(spec) for spec in [*specs, ModelSpec(rank=3, seed=3), ModelSpec(rank=3, seed=4)]]
    for seed, adapter in enumerate(adapters):
        warm(adapter, seed)
    return [None, *adapters]


def batch(model: BaseModel) -> tuple[Tensor, Tensor, list[Segment], PackedAttention]:
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    tokens = torch.randint(model.vocab_size, (bounds[-1],), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    parts = zip(adapters_of(model), bounds, bounds[1:], strict=False)
    return tokens, positions, [Segment(*part) for part in parts], PackedAttention(bounds)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-biases", "qwen3-tied"])
def test_quick_layers_compute_what_the_modules_compute(family: str, bases: Bases) -> None:
    model = bases(family)
    assert model.quick is not None
    with torch.no_grad():
        expected = model.hidden(*batch(model))
        torch.testing.assert_close(model.quick.hidden(*batch(model)), expected, atol=2e-5, rtol=2e-5)


def test_quick_layers_round_where_the_modules_round(folders: Folders) -> None:
    """In bfloat16, with or without a processor that has instructions for it."""
    model = load(folders("qwen3-tied"), torch.bfloat16)
    assert model.quick is not None
    with torch.no_grad():
        expected = model.hidden(*batch(model))
        difference = (model.quick.hidden(*batch(model)) - expected).float().abs()
    assert difference.mean() < 0.01


def test_families_with_more_to_them_run_as_they_are(bases: Bases) -> None:
    assert bases("gemma3").quick is None


def test_a_row_has_the_same_bits_beside_any_number_of_others(bases: Bases) -> None:
    model = bases("qwen3-tied")
    assert model.quick is not None
    assert model.quick.is_packed
    rows, bits = [1, 2, 7, 15, 40], []
    tokens = torch.randint(model.vocab_size, (40,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for count in rows:
            alone = PackedAttention(range(count + 1))
            inputs = (tokens[:count], torch.zeros(count, dtype=torch.int64), [Segment(None, 0, count)], alone)
            bits.append(model.quick.hidden(*inputs)[0])
    assert all(torch.equal(row, bits[0]) for row in bits)


def test_the_second_copy_of_the_weights_is_as_small_as_a_container(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(folders("qwen3-tied")).quick
    assert loaded is not None
    assert loaded.packed_bytes > 0
    monkeypatch.setattr(quick, "total_host_memory", lambda: 8 * loaded.packed_bytes - 1)
    small = load(folders("qwen3-tied")).quick
    assert small is not None
    assert (small.is_packed, small.packed_bytes) == (False, 0)


def test_an_engine_with_a_part_of_the_memory_counts_the_second_copy(bases: Bases) -> None:
    model = bases("qwen3-tied")
    assert model.quick is not None
    served = Served("tiny", "tiny", memory_bytes=model.parameters * 4 + 2**29)
    assert left_bytes(served, model) == 2**29 - model.quick.packed_bytes


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_engine_packs_no_weights_that_nobody_will_use(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []

    def watched(weight_OI: Tensor, *rest: Any) -> Product:
        packed.append(weight_OI.shape)
        return packed_product(weight_OI, *rest)

    monkeypatch.setattr(quick, "packed_product", watched)
    load_backend(Settings(deterministic=deterministic, device="cpu"), Served("tiny", "tiny"), lambda _: None)
    assert bool(packed) != deterministic


def test_stacked_adapters_add_what_adapters_in_turn_add(bases: Bases) -> None:
    model = bases("qwen3-tied")
    assert model.quick is not None
    inputs = batch(model)
    kept = AdapterStacks()
    two_layouts = [segment for segment in inputs[2] if segment.adapter is None or segment.adapter.spec.rank != 4]
    for segments in (two_layouts, two_layouts[:3]):
        _contiguous(segments)
        rows = segments[-1].end
        packed = PackedAttention(range(rows + 1))
        applied = kept.of(segments)
        assert isinstance(applied, StackedAdapters)
        with torch.no_grad():
            stacked = model.quick.hidden(inputs[0][:rows], inputs[1][:rows], segments, packed, applied)
            turn = model.quick.hidden(inputs[0][:rows], inputs[1][:rows], segments, packed, AdaptersInTurn(segments))
        torch.testing.assert_close(stacked, turn, atol=2e-5, rtol=2e-5)


def test_stacks_are_kept_as_long_as_they_serve(bases: Bases) -> None:
    adapters = [bases("qwen3-tied").new_adapter(ModelSpec(rank=4, seed=seed)) for seed in range(4)]
    kept = AdapterStacks()

    def stack_of(*members: Adapter) -> object:
        applied = kept.of([Segment(adapter, row, row + 1) for row, adapter in enumerate(members)])
        assert isinstance(applied, StackedAdapters)
        return applied._parts[0].stack

    first = stack_of(*adapters)
    assert stack_of(adapters[2], adapters[1]) is first
    other = bases("qwen3-tied").new_adapter(ModelSpec(rank=4, seed=9))
    assert stack_of(adapters[0], other) is not first


def test_uneven_and_large_adapters_are_applied_in_turn(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [bases("qwen3-tied").new_adapter(ModelSpec(rank=4, seed=seed)) for seed in range(8)]
    uneven = [Segment(adapter, row, row + 1) for row, adapter in enumerate(pair)]
    uneven[-1].end += 100
    assert isinstance(AdapterStacks().of(uneven), AdaptersInTurn)
    uneven[-1].end -= 100
    monkeypatch.setattr(stacks, "STACK_BYTES", 8 * 4 * pair[0].layout.total - 1)
    assert isinstance(AdapterStacks().of(uneven), AdaptersInTurn)


def test_adapters_that_are_applied_in_turn_are_not_kept_in_memory(bases: Bases) -> None:
    kept, adapter = AdapterStacks(), bases("qwen3-tied").new_adapter(ModelSpec(rank=4, seed=1))
    assert isinstance(kept.of([Segment(adapter, 0, 3)]), AdaptersInTurn)
    left = weakref.ref(adapter)
    del adapter
    assert left() is None


def _contiguous(segments: list[Segment]) -> None:
    """Moves the segments together, in place."""
    end = 0
    for segment in segments:
        segment.start, segment.end = end, end + segment.end - segment.start
        end = segment.end


def test_quick_logits_are_the_heads(bases: Bases) -> None:
    model = bases("qwen3-tied")
    assert model.quick is not None
    segments = [Segment(adapter, 2 * row, 2 * row + 2) for row, adapter in enumerate(adapters_of(model))]
    hidden = torch.randn(2 * len(segments), model.config.hidden_size, generator=torch.Generator().manual_seed(7))
    expected = head.logits(model, hidden, segments)
    for applied in (AdaptersInTurn(segments), model.stacks.of(segments)):
        with torch.no_grad():
            logits = model.quick.logits(hidden, applied)
        assert logits is not None
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


def test_a_batch_composed_as_before_has_its_adapters_at_hand(bases: Bases) -> None:
    model = bases("qwen3-tied")
    one, other = (model.new_adapter(ModelSpec(rank=4, seed=seed)) for seed in range(2))
    kept = AdapterStacks()
    applied = kept.of([Segment(one, 0, 2), Segment(other, 2, 4)])
    assert kept.of([Segment(one, 0, 2), Segment(other, 2, 4)]) is applied
    assert kept.of([Segment(one, 0, 1), Segment(other, 1, 4)]) is not applied
    assert kept.of([Segment(other, 0, 2), Segment(one, 2, 4)]) is not applied
    assert kept.of([Segment(None, 0, 2), Segment(one, 2, 4)]) is not applied
