"""Attention of an exact pass against torch's; and the same bits alone, in crowds, packed, by one program or several."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.device import DEVICE, DTYPE, INTERPRETED
from tinsmith.models import exact_attention
from tinsmith.models.exact import PackedRows
from tinsmith.models.exact_attention import (
    HeadCounts,
    Paging,
    SingleRows,
    attend,
    attend_backward,
    row_tiles,
)

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-5 if INTERPRETED else 0.01
HEADS, KV_HEADS, WIDTH = 4, 2, 16
LENGTHS = (600 if INTERPRETED else 1600, 3, 70)  # some chunks of keys, less than a block, more than one
BLOCK = 16
WINDOWS = pytest.mark.parametrize("window", [0, 90])


def counts(window: int) -> HeadCounts:
    return HeadCounts(HEADS, KV_HEADS, WIDTH, WIDTH**-0.5, window)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all rows."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(sum(LENGTHS), HEADS + 2 * KV_HEADS, WIDTH, generator=generator).flatten(1)
    query, key, value = heads.to(DEVICE, DTYPE).split([n * WIDTH for n in (HEADS, KV_HEADS, KV_HEADS)], 1)
    return query.contiguous(), key.contiguous(), value.contiguous()


def by_torch(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Each sequence by the reference, in fp32."""
    outputs = []
    for parts in zip(*(each.float().split(LENGTHS) for each in (query, key, value)), strict=True):
        heads = [part.unflatten(1, (-1, WIDTH)).transpose(0, 1)[None] for part in parts]
        length = len(parts[0])
        mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        mask = mask.triu(1 - window) if window else mask
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=WIDTH**-0.5, enable_gqa=True)
        outputs.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def near(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours.float() - expected).norm() <= TOLERANCE * expected.norm())


@WINDOWS
def test_outputs_and_gradients_are_those_of_torch(window: int) -> None:
    query, key, value = inputs()
    leaves = [each.float().requires_grad_() for each in (query, key, value)]
    expected = by_torch(*leaves, window)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    gradients = torch.autograd.grad(expected, leaves, dout.float())
    rows, heads = PackedRows(LENGTHS, DEVICE), counts(window)
    sums = torch.empty(HEADS, len(query), device=DEVICE)
    tiles = rows.tiles(heads.sharing)
    ours = attend(query, key, value, tiles, heads, sums_HT=sums)
    assert near(ours, expected.detach())
    results = attend_backward(query, key, value, ours, dout, sums, tiles, rows.blocks, heads)
    assert all(near(each.flatten(1), gradient) for each, gradient in zip(results, gradients, strict=True))


@WINDOWS
@pytest.mark.parametrize("programs", [1, 512], ids=["one program", "several"])
def test_a_decoded_row_has_the_bits_of_its_row_in_training(
    window: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_attention, "_PROGRAMS", programs)
    query, key, value = inputs()
    heads = counts(window)
    packed = attend(query, key, value, PackedRows(LENGTHS, DEVICE).tiles(heads.sharing), heads)
    lasts = torch.tensor(LENGTHS).cumsum(0) - 1
    cached_keys, cached_values, tables = paged(key), paged(value), table_of_blocks()
    rows = query[lasts].contiguous()
    positions = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE) - 1
    together = SingleRows(positions, max(LENGTHS))
    decoded = attend(rows, cached_keys, cached_values, together, heads, Paging(tables, BLOCK))
    assert torch.equal(decoded, packed[lasts])
    for number, length in enumerate(LENGTHS):
        alone = row_tiles([(0, 1, length - 1)], heads.sharing, DEVICE)
        paging = Paging(tables[number : number + 1], BLOCK)
        mine = attend(rows[number : number + 1].contiguous(), cached_keys, cached_values, alone, heads, paging)
        assert torch.equal(mine[0], packed[lasts[number]])


def table_of_blocks() -> Tensor:
    """Each sequence's blocks, as far apart as its neighbours'."""
    width = -(-max(LENGTHS) // BLOCK)
    return torch.arange(width * len(LENGTHS), dtype=torch.int32).view(width, -1).t().contiguous().to(DEVICE)


def paged(rows: Tensor) -> Tensor:
    """The rows of all sequences in the blocks of `table_of_blocks`; everything else is not a number."""
    tables = table_of_blocks().long().cpu()
    cells = [
        tables[n, torch.arange(length) // BLOCK] * BLOCK + torch.arange(length) % BLOCK
        for n, length in enumerate(LENGTHS)
    ]
    cache = torch.full((tables.numel() * BLOCK, rows.shape[1]), float("nan"), device=DEVICE, dtype=DTYPE)
    cache[torch.cat(cells).to(DEVICE)] = rows
    return cache
