"""What a request gets never depends on who else is there; and the cache's books are right after every step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.conftest import Bases
from tests.parity.reference import SPECS
from tests.parity.sampling_lab import (
    END,
    drain,
    full,
    lora,
    new_sampler,
    prompt,
    run,
    sample,
    sequences,
)
from tinsmith.errors import NotFoundError, UserError
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import FullWeights, LoraWeights
from tinsmith.protocols import Sampler
from tinsmith.sampling.sampler import TorchSampler

FAMILY = "qwen3-tied"


@pytest.fixture(scope="module")
def model(bases: Bases) -> BaseModel:
    return bases(FAMILY)


def crowd(tenants: int = 3, **options: Any) -> list[Any]:
    """Requests of many lengths and parameters."""
    return [
        sample(
            f"{tenant}-{length}",
            prompt(length, seed=tenant),
            tenant=str(tenant),
            seed=100 * tenant + length,
            num_samples=1 + length % 3,
            max_tokens=5 + length,
            temperature=(1.0, 0.0, 0.7)[length % 3],
            top_k=(-1, 9)[length % 2],
            top_p=(1.0, 0.9)[tenant % 2],
            **options,
        )
        for tenant in range(tenants)
        for length in (1, 6, 16, 33)
    ]


def tokens_of(outputs: list[Any]) -> list[list[list[int]]]:
    return [sequences(output) for output in outputs]


@pytest.fixture(scope="module")
def alone(model: BaseModel) -> list[list[list[int]]]:
    """The crowd's tokens when every request has a sampler to itself."""
    return tokens_of([run(new_sampler(model), call) for call in crowd()])


def test_it_is_a_sampler(model: BaseModel) -> None:
    sampler = new_sampler(model)
    assert isinstance(sampler, Sampler)
    assert sampler.capabilities().max_context == 256
    assert new_sampler(model, kv_tokens=100).capabilities().max_context == 96


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_running": 3},
        {"prefill_tokens": 5},
        {"block_size": 16, "max_running": 30},
        {"kv_tokens": 104},
        {"kv_tokens": 136, "prefill_tokens": 9},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_tokens_in_any_batch(
    options: dict[str, Any], model: BaseModel, alone: list[list[list[int]]]
) -> None:
    assert tokens_of(run(new_sampler(model, **options), *crowd())) == alone


def test_preemption_happens_and_changes_nothing(model: BaseModel, alone: list[list[list[int]]]) -> None:
    sampler = new_sampler(model, kv_tokens=104)
    preempted = []
    original = sampler._seats.preempt

    def watched() -> None:
        before = set(sampler._seats.running)
        original()
        preempted.extend(before - set(sampler._seats.running))

    sampler._seats.preempt = watched  # type: ignore[method-assign]
    assert tokens_of(run(sampler, *crowd())) == alone
    assert preempted


def test_a_warm_cache_changes_nothing(model: BaseModel, alone: list[list[list[int]]]) -> None:
    sampler = new_sampler(model)
    run(sampler, *crowd())
    again = run(sampler, *crowd())
    assert tokens_of(again) == alone
    assert any(output.cache_hit_tokens for output in again)


def test_samples_and_seeds_differ_from_each_other(model: BaseModel) -> None:
    sampler = new_sampler(model)
    one, two = run(
        sampler, sample("one", prompt(9), seed=1, num_samples=8), sample("two", prompt(9), seed=2, num_samples=8)
    )
    everything = [tuple(tokens) for output in (one, two) for tokens in sequences(output)]
    assert len(set(everything)) == 16
    fewer = run(sampler, sample("fewer", prompt(9), seed=1, num_samples=3))
    assert sequences(fewer) == sequences(one)[:3]


def test_samples_of_one_prompt_share_its_blocks_and_its_prefill(model: BaseModel) -> None:
    sampler = new_sampler(model, kv_tokens=8 * 26)
    sampler.submit(sample("a", prompt(100), num_samples=8, max_tokens=4))  # 13 blocks; 8 of its own for each sample
    steps = 0
    while sampler.load:
        sampler.step()
        sampler.check()
        steps += 1
    assert steps == 4


def test_a_request_with_more_samples_than_places_gets_them_all(model: BaseModel) -> None:
    sampler = new_sampler(model, max_running=3, kv_tokens=256)
    output = run(sampler, sample("a", prompt(20), num_samples=20, max_tokens=7))
    assert [len(tokens) for tokens in sequences(output)] == [7] * 20
    assert tokens_of([output]) == tokens_of(
        [run(new_sampler(model), sample("a", prompt(20), num_samples=20, max_tokens=7))]
    )


