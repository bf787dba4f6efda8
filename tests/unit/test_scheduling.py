"""The sampler's decisions, as tables: who is preempted, who may start, how a step's prompt tokens are divided."""

from bisect import insort
from collections import Counter, defaultdict
from itertools import count, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.sampling.scheduling import (
    LEAST_CHUNK,
    Growing,
    Holding,
    Prefilling,
    admissible,
    burst_steps,
    fair_order,
    fork_allowance,
    prefill_shares,
    reclaimed,
    tenant_weights,
    victims,
)

EQUAL: dict[str, float] = defaultdict(lambda: 1.0)


@pytest.mark.parametrize(
    ("running", "available", "expected"),
    [
        ([], 0, []),
        ([Growing(1, 1, 5), Growing(2, 1, 5)], 2, []),
        ([Growing(1, 1, 5), Growing(2, 1, 5)], 1, [2]),
        ([Growing(2, 1, 5), Growing(1, 0, 5), Growing(3, 0, 5)], 0, [3]),  # the youngest makes room for the middle one
        ([Growing(1, 1, 0), Growing(2, 1, 0), Growing(3, 1, 0)], 1, [3, 2]),
        ([Growing(1, 1, 5)], 0, []),  # the last one is never preempted
        ([Growing(7, 1, 2), Growing(8, 1, 2), Growing(9, 1, 2)], 0, [9]),
    ],
)
def test_the_youngest_give_way_until_the_others_can_grow(running, available, expected):
    assert victims(running, available) == expected


@pytest.mark.parametrize(
    ("running", "queues", "slots", "expected"),
    [
        ([], {}, 3, []),
        ([], {"a": [1, 2, 3], "b": [4]}, 4, [1, 4, 2, 3]),
        (["a", "a"], {"a": [1], "b": [4, 5, 6]}, 3, [4, 5, 1]),
        ([], {"a": [1, 2, 3]}, 2, [1, 2]),
        ([], {"b": [1, 9], "a": [2, 3], "c": [4]}, 5, [1, 2, 4, 3, 9]),
        ([], {"a": [1]}, 0, []),
    ],
)
def test_the_tenant_with_the_fewest_running_goes_first(running, queues, slots, expected):
    assert fair_order(running, queues, slots, EQUAL) == expected


def test_a_tenant_of_twice_the_weight_gets_two_places_for_one():
    queues = {"a": list(range(10)), "b": list(range(10, 20))}
    assert fair_order([], queues, 6, {"a": 1.0, "b": 2.0}) == [10, 0, 11, 12, 1, 13]


def test_the_tenants_of_one_owner_have_its_weight_together():
    owners = {"a1": ("anna", 1.0), "a2": ("anna", 1.0), "b": ("ben", 3.0)}
    assert tenant_weights(owners) == {"a1": 0.5, "a2": 0.5, "b": 3.0}


@pytest.mark.parametrize(
    ("costs", "available", "running", "expected"),
    [
        ([], 10, 0, 0),
        ([10], 10, 0, 1),  # nothing else runs: everything may be used
        ([10], 10, 1, 0),  # a block for the running one is kept
        ([4, 4, 1], 10, 0, 2),  # 4, then 4 + 1 reserved; the third would need 1 + 2 of 2
        ([4, 9, 1], 10, 0, 1),  # the small one does not overtake
        ([0, 0], 1, 0, 2),
    ],
)
def test_admission_keeps_a_block_for_everyone_and_the_order(costs, available, running, expected):
    assert admissible(costs, available, running) == expected


@pytest.mark.parametrize(
    ("prefilling", "budget", "expected"),
    [
        ([], 512, {}),
        ([Prefilling(1, "a", 100)], 512, {1: 100}),
        ([Prefilling(1, "a", 4000)], 512, {1: 512}),
        ([Prefilling(1, "a", 4000), Prefilling(2, "b", 20)], 512, {2: 20, 1: 492}),
        ([Prefilling(1, "a", 4000), Prefilling(2, "b", 4000)], 512, {1: 256, 2: 256}),
        ([Prefilling(2, "a", 300), Prefilling(1, "a", 300)], 512, {1: 300, 2: 212}),
        ([Prefilling(1, "a", 4000), Prefilling(2, "a", 50)], 512, {1: 512}),
        ([Prefilling(1, "a", 50), Prefilling(2, "b", 50), Prefilling(3, "c", 900)], 200, {1: 50, 2: 50, 3: 100}),
        ([Prefilling(1, "a", 4000, cost=4)], 512, {1: 128}),
        ([Prefilling(1, "a", 4000, cost=4), Prefilling(2, "b", 100)], 512, {2: 100, 1: 103}),
        ([Prefilling(1, "a", 40, cost=4), Prefilling(2, "a", 900)], 512, {1: 40, 2: 352}),
    ],
)
def test_prefill_is_divided_between_tenants_and_bounded(prefilling, budget, expected):
    shares = prefill_shares(prefilling, budget, EQUAL)
    assert shares == expected
    costs = {sequence.key: sequence.cost for sequence in prefilling}
    assert sum(count * costs[key] for key, count in shares.items()) <= budget


