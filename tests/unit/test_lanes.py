"""Lanes: what decoding sequences see through their dense copy is what the paged cache holds of them."""

import pytest
import torch
from torch import Tensor

from tinsmith.models.attention import CacheShape, Heads
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.lanes import Lanes, Span

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK, BLOCKS = 4, 2, 8, 6, 4, 16
SCALING = 0.3


def cache_of_noise() -> KVCache:
    shape = CacheShape((0, 1), KV_HEADS, KEY_DIM, VALUE_DIM)
    cache = KVCache(shape, num_blocks=3 * BLOCKS, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    for data in (cache.keys_LBSGd, cache.values_LBSGe):
        data.copy_(torch.randn(data.shape, generator=torch.Generator().manual_seed(0)))
    return cache


def heads_of(cache: KVCache, spans: list[Span], place: int, window: int | None) -> Heads:
    """Queries of no matter what; keys and values that the paged cache holds of the spans' rows already."""
    slots = [span.blocks[span.past // BLOCK] * BLOCK + span.past % BLOCK for span in spans]
    keys, values = cache.slots(place)
    query = torch.randn(HEADS, len(spans), KEY_DIM, generator=torch.Generator().manual_seed(spans[0].past))
    return Heads(query, keys[slots].transpose(0, 1), values[slots].transpose(0, 1), SCALING, window)


def seen(cache: KVCache, span: Span, place: int, heads: Heads) -> Tensor:
    """[H, e]: attention of the span's row over the paged cache, written out."""
    first = 0 if heads.window is None else max(0, span.past + 1 - heads.window)
    data = (part[list(span.blocks)].flatten(0, 1)[first : span.past + 1] for part in cache.blocks(place))
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for part in data)
    weights = (heads.query_HTd[:, span.start, None] @ key.mT * SCALING).softmax(-1)
    return (weights @ value)[:, 0]


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_that_come_go_and_stay_see_what_is_cached_of_them(window: int | None) -> None:
    cache, pasts = cache_of_noise(), {7: 20, 8: 9, 9: 26}
    lanes = Lanes(cache)
    # The owners of a step's rows, in the batch's order: another comes, one goes, the rest stays in another order.
    steps = [[7], [8, 7], [9, 8, 7], *[[9, 8, 7]] * 12, [9, 7], *[[7, 9]] * 10]
    for owners in steps:
        tables = {owner: range((owner - 7) * BLOCKS, (owner - 6) * BLOCKS) for owner in owners}
        spans = [Span(owner, row, 1, pasts[owner], tables[owner]) for row, owner in enumerate(owners)]
        for owner in owners:
            pasts[owner] += 1
        groups = lanes.enter(spans, len(spans))
        for place in (0, 1):
            heads = heads_of(cache, spans, place, window)
            expected = torch.stack([seen(cache, span, place, heads) for span in spans])
            for group in groups:
                torch.testing.assert_close(group.attend(place, heads), expected[group.rows_N])


def test_lanes_that_stay_the_same_come_to_lie_as_the_batch_does() -> None:
    lanes = Lanes(cache_of_noise())
    tables = {7: range(BLOCKS), 8: range(BLOCKS, 2 * BLOCKS)}
    lanes.enter([Span(7, 0, 1, 3, tables[7])], 1)
    orders = []
    for past in range(4, 20):
        [group] = lanes.enter([Span(8, 0, 1, past, tables[8]), Span(7, 1, 1, past, tables[7])], 2)
        orders.append(group.in_order)
        assert group.rows_N.tolist() == ([0, 1] if group.in_order else [1, 0])
    assert not orders[0]
    assert orders[-1]
