"""The kernels for all tenants' adapters against one adapter after the other; on a GPU, or in Triton's interpreter."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tests.gpu.device import DEVICE, DTYPE, INTERPRETED
from tinsmith.models.adapter_table import AdapterPlaces, AdapterTable
from tinsmith.models.lora import Adapter, AdapterLayout, AdaptersInTurn, CurrentPass, LinearGroup, Segment
from tinsmith.protocols import ModelSpec

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-6 if INTERPRETED else 0.02  # in bfloat16 the sides round at different places
INPUTS, WIDTH = 40, 80


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, DTYPE)


def check(ours: Tensor, expected: Tensor) -> None:
    assert (ours - expected).float().norm() <= TOLERANCE * expected.float().norm()


def group(first: int, inputs: int, outputs: Sequence[int]) -> LinearGroup:
    layers = [
        nn.Linear(inputs, width, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False) for width in outputs
    ]
    return LinearGroup(layers, range(first, first + len(layers)), CurrentPass())


GROUPS = (group(0, INPUTS, [48, 16, 16]), group(3, INPUTS, [WIDTH, WIDTH]), group(5, WIDTH, [INPUTS]))


def adapter(rank: int, groups: Sequence[LinearGroup]) -> Adapter:
    shapes: list[tuple[int, ...]] = []
    linears: list[int] = []
    for each in groups:
        shapes += [(rank, each.weight_OI.shape[1]) for _ in each.outputs] + [(width, rank) for width in each.outputs]
        linears += [*each.linears, *each.linears]
    layout = AdapterLayout([str(number) for number in range(len(shapes))], shapes, linears)
    made = Adapter(ModelSpec(rank, 0, alpha=4 * rank**0.5), layout, 0.3 * random(layout.total).float(), DTYPE)
    made.require_grad()
    return made


def tenants() -> list[Segment]:
    """Three with different ranks and groups; one has a second segment, which does not train; some rows are nobody's."""
    one, two, three = adapter(8, GROUPS), adapter(3, GROUPS[1:]), adapter(40, GROUPS[:2])
    owners = [(one, 37), (None, 50), (two, 120), (one, 131), (three, 190)]
    starts = [0, *(end for _, end in owners)]
    return [
        Segment(owner, start, end, trains=start != 120) for (owner, end), start in zip(owners, starts, strict=False)
    ]


def gradients(segments: Sequence[Segment]) -> list[Tensor]:
    """Every adapter's, which are cleared."""
    grads = [each.require_grad() for each in dict.fromkeys(each.adapter for each in segments if each.adapter)]
    copies = [grad.clone() for grad in grads]
    for grad in grads:
        grad.zero_()
    return copies


def at_edges() -> list[Segment]:
    """The least and the largest ranks, in segments around the tiles' sizes."""
    lengths = (1, 31, 32, 33, 63, 64, 65, 1)
    owners = [adapter(rank, GROUPS) for rank in (1, 128, 2, 127, 8, 16)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [0, *ends]
    return [Segment(owners[number % len(owners)], *each) for number, each in enumerate(zip(starts, ends, strict=False))]


def a_row_each() -> list[Segment]:
    """Of 1,000 tenants (of fewer where kernels are interpreted), and of nobody."""
    count = 40 if INTERPRETED else 1000
    owners = [adapter(1 + number % 9, GROUPS[number % 3 :]) for number in range(count)]
    return [Segment(owner, row, row + 1) for row, owner in enumerate([*owners, None])]


@pytest.mark.parametrize("crowd", [tenants, at_edges, a_row_each])
@pytest.mark.parametrize("number", range(len(GROUPS)))
def test_all_adapters_at_once_are_each_in_turn(number: int, crowd: Callable[[], list[Segment]]) -> None:
    chosen, segments = GROUPS[number], crowd()
    rows = segments[-1].end
    x, base, dy = (random(rows, width) for width in (chosen.weight_OI.shape[1], *2 * [sum(chosen.outputs)]))
    in_turn, expected, dx = AdaptersInTurn(segments), base.clone(), torch.zeros_like(x)
    kept = in_turn.add(chosen, x, expected)
    in_turn.backward(chosen, x, dy, dx, kept)
    expected_gradients = gradients(segments)
    table = AdapterTable(segments, AdapterPlaces([group.linears for group in GROUPS]), DEVICE)
    inner, dinner = table.inner_of_inputs(chosen, x), table.inner_of_gradient(chosen, dy)
    check(table.outputs(chosen, inner, base), expected)
    check(table.gradient_of_inputs(chosen, dinner), dx)
    table.add_gradients(chosen, x, inner, dy, dinner)
    for ours, theirs in zip(gradients(segments), expected_gradients, strict=True):
        check(ours, theirs)


@pytest.mark.parametrize("crowd", [tenants, at_edges, a_row_each])
def test_gate_and_up_with_their_adapters(crowd: Callable[[], list[Segment]]) -> None:
    segments, (gate_up, down) = crowd(), GROUPS[1:]
    rows = segments[-1].end
    table = AdapterTable(segments, AdapterPlaces([group.linears for group in GROUPS]), DEVICE)
    plain, dout, dy = random(rows, 2 * WIDTH), random(rows, WIDTH), random(rows, INPUTS)
    inner, down_dinner = table.inner_of_inputs(gate_up, random(rows, INPUTS)), table.inner_of_gradient(down, dy)
    whole = table.outputs(gate_up, inner, plain).requires_grad_()
    gate, up = whole.chunk(2, 1)
    expected = silu(gate) * up
    expected.backward(dout + table.gradient_of_inputs(down, down_dinner))
    out, down_inner = table.swiglu((gate_up, down), plain, inner)
    again, dinner = table.swiglu_backward((gate_up, down), plain, inner, dout, down_dinner)
    check(out, expected)
    check(again, expected)
    assert whole.grad is not None
    check(plain, whole.grad)  # overwritten
    for segment in segments:
        part = slice(segment.start, segment.end)
        for each, ours, source in ((down, down_inner, out), (gate_up, dinner, plain)):
            if segment.adapter is not None and segment.adapter.factors(each.linears) is not None:
                ranks = segment.adapter.spec.rank * len(each.linears)
                theirs = (table.inner_of_inputs if each is down else table.inner_of_gradient)(each, source)
                check(ours[part, :ranks], theirs[part, :ranks])
