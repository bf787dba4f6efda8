"""The block pool's books, and the cache's tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.models.attention import CacheShape
from tinsmith.sampling.kv_cache import BlockPool, KVCache, chain_digests


def test_a_digest_names_all_tokens_before_it_and_the_root():
    one = chain_digests(b"root", [1, 2, 3, 4, 5, 6, 7], 2)
    assert len(one) == 3
    assert chain_digests(b"root", [1, 2, 3, 4], 2) == one[:2]
    assert chain_digests(one[0], [3, 4], 2) == one[1:2]
    for other in ([9, 2, 3, 4], [1, 2, 3, 9]):
        assert chain_digests(b"root", other, 2)[1] != one[1]
    assert chain_digests(b"other", [1, 2], 2) != one[:1]


def test_asking_first_tells_whether_allocation_succeeds():
    pool = BlockPool(4)
    assert pool.can_allocate(4)
    table = pool.allocate(3)
    assert not pool.can_allocate(2)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 available"):
        pool.allocate(2)
    pool.check([table])


def test_content_survives_its_holder_and_is_shared():
    pool = BlockPool(4)
    digests = chain_digests(b"", range(6), 2)
    first = pool.allocate(3)
    for block, digest in zip(first, digests, strict=True):
        pool.register(block, digest)
    pool.release(first)
    assert pool.available == 4
    assert pool.match([*digests[:2], b"unknown"]) == first[:2]
    assert pool.cost(1, first[:2]) == 3
    second = pool.allocate(1, first[:2])
    third = pool.allocate(0, first[:2])
    assert [pool.references(block) for block in first[:2]] == [2, 2]
    pool.check([second, third])


def test_the_end_of_the_least_recently_used_content_is_evicted_first():
    pool = BlockPool(4)
    old_digests, new_digests = chain_digests(b"old", range(4), 2), chain_digests(b"new", range(4), 2)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, digest in zip(old + new, old_digests + new_digests, strict=True):
        pool.register(block, digest)
    pool.release(old)
    pool.release(new)
    pool.allocate(1)
    assert pool.match(old_digests) == old[:1]
    pool.allocate(1)
    assert pool.match(old_digests) == []
    assert pool.match(new_digests) == new


def test_forgotten_content_is_not_found_again():
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.register(table[0], b"digest")
    pool.release(table, forget=True)
    assert pool.match([b"digest"]) == []
    pool.check([])


def test_the_check_notices_a_lost_reference():
    pool = BlockPool(3)
    table = pool.allocate(2)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([table[:1]])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(0, 2)), max_size=60))
def test_the_books_stay_right_under_any_sequence_of_operations(operations):
    pool = BlockPool(10)
    tables: list[list[int]] = []
    for kind, size, root in operations:
        digests = chain_digests(str(root).encode(), range(size), 1)
        shared = pool.match(digests)
        if kind <= 1 and pool.can_allocate(size - len(shared), shared):
            tables.append(pool.allocate(size - len(shared), shared))
            for block, digest in zip(tables[-1], digests, strict=True):
                pool.register(block, digest)
        elif kind >= 2 and tables:
            pool.release(tables.pop(size % len(tables)), forget=kind == 3)
        pool.check(tables)


def test_copying_and_clearing_blocks_touches_every_layer_and_no_other_block():
    cache = KVCache(
        CacheShape(layers=(0, 3), heads=1, key_dim=3, value_dim=2),
        num_blocks=4,
        block_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for layer in range(2):
        for part, slots in enumerate(cache.slots(layer)):
            slots[2:4] = 1 + layer * 10 + part
    cache.copy_blocks([1], [3])
    for layer in range(2):
        for part, blocks in enumerate(cache.blocks(layer)):
            assert (blocks[[1, 3]] == 1 + layer * 10 + part).all()
            assert (blocks[[0, 2, 4]] == 0).all()
    cache.clear_blocks([3])
    assert all((blocks[3] == 0).all() and (blocks[1] != 0).all() for blocks in cache.blocks(1))