def test_a_chunk_is_worth_a_step_however_long_the_past_is():
    assert prefill_shares([Prefilling(1, "a", 4000, cost=100), Prefilling(2, "a", 9)], 512, EQUAL) == {1: LEAST_CHUNK}
    assert prefill_shares([Prefilling(1, "a", 9, cost=100), Prefilling(2, "b", 600)], 512, EQUAL) == {2: 256, 1: 9}


def test_prefill_is_divided_by_weight_and_what_one_does_not_need_is_the_others():
    long = [Prefilling(1, "a", 4000), Prefilling(2, "b", 4000)]
    assert prefill_shares(long, 400, {"a": 1.0, "b": 3.0}) == {1: 100, 2: 300}
    assert prefill_shares([long[0], Prefilling(2, "b", 50)], 400, {"a": 1.0, "b": 3.0}) == {2: 50, 1: 350}


@pytest.mark.parametrize(
    ("tenant", "running", "waiting", "slots", "available", "expected"),
    [
        ("a", ["a"], [], 15, 100, 15),
        ("a", ["a"], ["a"], 15, 100, 15),
        ("a", ["a"], [], 15, 4, 4),
        ("a", ["a"], [], 15, -3, 0),
        ("a", ["a"], ["b"], 15, 100, 7),
        ("a", ["a"] * 9, ["b"], 7, 100, 0),
        ("a", ["a", "b"], ["c"], 10, 100, 3),
    ],
)
def test_samples_of_one_prompt_leave_room_for_waiting_tenants(tenant, running, waiting, slots, available, expected):
    assert fork_allowance(tenant, running, waiting, slots, available, EQUAL) == expected


def test_samples_of_one_prompt_take_more_of_the_room_with_more_weight():
    assert fork_allowance("a", ["a"], ["b"], 15, 100, {"a": 3.0, "b": 1.0}) == 11


def holdings(*tenants: str) -> list[Holding]:
    return [Holding(key, tenant, 2) for key, tenant in enumerate(tenants)]


@pytest.mark.parametrize(
    ("running", "slots", "blocks", "expected"),
    [
        ("aaaa", 0, 0, []),
        ("aaaa", 1, 0, [3]),
        ("aaaa", 1, 5, [3, 2]),  # each frees its two blocks, and the one kept for its growth
        ("aaaa", 0, 10, []),  # it would take all of them
        ("aa", 1, 0, [1]),
        ("a", 1, 0, []),  # a tenant's only one is left alone
        ("aabb", 1, 0, [3]),
        ("aaab", 1, 0, [2]),
        ("aabc", 1, 0, []),  # c has one already
        ("cccc", 1, 0, []),  # its own do not help
    ],
)
def test_who_has_more_than_a_waiting_tenant_makes_room_for_it_youngest_first(running, slots, blocks, expected):
    assert reclaimed(holdings(*running), "c", EQUAL, slots=slots, blocks=blocks) == expected


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=5),
    places=st.integers(5, 40),
)
def test_tenants_that_always_have_samples_waiting_hold_their_share_of_the_places_however_late_they_came(
    weights, places
):
    of_tenant = {str(tenant): weight for tenant, weight in enumerate(weights)}
    keys, running = count(), {}
    queues: dict[str, list[int]] = {"0": [next(keys) for _ in range(100)]}
    for step in range(3 * places):
        if step == 1:  # the first tenant has taken everything by now; all others come at once
            queues |= {tenant: [next(keys) for _ in range(100)] for tenant in list(of_tenant)[1:]}
        [first] = fair_order(list(running.values()), queues, 1, of_tenant)
        tenant_of = {key: tenant for tenant, queue in queues.items() for key in queue}
        held = [Holding(key, tenant, 0) for key, tenant in running.items()]
        short = 1 + len(running) - places
        given_back = reclaimed(held, tenant_of[first], of_tenant, slots=short, blocks=0)
        candidates = fair_order(list(running.values()), queues, max(1, -short + 1), of_tenant)
        for key in given_back:
            insort(queues[running[key]], key)
            del running[key]
        for key in candidates[: places - len(running)]:
            queues[tenant_of[key]].remove(key)
            running[key] = tenant_of[key]
    assert len(running) == places
    counts = Counter(running.values())
    for rich, poor in permutations(of_tenant, 2):
        assert (counts[rich] - 1) / of_tenant[rich] < (counts[poor] + 1) / of_tenant[poor]


@pytest.mark.parametrize(
    ("remaining", "prompts_wait", "prompts_left", "expected"),
    [
        ([3, 500], False, False, 8),
        ([3, 5], False, False, 5),  # nobody has more to go
        ([3, 500], True, False, 2),  # a prompt waits for the burst, and has then all that it needs
        ([1, 1], True, False, 1),
        ([3, 500], True, True, 1),  # some prompts have not even begun
    ],
)
def test_prompts_shorten_the_bursts_of_those_who_decode(remaining, prompts_wait, prompts_left, expected):
    assert burst_steps(remaining, prompts_wait=prompts_wait, prompts_left=prompts_left, most=8) == expected
