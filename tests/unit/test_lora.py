"""Adapters and the linear layer that applies several of them, against plain autograd."""

import pytest
import torch
from torch import nn

from tinsmith.models import lora
from tinsmith.models.grouped import GroupedAdapters, can_group
from tinsmith.models.lora import (
    Adapter,
    AdapterLayout,
    CurrentPass,
    LinearGroup,
    MultiAdapterLinear,
    Segment,
    initial_weights,
)
from tinsmith.protocols import ModelSpec

INPUTS, OUTPUTS, LINEAR = 6, 10, 2
CPU = torch.device("cpu")


def layout_of(rank: int, linears: tuple[int, ...] = (0, LINEAR)) -> AdapterLayout:
    names, shapes = [], []
    for linear in linears:
        names += [f"{linear}.A", f"{linear}.B"]
        shapes += [(rank, INPUTS), (OUTPUTS, rank)]
    return AdapterLayout(names, shapes, [linear for linear in linears for _ in "AB"])


def random_adapter(rank: int, linears: tuple[int, ...] = (0, LINEAR), dtype: torch.dtype = torch.float32) -> Adapter:
    layout = layout_of(rank, linears)
    generator = torch.Generator().manual_seed(rank)
    return Adapter(ModelSpec(rank, 0), layout, torch.randn(layout.total, generator=generator), dtype)


def adapt(layers: list[nn.Linear], linears: list[int], current: CurrentPass) -> list[MultiAdapterLinear]:
    group = LinearGroup(layers, linears, current)
    return [MultiAdapterLinear(each, group, part) for part, each in enumerate(layers)]


def layer(bias: bool = True) -> tuple[MultiAdapterLinear, CurrentPass]:
    torch.manual_seed(0)
    current = CurrentPass()
    linear = nn.Linear(INPUTS, OUTPUTS, bias).requires_grad_(False)
    return adapt([linear], [LINEAR], current)[0], current


