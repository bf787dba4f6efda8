"""Who enters the sampler beside whom, in tables; and the number that is measured for that."""

import random
from collections import Counter

import pytest

from tinsmith.engine.entering import LEAST, MOST, Passes, entering, tenant_of
from tinsmith.wire.jobs import Header


def samples(**tenants: int) -> list[Header]:
    """So many samples of each session, those of different ones in turn; each session is an owner's."""
    rounds = max(tenants.values(), default=0)
    turns = [(name, seq) for seq in range(rounds) for name, many in tenants.items() if seq < many]
    return [Header(number, f"{name}:sample:0", seq, "sample", name, 8, 0.0) for number, (name, seq) in enumerate(turns)]


def entered(
    held: dict[str, int], inside: dict[str, int], *, recent: tuple[str, ...] = (), most: int = 4, **weights: float
) -> dict[str, int]:
    return dict(Counter(map(tenant_of, entering(samples(**held), samples(**inside), recent, most, weights))))


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


def test_an_owners_weight_is_its_part_of_the_bound() -> None:
    assert entered({"a": 100, "b": 1}, {}, a=3.0) == {"a": 12, "b": 1}
    assert entered({"a": 100, "b": 1}, {}, a=0.1) == {"a": 1, "b": 1}


def test_each_tenants_samples_enter_in_their_order() -> None:
    chosen = entering(samples(a=50, b=2), [], (), 4, {})
    assert [header.seq for header in chosen if tenant_of(header) == "a"] == [0, 1, 2, 3]
    assert [header.number for header in chosen] == sorted(header.number for header in chosen)


def measured(shortest: float, each: float, numbers: list[int]) -> int:
    """What is measured of passes that take so long, and so much longer with each sample, give or take a tenth."""
    chance, passes = random.Random(1), Passes()
    for many in numbers:
        passes.saw(many, (shortest + each * many) * chance.uniform(0.9, 1.1))
    return passes.doubling


def test_how_many_samples_double_a_pass_is_measured() -> None:
    chance = random.Random(2)
    mixed = [chance.randrange(1, 100) for _ in range(400)]
    assert measured(0.010, 0.001, mixed) == pytest.approx(5, abs=2)
    assert measured(0.010, 0.00005, mixed) > 50
    assert measured(0.001, 0.010, mixed) == LEAST
    assert measured(0.010, 0.0, [1] * 200) == MOST


def test_passes_of_alike_numbers_of_samples_say_nothing_new() -> None:
    chance, passes = random.Random(3), Passes()
    for many in [1, 90] * 50:
        passes.saw(many, 0.010 + 0.001 * many)
    for many in [8, 9] * 2000:
        passes.saw(many, (0.010 + 0.001 * many) * chance.uniform(0.5, 1.5))
    assert passes.doubling == pytest.approx(5, abs=2)
