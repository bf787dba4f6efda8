"""Who enters the sampler beside whom, in tables; and the number that is measured for that."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from tinsmith.engine.entering import LEAST, MOST, Passes, entering, session_of, tenants
from tinsmith.wire.jobs import Header


def samples(**sessions: int) -> list[Header]:
    """So many samples of each session, those of different ones in turn; a_2 is a session of the owner a."""
    rounds = max(sessions.values(), default=0)
    turns = [(name, seq) for seq in range(rounds) for name, many in sessions.items() if seq < many]
    return [
        Header(number, f"{name}:sample:0", seq, "sample", name.partition("_")[0], 8, 0.0)
        for number, (name, seq) in enumerate(turns)
    ]


def entered(
    held: dict[str, int], inside: dict[str, int], *, recent: tuple[str, ...] = (), most: int = 4, **weights: float
) -> dict[str, int]:
    there = Counter(map(session_of, samples(**inside)))
    just_now = [(name.partition("_")[0], name) for name in recent]
    chosen = entering(samples(**held), there, just_now, most, weights)
    return dict(Counter(session for _, session in map(session_of, chosen)))


@pytest.mark.parametrize(
    ("held", "inside", "expected"),
    [
        ({"a": 100}, {}, {"a": 100}),  # alone
        ({"a": 100}, {"a": 50}, {"a": 100}),
        ({"a": 100, "b": 100}, {}, {"a": 100, "b": 100}),  # equals
        ({"a": 100, "b": 1}, {}, {"a": 4, "b": 1}),
        ({"a": 100}, {"b": 1}, {"a": 4}),
        ({"a": 100}, {"a": 3, "b": 1}, {"a": 1}),
        ({"a": 100, "b": 1}, {"a": 60}, {"b": 1}),  # what is inside stays
        ({"a": 64, "b": 16}, {}, {"a": 16, "b": 16}),
        ({"a": 64, "b": 64, "c": 1}, {}, {"a": 4, "b": 4, "c": 1}),
        ({"a": 3, "b": 1}, {}, {"a": 3, "b": 1}),
        ({}, {"a": 1, "b": 1}, {}),
        ({"a_1": 100, "a_2": 1}, {}, {"a_1": 4, "a_2": 1}),  # sessions of one owner, as tenants
        ({"a_1": 100, "a_2": 100, "b": 1}, {}, {"a_1": 2, "a_2": 2, "b": 1}),  # the owner's part, divided
        ({"a_1": 100, "a_2": 1, "b": 100}, {}, {"a_1": 50, "a_2": 1, "b": 100}),
        ({"a_1": 100, "b": 1}, {"a_2": 3}, {"a_1": 1, "b": 1}),
        ({"a_1": 100, "b": 1}, {"a_2": 4}, {"b": 1}),
        (
            {f"a_{number}": 5 for number in range(20)} | {"b": 1},
            {},
            {f"a_{number}": 1 for number in range(4)} | {"b": 1},
        ),
        ({"b": 100}, {f"a_{number}": 1 for number in range(20)}, {"b": 20}),
    ],
    ids=str,
)
def test_a_large_tenant_has_no_more_inside_beside_a_small_one_than_a_few(
    held: dict[str, int], inside: dict[str, int], expected: dict[str, int]
) -> None:
    assert entered(held, inside) == expected


def test_a_tenant_that_asks_for_one_sample_after_the_other_counts_between_them() -> None:
    assert entered({"a": 100}, {}, recent=("b",)) == {"a": 4}
    assert entered({"a": 100}, {}, recent=("a",)) == {"a": 100}


def test_a_session_that_has_just_ended_one_keeps_its_part_of_what_its_owner_may_have() -> None:
    assert entered({"a_1": 100}, {"b": 1}, recent=("a_2",)) == {"a_1": 2}
    assert entered({"a_1": 100}, {}, recent=("a_2",)) == {"a_1": 4}


def test_many_sessions_of_one_owner_are_one_tenant_beside_another() -> None:
    crowd = {("a", str(session)): 2 for session in range(20)}
    assert sorted(tenants(crowd | {("b", "b"): 1})) == [1, 40]
    assert tenants(crowd) == [2] * 20
    assert tenants({}) == []


def test_an_owners_weight_is_its_part_of_the_bound() -> None:
    assert entered({"a": 100, "b": 1}, {}, a=3.0) == {"a": 12, "b": 1}
    assert entered({"a": 100, "b": 1}, {}, a=0.1) == {"a": 1, "b": 1}
    assert entered({"a_1": 100, "a_2": 1}, {}, a=3.0) == {"a_1": 4, "a_2": 1}  # among its own sessions it says nothing


def test_each_tenants_samples_enter_in_their_order() -> None:
    chosen = entering(samples(a=50, b=2), {}, (), 4, {})
    assert [header.seq for header in chosen if header.owner == "a"] == [0, 1, 2, 3]
    assert [header.number for header in chosen] == sorted(header.number for header in chosen)


def run(passes: Passes, numbers: Iterable[list[int]], shortest: float, each: float, extra: float = 0.0) -> None:
    """Passes with so many samples of each tenant: all take so long, and so much longer with each sample.

    And with several tenants by something more; give or take a third.
    """
    chance = random.Random(1)
    for each_tenants in numbers:
        seconds = shortest + each * sum(each_tenants) + (extra if len(each_tenants) > 1 else 0.0)
        passes.saw(each_tenants, seconds * chance.uniform(0.7, 1.3))


def crowds(passes: Passes, many: int, times: int = 400, large: int = 1) -> Iterator[list[int]]:
    """A sample of a small tenant beside so many of large ones, as far as they may enter."""
    for _ in range(times):
        yield [min(many, passes.doubling)] * large + [1]


def bound(shortest: float, each: float, *, large: int = 1, extra: float = 0.0, many: int = 100) -> int:
    """Where the bound goes beside a small tenant that was alone before."""
    passes = Passes()
    run(passes, [[1]] * 40, shortest, each)
    assert passes.doubling == MOST
    run(passes, crowds(passes, many, large=large), shortest, each, extra)
    return passes.doubling


@pytest.mark.parametrize("large", [1, 2])
def test_passes_take_as_many_times_as_long_as_alone_as_there_are_tenants(large: int) -> None:
    assert bound(0.010, 0.001, large=large) == pytest.approx(11, abs=3)
    assert bound(0.010, 0.0002, large=large) == pytest.approx(51, abs=12)
    assert bound(0.001, 0.010, large=large) == LEAST


def test_where_many_samples_cost_as_much_as_few_nobody_is_held_back() -> None:
    assert bound(0.010, 0.00001) == MOST


def test_what_a_crowd_costs_beside_its_tokens_counts() -> None:
    assert bound(0.010, 0.001, extra=0.005) == pytest.approx(6, abs=2)
    assert bound(0.010, 0.001, extra=0.010) == LEAST


def test_the_bound_follows_when_samples_become_cheaper() -> None:
    passes = Passes()
    run(passes, [[1]] * 40, 0.010, 0.001)
    run(passes, crowds(passes, 100), 0.010, 0.001, 0.010)
    assert passes.doubling == LEAST
    run(passes, crowds(passes, 100), 0.010, 0.001)
    assert passes.doubling == pytest.approx(11, abs=3)


def test_fewer_samples_than_there_may_be_say_nothing() -> None:
    passes = Passes()
    run(passes, [[1]] * 40, 0.010, 0.001)
    run(passes, crowds(passes, 100), 0.010, 0.001)
    before = passes.doubling
    run(passes, [[4, 1]] * 500, 0.010, 0.001)
    assert passes.doubling == before


def test_where_a_crowd_was_always_there_a_line_says_how_long_passes_of_few_are() -> None:
    chance, passes = random.Random(2), Passes()
    run(passes, [[chance.randrange(20, 100)] for _ in range(300)], 0.010, 0.001)
    run(passes, [[90, 1]] * 100, 0.010, 0.001)
    run(passes, crowds(passes, 100, 1000), 0.010, 0.001)
    assert LEAST <= passes.doubling <= 16


def test_nothing_is_known_at_first() -> None:
    passes = Passes()
    run(passes, [[90, 1]] * 10, 0.010, 0.001)
    assert passes.doubling == MOST


def test_a_first_pass_that_compiles_is_not_taken_for_what_passes_of_few_samples_take() -> None:
    passes = Passes()
    passes.saw([1], 30.0)
    run(passes, [[1]] * 40, 0.010, 0.001)
    run(passes, crowds(passes, 100), 0.010, 0.001)
    assert passes.doubling == pytest.approx(11, abs=4)


def test_one_shared_pass_that_fetches_weights_does_not_send_the_crowd_away() -> None:
    passes = Passes()
    run(passes, [[1]] * 40, 0.010, 0.001)
    run(passes, crowds(passes, 100), 0.010, 0.001)
    before, seen = passes.doubling, []
    passes.saw([before, 1], 20.0)
    for each in crowds(passes, 100, 40):
        run(passes, [each], 0.010, 0.001)
        seen.append(passes.doubling)
    assert min(seen) > LEAST


def test_prompts_that_have_become_longer_for_all_do_not_keep_the_crowd_out_for_ever() -> None:
    passes = Passes()
    run(passes, [[1]] * 40, 0.005, 0.00005)
    run(passes, crowds(passes, 200), 0.050, 0.00005)
    assert passes.doubling == LEAST
    run(passes, crowds(passes, 200, 10_000), 0.050, 0.00005)
    assert passes.doubling > 8 * LEAST


def test_a_clock_that_stands_still_says_nothing() -> None:
    passes = Passes()
    for each in ([1], [1, 1], [90, 1]):
        for _ in range(40):
            passes.saw(each, 0.0)
    assert passes.doubling == MOST