def expected(module: MultiAdapterLinear, x: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """With leaves of its own for every adapter, `leaf.grad` being what the flat gradient should hold."""
    rows = []
    for segment in segments:
        part = x.reshape(-1, INPUTS)[segment.start : segment.end]
        y = part @ module.weight.T + (0 if module.bias is None else module.bias)
        if segment.adapter and (pair := segment.adapter.pair(LINEAR)):
            a, b = (leaf.detach().requires_grad_() for leaf in pair)
            segment.adapter.leaves = (a, b)  # type: ignore[attr-defined]
            y = y + segment.adapter.spec.alpha / segment.adapter.spec.rank * (part @ a.T) @ b.T
        rows.append(y)
    return torch.cat(rows).reshape(*x.shape[:-1], OUTPUTS)


@pytest.mark.parametrize("bias", [True, False])
def test_segments_of_different_adapters_equal_separate_products(bias: bool) -> None:
    module, current = layer(bias)
    adapters = [random_adapter(4), None, random_adapter(1), random_adapter(3, linears=(0,)), random_adapter(8)]
    bounds = [0, 5, 7, 8, 12, 20]
    segments = [Segment(*parts) for parts in zip(adapters, bounds[:-1], bounds[1:], strict=True)]
    for adapter in adapters:
        if adapter:
            adapter.require_grad().fill_(1.0)
    current.segments = segments
    x = torch.randn(1, 20, INPUTS, requires_grad=True)
    upstream = torch.randn(1, 20, OUTPUTS)
    y = module(x)
    [dx] = torch.autograd.grad(y, x, upstream)
    y_expected = expected(module, x, segments)
    torch.testing.assert_close(y, y_expected)
    y_expected.backward(upstream)
    torch.testing.assert_close(dx, x.grad)
    for adapter in (adapters[0], adapters[2], adapters[4]):
        for total, leaf in zip(adapter.grad_pair(LINEAR), adapter.leaves, strict=True):
            torch.testing.assert_close(total, leaf.grad + 1)
    untouched = adapters[3].grad
    assert torch.equal(untouched, torch.ones_like(untouched)), "an adapter without this layer gains nothing"
    with torch.no_grad():
        assert torch.equal(module(x), y)


def test_a_segment_that_does_not_train_passes_gradients_on_but_keeps_none() -> None:
    module, current = layer()
    silent, loud = random_adapter(4), random_adapter(2)
    for adapter in (silent, loud):
        adapter.require_grad()
    x = torch.randn(9, INPUTS, requires_grad=True)
    current.segments = [Segment(silent, 0, 5, trains=False), Segment(loud, 5, 9)]
    module(x).sum().backward()
    assert not silent.grad.any()
    assert loud.grad.any()
    assert x.grad[:5].any()


def test_gradients_of_a_bfloat16_pass_accumulate_in_float32() -> None:
    module, current = layer()
    module.to(torch.bfloat16)
    adapter = random_adapter(4, dtype=torch.bfloat16)
    adapter.require_grad().fill_(1000.0)
    x = torch.randn(9, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    current.segments = [Segment(adapter, 0, 9)]
    before = adapter.grad.clone()
    (module(x) * 1e-2).sum().backward()
    assert adapter.grad.dtype == torch.float32
    added = adapter.layout.named_views(adapter.grad - before)
    assert 0 < added[f"{LINEAR}.B"].abs().max() < 10


def test_written_weights_reach_the_forward_pass_in_its_dtype() -> None:
    adapter = random_adapter(4, dtype=torch.bfloat16)
    adapter.weights.fill_(2.0)
    adapter.weights_changed()
    assert adapter.pair(LINEAR)[0].dtype == torch.bfloat16
    assert adapter.pair(LINEAR)[0].eq(2).all()


def test_a_copy_keeps_its_weights_when_the_original_changes() -> None:
    adapter = random_adapter(4)
    adapter.require_grad()
    copied, weights = adapter.copy(), adapter.weights.clone()
    adapter.weights.add_(1.0)
    adapter.weights_changed()
    assert torch.equal(copied.weights, weights)
    assert torch.equal(copied.pair(0)[0].reshape(-1), weights[: 4 * INPUTS])
    assert copied.grad is None


def test_initial_weights_are_kaiming_uniform_in_a_and_zero_in_b() -> None:
    layout = layout_of(4)
    flat = initial_weights(layout, 3, CPU)
    for name, view in layout.named_views(flat).items():
        if name.endswith("A"):
            assert view.abs().max() <= INPUTS**-0.5
            assert view.std() == pytest.approx((3 * INPUTS) ** -0.5, rel=0.25)
        else:
            assert not view.any()


def test_every_a_of_every_seed_begins_with_other_weights_and_with_the_same_ones_again() -> None:
    layout = layout_of(4)
    drawn = [initial_weights(layout, seed, CPU) for seed in (3, 4)]
    matrices = [layout.views(flat)[position] for flat in drawn for position in layout.a_positions]
    assert len({tuple(matrix.flatten().tolist()) for matrix in matrices}) == 2 * len(layout.a_positions)
    assert torch.equal(drawn[0], initial_weights(layout, 3, CPU))


@pytest.mark.parametrize("most", [1, 4 * INPUTS, 10**9])
def test_how_many_are_drawn_at_once_changes_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(4)
    expected = initial_weights(layout, 3, CPU)
    monkeypatch.setattr(lora, "_MOST_STAGED", most)
    assert torch.equal(initial_weights(layout, 3, CPU), expected)
    assert [position for batch in lora._batches(layout) for position in batch] == layout.a_positions


def test_weights_that_are_made_in_inference_mode_can_be_trained_later() -> None:
    """Threads, which are never in it, draw them."""
    layout = layout_of(4)
    with torch.inference_mode():
        flat = initial_weights(layout, 3, CPU)
    assert torch.equal(flat, initial_weights(layout, 3, CPU))
    assert not flat.is_inference()


def test_layers_with_the_same_input_are_one_product_and_equal_separate_ones() -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(INPUTS, outputs).requires_grad_(False) for outputs in (10, 4, 7)]
    originals = [(layer.weight.clone(), layer.bias.clone()) for layer in layers]
    current = CurrentPass()
    modules = adapt(layers, [0, 1, 2], current)
    rank = 3
    layout = AdapterLayout(
        [f"{linear}.{part}" for part in "AB" for linear in range(3)],
        [(rank, INPUTS)] * 3 + [(outputs, rank) for outputs in (10, 4, 7)],
        [0, 1, 2, 0, 1, 2],
    )
    adapter = Adapter(ModelSpec(rank, 0), layout, torch.randn(layout.total), torch.float32)
    adapter.require_grad().fill_(1.0)
    current.segments = [Segment(None, 0, 4), Segment(adapter, 4, 9)]
    x = torch.randn(1, 9, INPUTS, requires_grad=True)
    upstreams = [torch.randn(1, 9, outputs) for outputs in (10, 4, 7)]
    outputs = [module(x) for module in modules]
    assert current.shared is None, "nothing is kept once every layer has its part"
    [dx] = torch.autograd.grad(outputs, x, upstreams)

    leaves = {name: view.clone().requires_grad_() for name, view in layout.named_views(adapter.weights).items()}
    for linear, (weight, bias) in enumerate(originals):
        y = x[0] @ weight.T + bias
        delta = adapter.scale * (x[0, 4:] @ leaves[f"{linear}.A"].T) @ leaves[f"{linear}.B"].T
        y = torch.cat([y[:4], y[4:] + delta])
        torch.testing.assert_close(outputs[linear][0], y)
        y.backward(upstreams[linear][0])
    torch.testing.assert_close(dx, x.grad)
    for name, view in layout.named_views(adapter.grad).items():
        torch.testing.assert_close(view, leaves[name].grad + 1)


def test_a_layer_asked_twice_or_for_another_input_does_not_get_a_stale_product() -> None:
    layers = [nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False) for _ in range(2)]
    first, second = adapt(layers, [0, 1], CurrentPass())
    first.group.current.segments = [Segment(None, 0, 3)]
    x, other = torch.randn(2, 3, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(first(x), x @ layers[0].weight.T)
        torch.testing.assert_close(first(x), x @ layers[0].weight.T)
        torch.testing.assert_close(second(other), other @ layers[1].weight.T)


def grouped_and_in_turn(segments: list[Segment], linears: int = 3) -> list[list[torch.Tensor]]:
    """Outputs, input gradient and adapters' gradients of three layers of one group, computed in both ways."""
    torch.manual_seed(3)
    layers = [nn.Linear(16, outputs).requires_grad_(False) for outputs in (32, 8, 24)[:linears]]
    current = CurrentPass()
    modules = adapt(layers, list(range(linears)), current)
    x = torch.randn(1, segments[-1].end, 16, requires_grad=True)
    upstreams = [torch.randn(1, segments[-1].end, layer.out_features) for layer in layers]
    results = []
    for together in (False, True):
        grouped = GroupedAdapters(segments)
        current.segments, current.grouped = segments, (segments, grouped) if together else None
        for segment in segments:
            if segment.adapter:
                segment.adapter.require_grad().fill_(1.0)
        outputs = [module(x) for module in modules]
        [dx] = torch.autograd.grad(outputs, x, upstreams)
        grouped.add_gradients()
        adapters = {id(segment.adapter): segment.adapter for segment in segments if segment.adapter}
        results.append([*outputs, dx, *(adapter.grad.clone() for adapter in adapters.values())])
    return results


def wide_adapter(rank: int, seed: int, linears: int = 3) -> Adapter:
    outputs = (32, 8, 24)[:linears]
    names = [f"{linear}.{part}" for part in "AB" for linear in range(linears)]
    key = (rank, linears)
    if key not in WIDE_LAYOUTS:
        shapes = [(rank, 16)] * linears + [(size, rank) for size in outputs]
        WIDE_LAYOUTS[key] = AdapterLayout(names, shapes, [*range(linears), *range(linears)])
    generator = torch.Generator().manual_seed(seed)
    layout = WIDE_LAYOUTS[key]
    return Adapter(ModelSpec(rank, 0), layout, torch.randn(layout.total, generator=generator), torch.float32)


WIDE_LAYOUTS: dict[tuple[int, int], AdapterLayout] = {}


def test_adapters_applied_together_give_what_they_give_in_turn() -> None:
    first, second, larger = wide_adapter(8, 1), wide_adapter(8, 2), wide_adapter(16, 3)
    adapters = [first, second, None, larger, first, second, None]
    bounds = [0, 5, 6, 10, 30, 31, 40, 48]
    segments = [Segment(*parts) for parts in zip(adapters, bounds[:-1], bounds[1:], strict=True)]
    segments[1].trains = False
    for in_turn, together in zip(*grouped_and_in_turn(segments), strict=True):
        assert in_turn.any()
        torch.testing.assert_close(together, in_turn)


def test_ranks_that_grouped_products_cannot_take_are_recognised() -> None:
    groups = [LinearGroup([nn.Linear(16, outputs) for outputs in (32, 8, 24)], [0, 1, 2], CurrentPass())]
    for rank, fits in ((8, True), (4, True), (3, False)):
        assert can_group([Segment(wide_adapter(rank, 0), 0, 4)], groups, item_bytes=4) is fits
    assert not can_group([Segment(wide_adapter(4, 0), 0, 4)], groups, item_bytes=2)
    assert not can_group([Segment(None, 0, 4)], groups, item_bytes=2)
