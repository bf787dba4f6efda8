"""The sampler's decisions, as tables: who is preempted, who may start, how a step's prompt tokens are divided."""

import pytest

from tinsmith.sampling.scheduling import (
    LEAST_CHUNK,
    Growing,
    Prefilling,
    admissible,
    fair_order,
    fork_allowance,
    prefill_shares,
    victims,
)


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
    assert fair_order(running, queues, slots) == expected


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
    shares = prefill_shares(prefilling, budget)
    assert shares == expected
    costs = {sequence.key: sequence.cost for sequence in prefilling}
    assert sum(count * costs[key] for key, count in shares.items()) <= budget


def test_a_chunk_is_worth_a_step_however_long_the_past_is():
    assert prefill_shares([Prefilling(1, "a", 4000, cost=100), Prefilling(2, "a", 9)], 512) == {1: LEAST_CHUNK}
    assert prefill_shares([Prefilling(1, "a", 9, cost=100), Prefilling(2, "b", 600)], 512) == {2: 256, 1: 9}


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
    assert fork_allowance(tenant, running, waiting, slots, available) == expected