def test_a_prompt_is_scored_once_whenever_its_samples_run(model: BaseModel) -> None:
    sampler = new_sampler(model, max_running=1, prefill_tokens=10)
    sampler.submit(sample("a", prompt(50), num_samples=3, max_tokens=1, prompt_logprobs=True))
    steps = 0
    while sampler.load:
        sampler.step()
        steps += 1
    assert steps == 5 + 1 + 1  # the later samples find the prompt in the cache


def test_a_tenant_with_two_thousand_requests_does_not_starve_another(model: BaseModel) -> None:
    sampler = new_sampler(model, max_running=4)
    for index in range(2000):
        sampler.submit(sample(f"many-{index}", prompt(4), tenant="greedy", max_tokens=10))
    for _ in range(3):
        sampler.step()
    for index in range(2):
        sampler.submit(sample(f"few-{index}", prompt(4), tenant="modest", max_tokens=10))
    order: list[str] = []
    while not {"few-0", "few-1"} <= set(order):
        order += [finished.request_id for finished in sampler.step()]
    assert len(order) <= 8
    assert sampler.load > 1990


def test_samples_of_one_prompt_leave_half_the_places_to_a_tenant_that_waits_for_blocks(model: BaseModel) -> None:
    sampler = new_sampler(model, kv_tokens=8 * 40, max_running=16)
    sampler.submit(sample("many", prompt(80), num_samples=12, max_tokens=5))
    sampler.submit(sample("large", prompt(240), tenant="b", max_tokens=5))
    sampler.step()
    assert len(sampler._seats.running) == 8
    assert sorted(drain(sampler)) == ["large", "many"]


# Ends


def test_stop_tokens_stay_and_count_as_stopped(model: BaseModel) -> None:
    free = sequences(run(new_sampler(model), sample("free", prompt(9), max_tokens=40)))[0]
    last = free[20]
    expected = free[: free.index(last) + 1]
    output = run(new_sampler(model), sample("a", prompt(9), max_tokens=40, stop_tokens=(last,)))
    assert sequences(output) == [expected]
    assert output.stopped.tolist() == [1]
    cut = run(new_sampler(model), sample("a", prompt(9), max_tokens=5, stop_tokens=(last,)))
    assert cut.stopped.tolist() == [int(last in free[:5])]


def test_stop_strings_end_a_sample_across_tokens(model: BaseModel) -> None:
    free = sequences(run(new_sampler(model), sample("free", prompt(9), max_tokens=40)))[0]
    string = f"{free[19]}t{free[20]}"  # the end of one token, and all of the next
    output = run(new_sampler(model), sample("a", prompt(9), max_tokens=40, stop_strings=("nowhere", string)))
    assert sequences(output) == [free[:21]]
    assert output.stopped.tolist() == [1]


def test_the_end_of_sequence_token_ends_only_who_wants_it(model: BaseModel) -> None:
    calls = [
        sample(name, prompt(9), max_tokens=200, num_samples=8, stop_at_eos=name == "ends") for name in ("ends", "on")
    ]
    ends, on = run(new_sampler(model, kv_tokens=4096), *calls)
    for short, whole in zip(sequences(ends), sequences(on), strict=True):
        assert short == (whole[: whole.index(END) + 1] if END in whole else whole)
    assert ends.stopped.tolist() == [int(END in whole) for whole in sequences(on)]
    assert sum(ends.stopped) > 0
    assert not on.stopped.any()


def test_without_a_limit_a_sample_runs_to_the_context(model: BaseModel) -> None:
    output = run(new_sampler(model), sample("a", prompt(240), max_tokens=None, num_samples=2))
    assert [len(tokens) for tokens in sequences(output)] == [16, 16]
    assert len(run(new_sampler(model), sample("a", prompt(250), max_tokens=999)).tokens_S) == 6
    small = new_sampler(model, kv_tokens=64)
    assert len(run(small, sample("a", prompt(10), max_tokens=None)).tokens_S) == 54


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": range(4, 4 + 0)}, "0 tokens.*1 to 255"),
        ({"tokens": [5] * 256}, "256 tokens.*1 to 255.*context of 256"),
        ({"tokens": [5, 97]}, "97.*0 to 96"),
        ({"tokens": [5, -1]}, "-1.*0 to 96"),
        ({"snapshot": "missing"}, "'missing'"),
        ({"num_samples": 0}, "num_samples: 0"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop_strings": ("",)}, "stop string is empty"),
        ({"topk_prompt_logprobs": 98}, "topk_prompt_logprobs: 98.*0 to 97"),
        ({"topk_sample_logprobs": 98}, "topk_sample_logprobs: 98"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k: -1"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs is not"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, "prompt_logprobs_last_n: 3.*1 to 2"),
        ({"target_prompt_tokens": np.zeros((2, 1), int)}, r"shape \[2, 1\]"),
        ({"target_prompt_tokens": np.full((3, 1), 97)}, "97.*-1 to 96"),
        ({"target_prompt_tokens": np.zeros((3, 1), int)}, "first prompt token"),
    ],
    ids=str,
)
def test_what_can_never_run_is_refused_at_the_door(options: dict[str, Any], message: str, model: BaseModel) -> None:
    sampler = new_sampler(model)
    with pytest.raises(UserError, match=message):
        sampler.submit(sample("a", **({"tokens": [5, 6, 7]} | options)))
    assert sampler.load == 0
    assert sampler.step() == []


