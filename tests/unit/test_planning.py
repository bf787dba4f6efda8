"""The planner's decisions, as tables; what tenants wait for each other, for any tenants."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinsmith.engine.planning import TRIALS, Plan, apart, gaps, plan
from tinsmith.engine.shares import BARRIER_TOKENS, Shares
from tinsmith.wire.jobs import Header


def job(
    model: str,
    seq: int,
    kind: str = "forward_backward",
    tokens: int = 10,
    number: int | None = None,
    owner: str = "owner",
) -> Header:
    return Header(number if number is not None else seq, model, seq, kind, owner, tokens, 0.0)


def waiting(*headers: Header) -> dict[str, dict[int, Header]]:
    lanes: dict[str, dict[int, Header]] = {}
    for header in headers:
        lanes.setdefault(header.subject, {})[header.seq] = header
    return lanes


def decide(
    *headers: Header,
    at: dict[str, int],
    shares: Shares | None = None,
    budget: int = 1000,
    max_models: int = 64,
) -> tuple[list[str], list[str]]:
    chosen = plan(waiting(*headers), at, shares or Shares(), budget=budget, max_models=max_models)
    return [h.request_id for h in chosen.barriers], [h.request_id for h in chosen.batch]


def test_nothing_waiting_is_an_empty_plan() -> None:
    assert plan({}, {}, Shares(), budget=10, max_models=1) == Plan()


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


def shares(*served: Header, **weights: float) -> Shares:
    """After these jobs have run, in one batch."""
    shares = Shares()
    shares.weights = weights
    shares.charge(served)
    return shares


@pytest.mark.parametrize("owners", [("owner", "owner"), ("big", "small")])
def test_who_was_served_least_comes_first(owners: tuple[str, str]) -> None:
    big, small = owners
    headers = [
        job("b", 1, tokens=90, number=1, owner=big),
        job("b", 2, tokens=90, number=2, owner=big),
        job("s", 1, tokens=90, number=3, owner=small),
    ]
    before = shares(job("b", 0, tokens=500, owner=big))
    assert decide(*headers, at={"b": 1, "s": 1}, shares=before, budget=100)[1] == ["s:1"]


def test_an_owner_gets_no_more_for_having_many_models() -> None:
    many = [job(f"m{n}", 1, number=n, tokens=30, owner="many") for n in range(6)]
    one = [job("one", n, number=10 + n, tokens=30, owner="one") for n in range(6)]
    at = {header.subject: 1 for header in many} | {"one": 0}
    assert decide(*many, *one, at=at, budget=120)[1] == ["m0:1", "one:0", "m1:1", "one:1"]


def test_an_owner_gets_as_many_times_more_as_its_weight_says() -> None:
    headers = [job(owner, n, number=10 * i + n, owner=owner) for i, owner in enumerate("ab") for n in range(9)]
    _, batch = decide(*headers, at={"a": 0, "b": 0}, shares=shares(b=2.0), budget=60)
    assert sorted(batch) == ["a:0", "a:1", "b:0", "b:1", "b:2", "b:3"]


def test_the_barriers_of_one_owner_are_shared_out_like_batches() -> None:
    saves = [job(f"m{n}", 1, "save_weights", number=n, owner="many") for n in range(6)]
    step = job("one", 1, "optim_step", number=10, owner="one")
    at = {header.subject: 1 for header in [*saves, step]}
    assert decide(*saves, step, at=at, budget=2 * BARRIER_TOKENS)[0] == ["m0:1", "one:1"]


def test_equal_tenants_take_turns_within_a_batch() -> None:
    headers = [job("a", s, number=s) for s in (1, 2, 3)] + [job("b", s, number=10 + s) for s in (1, 2, 3)]
    assert decide(*headers, at={"a": 1, "b": 1}, budget=40)[1] == ["a:1", "b:1", "a:2", "b:2"]


def test_a_batch_holds_no_more_models_than_fit_the_device() -> None:
    headers = [job(model, 1, number=i) for i, model in enumerate("abc")] + [job("a", 2, number=9)]
    assert decide(*headers, at=dict.fromkeys("abc", 1), max_models=2)[1] == ["a:1", "b:1", "a:2"]


def test_who_comes_back_is_owed_nothing_for_its_absence_and_owes_nothing_beyond_its_turn() -> None:
    history = Shares()
    for seq in range(100):
        history.charge([job("old", seq, tokens=50, owner="old")])
    assert history.of_owner("new") == history.of_owner("old") - 50
    history.charge([job("new", 0, tokens=20, owner="new")])
    for seq in range(100, 200):
        history.charge([job("old", seq, tokens=50, owner="old")])
    assert history.of_owner("new") == history.of_owner("old") - 50
    assert history.kept == 2, "accounts that say nothing are not kept"


BUDGET = 100


class Rush:
    """A planner at work: everybody's requests, and what has been run of each owner when."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.shares = Shares()
        self.shares.weights = weights
        self.waiting: dict[str, dict[int, Header]] = defaultdict(dict)
        self.next_seq: dict[str, int] = defaultdict(int)
        self.sent: dict[str, int] = defaultdict(int)
        self.had: dict[str, int] = defaultdict(int)
        self.number = 0

    def send(self, owner: str, model: int, tokens: int) -> Header:
        subject, self.number = f"{owner}:{model}", self.number + 1
        header = job(subject, self.sent[subject], tokens=tokens, number=self.number, owner=owner)
        self.waiting[subject][header.seq] = header
        self.sent[subject] += 1
        self.next_seq[subject] += 0
        return header

    def run(self) -> Sequence[Header]:
        batch = plan(self.waiting, self.next_seq, self.shares, budget=BUDGET, max_models=64).batch
        self.shares.charge(batch)
        for header in batch:
            del self.waiting[header.subject][header.seq]
            self.next_seq[header.subject] += 1
            self.had[header.owner] += header.tokens
        return batch

    def wait_for(self, header: Header) -> Iterator[Sequence[Header]]:
        """The batches that run until the one with `header` in it, which is not among them."""
        while header not in (batch := self.run()):
            yield batch


