"""Rows of an exact pass have the same bits however products are cut, and whatever is computed beside them."""

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, DTYPE, INTERPRETED
from tinsmith.models import exact_products
from tinsmith.models.adapter_table import AdapterPlaces
from tinsmith.models.exact_products import CacheRows, ExactAdapters, Turning, adapters_of, product, turned
from tinsmith.models.lora import Adapter, AdapterLayout, LinearGroup, Segment
from tinsmith.protocols import ModelSpec

pytestmark = pytest.mark.gpu
INPUTS, OUTPUTS = 96, (64, 32, 32)
RANKS = (24, 40)
HEADS, KV_HEADS, WIDTH = 4, 2, 16


def numbers(*shape: int, seed: int) -> Tensor:
    """Random ones; in the interpreter whole ones, whose sums are exact in any order."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (drawn.round() if INTERPRETED else drawn).to(DEVICE, DTYPE)


def adapter(rank: int) -> Adapter:
    shapes = [(rank, INPUTS)] * 3 + [(width, rank) for width in OUTPUTS]
    layout = AdapterLayout([f"{n}" for n in range(6)], shapes, [0, 1, 2, 0, 1, 2])
    made = Adapter(ModelSpec(rank, 0), layout, numbers(layout.total, seed=rank).float(), DTYPE)
    made.weights_changed()
    return made


def group() -> LinearGroup:
    made = LinearGroup.__new__(LinearGroup)
    made.linears, made.outputs = (0, 1, 2), list(OUTPUTS)
    made.weight_OI, made.bias_O = numbers(sum(OUTPUTS), INPUTS, seed=1), numbers(sum(OUTPUTS), seed=2)
    return made


def applied(adapters: ExactAdapters, x_TI: Tensor, residual_TO: Tensor) -> Tensor:
    linears = group()
    y_TO, z_TR = adapters.product(linears, x_TI, residual_TO)
    adapters.add(linears.linears, linears.outputs, z_TR, y_TO)
    return y_TO


@pytest.mark.parametrize("rows", [1, 50, 130])
def test_adapters_inner_products_are_the_same_beside_the_base_product_and_apart(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (adapter(rank) for rank in RANKS)
    x_TI, residual_TO = numbers(rows, INPUTS, seed=3), numbers(rows, sum(OUTPUTS), seed=4)
    half = rows // 2
    segments = [Segment(first, 0, half), Segment(None, half, rows - 1), Segment(second, rows - 1, rows)]
    adapters = adapters_of(AdapterPlaces([(0, 1, 2)]), [each for each in segments if each.start < each.end], DEVICE)
    beside = applied(adapters, x_TI, residual_TO)
    monkeypatch.setattr(exact_products, "_SOME_ROWS", 0)  # more rows than this: apart, and larger tiles
    assert torch.equal(applied(adapters, x_TI, residual_TO), beside)
    plain = product(x_TI, group().weight_OI, group().bias_O, residual_TO)
    assert torch.equal(plain[half : rows - 1], beside[half : rows - 1])
    assert not torch.equal(plain[rows - 1], beside[rows - 1])


@pytest.mark.parametrize("normed", [True, False])
def test_heads_turned_into_a_cache_are_those_of_a_packed_pass(normed: bool) -> None:
    rows, slots = 5, 40
    heads_TO = numbers(rows, (HEADS + 2 * KV_HEADS) * WIDTH, seed=5)
    weights = (numbers(WIDTH, seed=6), numbers(WIDTH, seed=7)) if normed else None
    angles_Td = torch.rand(rows, WIDTH, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    turning = Turning(angles_Td.cos().to(DTYPE), angles_Td.sin().to(DTYPE), weights, 1e-6)
    slots_T = torch.tensor([33, 2, 17, 3, 39], device=DEVICE)
    keys, values = (torch.full((slots, KV_HEADS * WIDTH), -7.0, device=DEVICE, dtype=DTYPE) for _ in range(2))
    packed_TO = turned(heads_TO, (HEADS, KV_HEADS), WIDTH, turning)
    query_TO = turned(heads_TO, (HEADS, KV_HEADS), WIDTH, turning, CacheRows(keys, values, slots_T))
    assert torch.equal(query_TO, packed_TO[:, : HEADS * WIDTH])
    assert torch.equal(keys[slots_T], packed_TO[:, HEADS * WIDTH :])
    assert torch.equal(values[slots_T], heads_TO[:, (HEADS + KV_HEADS) * WIDTH :])
    others = torch.ones(slots, dtype=torch.bool, device=DEVICE).index_fill_(0, slots_T, False)
    assert bool((keys[others] == -7).all()) and bool((values[others] == -7).all())