def test_an_id_in_use_is_refused(model: BaseModel) -> None:
    sampler = new_sampler(model)
    sampler.submit(sample("a", prompt(4)))
    with pytest.raises(UserError, match="'a' is already"):
        sampler.submit(sample("a", prompt(4)))


def test_cancelled_requests_vanish_and_their_blocks_come_free(model: BaseModel) -> None:
    sampler = new_sampler(model, max_running=4, prefill_tokens=30)
    calls = [sample("running", prompt(20), num_samples=3), sample("prefilling", prompt(90)), sample("kept", prompt(5))]
    calls += [sample(f"waiting-{index}", prompt(9)) for index in range(5)]
    for call in calls:
        sampler.submit(call)
    for _ in range(2):
        sampler.step()
    for request_id in ("running", "prefilling", "waiting-1", "unknown"):
        sampler.cancel(request_id)
        sampler.check()
    results = drain(sampler)
    assert sorted(results) == ["kept", "waiting-0", "waiting-2", "waiting-3", "waiting-4"]
    assert sequences(results["kept"]) == sequences(run(new_sampler(model), sample("kept", prompt(5))))


# Snapshots


def test_requests_keep_the_weights_they_were_submitted_with(model: BaseModel) -> None:
    first, second = lora(model, SPECS["all"], seed=1), lora(model, SPECS["mlp"], seed=2)
    expected = []
    for weights in (first, second):
        fresh = new_sampler(model)
        fresh.publish("x", weights)
        expected.append(sequences(run(fresh, sample("x", prompt(30), "x"))))
    assert expected[0] != expected[1]
    sampler = new_sampler(model)
    sampler.publish("x", first)
    sampler.submit(sample("old", prompt(30), "x"))
    sampler.step()
    sampler.publish("x", second)
    sampler.submit(sample("new", prompt(30), "x"))
    sampler.step()
    sampler.retract("x")
    sampler.retract("x")
    with pytest.raises(NotFoundError, match="'x'"):
        sampler.submit(sample("late", prompt(30), "x"))
    results = drain(sampler)
    assert [sequences(results["old"]), sequences(results["new"])] == expected


def test_the_cache_of_one_version_is_not_used_for_another(model: BaseModel) -> None:
    sampler = new_sampler(model)
    for seed in (1, 2):
        sampler.publish("x", lora(model, SPECS["all"], seed=seed))
        assert run(sampler, sample("a", prompt(50), "x")).cache_hit_tokens == 0
        assert run(sampler, sample("b", prompt(50), "x")).cache_hit_tokens == 48
    assert run(sampler, sample("c", prompt(50))).cache_hit_tokens == 0


@pytest.mark.parametrize("make", [lambda model: lora(model, SPECS["all"]), full], ids=["lora", "full"])
def test_a_saved_snapshot_published_from_its_folder_samples_the_same(
    make: Callable[[BaseModel], Any], model: BaseModel, tmp_path: Path
) -> None:
    sampler = new_sampler(model)
    sampler.publish("memory", make(model))
    sampler.save("memory", tmp_path)
    sampler.publish("disk", tmp_path)
    one, two = run(sampler, sample("one", prompt(12), "memory"), sample("two", prompt(12), "disk"))
    assert sequences(one) == sequences(two)


def test_the_base_snapshot_is_fixed(model: BaseModel, tmp_path: Path) -> None:
    sampler = new_sampler(model)
    with pytest.raises(UserError, match="'base'"):
        sampler.publish("base", lora(model, SPECS["all"]))
    with pytest.raises(UserError, match="no weights of its own"):
        sampler.save("base", tmp_path)
    with pytest.raises(NotFoundError, match="'gone'"):
        sampler.save("gone", tmp_path)
    sampler.retract("base")
    assert len(run(sampler, sample("a", prompt(3))).tokens_S) == 12