sizes = st.lists(st.integers(1, BUDGET), min_size=1, max_size=40)


@settings(max_examples=30)
@given(flood=sizes, asked=st.lists(st.integers(1, BUDGET // 2), min_size=1, max_size=8), models=st.integers(1, 20))
def test_beside_a_hundred_times_the_load_a_small_tenant_waits_for_one_batch_at_most_beyond_the_running_one(
    flood: list[int], asked: list[int], models: int
) -> None:
    rush = Rush({})
    for n in range(100 * len(asked)):
        rush.send("flood", n % models, flood[n % len(flood)])
    rush.run()
    before = rush.had["flood"]
    for tokens in asked:
        has_had_less = rush.had["small"] < rush.had["flood"] - before
        waited = list(rush.wait_for(rush.send("small", 0, tokens)))
        assert len(waited) <= (0 if has_had_less else 1)


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=5),
    tokens=st.lists(sizes, min_size=5, max_size=5),
    turns=st.integers(1, 30),
)
@example(weights=[0.5] * 3, tokens=[[49], [51], [51], [1], [1]], turns=30)  # the first always finds room
def test_tenants_that_always_have_work_get_their_share_of_it(
    weights: list[float], tokens: list[list[int]], turns: int
) -> None:
    rush = Rush({str(owner): weight for owner, weight in enumerate(weights)})
    endless = [cycle(some) for some in tokens]
    for _ in range(turns):
        for owner in range(len(weights)):
            for model in range(3):
                while sum(header.tokens for header in rush.waiting[f"{owner}:{model}"].values()) <= BUDGET:
                    rush.send(str(owner), model, next(endless[owner]))
        rush.run()
    had = [rush.had[str(owner)] / weight for owner, weight in enumerate(weights)]
    assert max(had) - min(had) <= 2 * BUDGET / min(weights)


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
