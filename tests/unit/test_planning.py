"""The planner's decisions, as tables."""

import pytest

from tinsmith.engine.planning import TRIALS, Plan, apart, gaps, plan, rejoin
from tinsmith.wire.jobs import Header


def job(model: str, seq: int, kind: str = "forward_backward", tokens: int = 10, number: int | None = None) -> Header:
    return Header(number if number is not None else seq, model, seq, kind, "owner", tokens, 0.0)


def waiting(*headers: Header) -> dict[str, dict[int, Header]]:
    lanes: dict[str, dict[int, Header]] = {}
    for header in headers:
        lanes.setdefault(header.subject, {})[header.seq] = header
    return lanes


def decide(
    *headers: Header,
    at: dict[str, int],
    served: dict[str, float] | None = None,
    budget: int = 1000,
    max_models: int = 64,
) -> tuple[list[str], list[str]]:
    chosen = plan(waiting(*headers), at, served or {}, budget=budget, max_models=max_models)
    return [h.request_id for h in chosen.barriers], [h.request_id for h in chosen.batch]


def test_nothing_waiting_is_an_empty_plan() -> None:
    assert plan({}, {}, {}, budget=10, max_models=1) == Plan()


def test_requests_of_different_models_share_one_batch() -> None:
    assert decide(job("a", 1), job("b", 4), at={"a": 1, "b": 4}) == ([], ["a:1", "b:4"])


def test_a_barrier_holds_back_its_own_model_only() -> None:
    headers = [job("a", 1, "optim_step"), job("a", 2), job("b", 1), job("b", 2, "save_weights"), job("b", 3)]
    assert decide(*headers, at={"a": 1, "b": 1}) == (["a:1"], ["b:1"])


def test_one_barrier_a_model_is_run_in_order_of_arrival() -> None:
    headers = [job("a", 1, "optim_step", number=9), job("a", 2, "optim_step"), job("b", 1, "optim_step", number=3)]
    assert decide(*headers, at={"a": 1, "b": 1}) == (["b:1", "a:1"], [])


def test_a_later_request_waits_for_the_missing_one() -> None:
    headers = [job("a", 2), job("a", 3)]
    assert decide(*headers, at={"a": 1}) == ([], [])
    assert gaps(waiting(*headers), {"a": 1}) == ["a"]
    assert gaps(waiting(*headers), {"a": 2}) == []


def test_consecutive_requests_of_one_model_run_in_order_of_seq_whatever_their_arrival() -> None:
    headers = [job("a", 3, number=1), job("a", 2, number=2), job("a", 1, number=3)]
    assert decide(*headers, at={"a": 1}) == ([], ["a:1", "a:2", "a:3"])


def test_the_batch_stops_at_its_token_budget_but_never_is_empty() -> None:
    assert decide(job("a", 1, tokens=900), at={"a": 1}, budget=100) == ([], ["a:1"])
    headers = [job("a", 1, tokens=60), job("a", 2, tokens=60), job("b", 1, tokens=30, number=7)]
    assert decide(*headers, at={"a": 1, "b": 1}, budget=100) == ([], ["a:1", "b:1"])


def test_a_request_too_large_for_what_is_left_never_lets_its_successor_overtake_it() -> None:
    headers = [job("a", 1, tokens=50), job("a", 2, tokens=80), job("a", 3, tokens=5)]
    assert decide(*headers, at={"a": 1}, budget=100) == ([], ["a:1"])


def test_who_was_served_least_comes_first() -> None:
    headers = [
        job("big", 1, tokens=90, number=1),
        job("big", 2, tokens=90, number=2),
        job("small", 1, tokens=90, number=3),
    ]
    assert decide(*headers, at={"big": 1, "small": 1}, served={"big": 500.0, "small": 0.0}, budget=100)[1] == [
        "small:1"
    ]


def test_equal_tenants_take_turns_within_a_batch() -> None:
    headers = [job("a", s, number=s) for s in (1, 2, 3)] + [job("b", s, number=10 + s) for s in (1, 2, 3)]
    assert decide(*headers, at={"a": 1, "b": 1}, budget=40)[1] == ["a:1", "b:1", "a:2", "b:2"]


def test_a_batch_holds_no_more_models_than_fit_the_device() -> None:
    headers = [job(model, 1, number=i) for i, model in enumerate("abc")] + [job("a", 2, number=9)]
    assert decide(*headers, at=dict.fromkeys("abc", 1), max_models=2)[1] == ["a:1", "b:1", "a:2"]


@pytest.mark.parametrize(
    ("served", "active", "expected"),
    [
        ({}, [], 0.0),
        ({"a": 100.0, "b": 300.0}, ["a", "b"], 100.0),
        ({"new": 900.0, "a": 100.0}, ["a"], 900.0),
        ({"new": 5.0, "a": 100.0}, [], 5.0),
    ],
)
def test_a_model_that_comes_back_is_owed_nothing_for_its_absence(
    served: dict[str, float], active: list[str], expected: float
) -> None:
    assert rejoin("new", served, active) == expected


def apart_ids(headers: list[Header], suspects: dict[int, int]) -> list[str]:
    return [header.request_id for header in apart(headers, suspects)]


def test_suspects_of_a_death_run_one_by_one_before_the_others() -> None:
    batch = [job("a", 1, number=1), job("b", 1, number=2), job("c", 1, number=3), job("d", 1, number=4)]
    assert apart_ids(batch, {}) == ["a:1", "b:1", "c:1", "d:1"]
    assert apart_ids(batch, {2: 1, 3: 1}) == ["b:1"]
    assert apart_ids(batch[2:], {2: 1, 3: 1}) == ["c:1"]


def test_whoever_has_seen_most_deaths_runs_first() -> None:
    batch = [job("a", 1, number=1), job("b", 1, number=2), job("c", 1, number=3)]
    assert apart_ids(batch, {1: 1, 2: 2, 3: 1}) == ["b:1"]


def test_many_suspects_run_in_a_bounded_number_of_groups() -> None:
    batch = [job(f"m{n}", 1, number=n) for n in range(5 * TRIALS)]
    assert len(apart(batch, dict.fromkeys(range(5 * TRIALS), 1))) == 5


def test_a_suspect_does_not_overtake_what_stands_before_it_in_its_own_model() -> None:
    batch = [job("a", 1, number=1), job("a", 2, number=2), job("b", 1, number=3)]
    assert apart_ids(batch, {2: 1}) == ["a:1", "b:1"]
    assert apart_ids(batch, {1: 1}) == ["a:1"]