def broken(model: BaseModel) -> LoraWeights:
    weights = lora(model, SPECS["all"])
    weights.adapter.weights.fill_(float("nan"))
    return weights


@pytest.mark.parametrize("block_size", [8, 32])
def test_broken_weights_fail_their_own_requests_and_leave_no_trace(block_size: int, model: BaseModel) -> None:
    sampler = new_sampler(model, kv_tokens=512, block_size=block_size)
    sampler.publish("broken", broken(model))
    calls = crowd(tenants=2)
    expected = [run(new_sampler(model), call) for call in calls]
    for _ in range(3):  # later rounds reuse the blocks of the broken requests
        bad = [sample(f"bad-{length}", prompt(length), "broken", num_samples=2) for length in (2, 30, 60)]
        results = run(sampler, *bad, *calls)
        assert all(isinstance(result, UserError) and "'broken'" in str(result) for result in results[:3])
        for result, wanted in zip(results[3:], expected, strict=True):
            assert sequences(result) == sequences(wanted)
            np.testing.assert_allclose(result.logprobs_S, wanted.logprobs_S, atol=1e-5)


# Everything at once


@pytest.fixture(scope="module")
def fulls(model: BaseModel) -> dict[str, FullWeights]:
    return {"full": full(model), "other-full": full(model, seed=6)}


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Submissions, steps, cancellations, publishing and retracting, in any order."""
    actions: list[tuple[str, Any]] = []
    submitted: list[str] = []
    for index in range(draw(st.integers(4, 16))):
        kind = draw(st.sampled_from(["submit"] * 6 + ["step"] * 4 + ["cancel"] * 2 + ["publish", "retract"]))
        if kind == "submit":
            options = {
                "snapshot": draw(st.sampled_from(["base", "base", "x", "full", "other-full"])),
                "tenant": draw(st.sampled_from("abc")),
                "num_samples": draw(st.sampled_from([1, 2, 5])),
                "max_tokens": draw(st.integers(1, 25)),
                "prompt_logprobs": draw(st.booleans()),
                "topk_sample_logprobs": draw(st.sampled_from([0, 0, 3])),
                "temperature": draw(st.sampled_from([0.0, 1.0])),
                "stop_at_eos": draw(st.booleans()),
            }
            submitted.append(str(index))
            actions.append(("submit", sample(str(index), prompt(60)[: draw(st.integers(1, 60))], **options)))
        elif kind == "cancel":
            actions += [("cancel", draw(st.sampled_from(submitted)))] if submitted else []
        else:
            actions.append((kind, draw(st.integers(1, 6))))
    return actions


@given(
    actions=workloads(),
    kv_tokens=st.sampled_from([104, 104, 160, 1024]),
    max_running=st.sampled_from([2, 5, 16]),
    prefill_tokens=st.sampled_from([10, 40, 512]),
)
@settings(max_examples=20)
def test_any_workload_ends_with_every_request_answered_and_every_block_free(
    actions: list[tuple[str, Any]],
    kv_tokens: int,
    max_running: int,
    prefill_tokens: int,
    model: BaseModel,
    fulls: dict[str, FullWeights],
) -> None:
    sampler = new_sampler(model, kv_tokens=kv_tokens, max_running=max_running, prefill_tokens=prefill_tokens)
    sampler.publish("x", lora(model, SPECS["all"]))
    for name, weights in fulls.items():
        sampler.publish(name, weights)
    expected: dict[str, int] = {}
    results: dict[str, Any] = {}
    for kind, argument in actions:
        perform(sampler, kind, argument, expected, results)
        sampler.check()
    results |= drain(sampler)
    assert {request_id: len(output.stopped) for request_id, output in results.items()} == expected
    assert sampler._seats.pool.available == sampler._seats.pool.num_blocks
    for output in results.values():
        assert np.isfinite(output.logprobs_S).all()


def perform(sampler: TorchSampler, kind: str, argument: Any, expected: dict[str, int], results: dict[str, Any]) -> None:
    if kind == "submit":
        try:
            sampler.submit(argument)
        except NotFoundError:
            return
        expected[argument.request_id] = argument.call.num_samples
    elif kind == "step":
        for _ in range(argument):
            results |= {finished.request_id: finished.output for finished in sampler.step()}
            sampler.check()
    elif kind == "cancel":
        sampler.cancel(argument)
        if argument not in results:
            expected.pop(argument, None)
    elif kind == "publish":
        sampler.publish("x", lora(sampler._model, SPECS["attention"], seed=argument))
    else:
        sampler.retract("x")
