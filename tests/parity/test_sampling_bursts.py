"""Decoding in bursts that overlap the host's books: whatever happens meanwhile, results are those without bursts.

The bursts of a GPU are played by the plain pass, in the order in which a device would run them: at once when they are
asked for, into the blocks that their rows had then, with their tokens kept back until somebody waits for them.
"""

from collections.abc import Collection, Sequence
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.parity.conftest import Bases
from tests.parity.sampling_lab import drain, full, lora, new_sampler, prompt, run, sample, sequences
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import ModelSpec
from tinsmith.sampling import sampler as sampler_module
from tinsmith.sampling.batch import Work, forward, next_tokens
from tinsmith.sampling.cuda_decoding import CudaDecoding
from tinsmith.sampling.flights import Flight
from tinsmith.sampling.lanes import Lanes
from tinsmith.sampling.recurrent import StateStore
from tinsmith.sampling.requests import Sample
from tinsmith.sampling.sampler import TorchSampler

STEPS = 4
GARBAGE = 5
"""The token of rows that nobody should listen to any more."""


class PlayedGraphs:
    """What `graphs.DecodeGraphs` is to a sampler. `open` says whether samples fit together."""

    def __init__(self, model: BaseModel, sampler: TorchSampler) -> None:
        self.most_steps = STEPS
        self.open = True
        self.error: Exception | None = None
        self._model, self._cache = model, sampler._cache
        self._rows: list[Sample] = []  # as they are on the device

    def fits(self, sample: Sample) -> bool:
        return sample.request.call.call.top_k == -1

    def fit_together(self, samples: Sequence[Sample]) -> bool:
        return self.open

    def launch(self, samples: Sequence[Sample], steps: int) -> Flight:
        if self.error is not None:
            raise self.error
        self._rows = [copy(sample) for sample in samples]
        for row in self._rows:
            row.tokens, row.logprobs = row.tokens.copy(), []
        return self._fly(samples, [sample.blocks for sample in samples], steps, range(len(samples)))

    def can_follow(self, flight: Flight, steps: int) -> bool:
        return True

    def follow(self, flight: Flight, alive: Collection[int], steps: int) -> Flight:
        return self._fly(flight.samples, flight.tables, steps, alive)

    def _fly(
        self, samples: Sequence[Sample], tables: Sequence[list[int]], steps: int, alive: Collection[int]
    ) -> Flight:
        starts = [row.computed for row in self._rows]
        scratch = self._cache.scratch_slot // self._cache.block_size
        chosen_Ns = torch.full((len(samples), steps), GARBAGE)
        logprobs_Ns = torch.zeros(len(samples), steps)
        for row, played in enumerate(self._rows):
            played.blocks = [*(samples[row].blocks if row in alive else []), *[scratch] * 64]
        going = [row for row in range(len(samples)) if row in alive]
        for step in range(steps):
            works = [Work(self._rows[row], 1) for row in going]
            hidden_TD = forward(self._model, self._cache, Lanes(self._cache), StateStore(), works)
            new = list(next_tokens(self._model, [(work, [work.sample]) for work in works], hidden_TD))
            for played in self._rows:
                played.computed += 1
            for row, token in zip(going, new, strict=True):
                self._rows[row].append(token)
                chosen_Ns[row, step], logprobs_Ns[row, step] = token.token, token.logprob
        return Flight(samples, tables, starts, steps, len(samples), lambda: None, chosen_Ns, logprobs_Ns, None)


@pytest.fixture(scope="module")
def model(bases: Bases) -> BaseModel:
    return bases("qwen3-tied")


def publish(sampler: TorchSampler, model: BaseModel) -> TorchSampler:
    sampler.publish("a", lora(model, ModelSpec(8, 1)))
    sampler.publish("full", full(model))
    return sampler


def in_bursts(model: BaseModel, **options: Any) -> tuple[TorchSampler, PlayedGraphs]:
    sampler = publish(new_sampler(model, **options), model)
    graphs: Any = PlayedGraphs(model, sampler)
    layers: Any = None
    sampler._cuda = CudaDecoding(layers, graphs)
    return sampler, graphs


def assert_same(output: Any, expected: Any) -> None:
    assert sequences(output) == sequences(expected)
    assert output.stopped.tolist() == expected.stopped.tolist()
    np.testing.assert_allclose(output.logprobs_S, expected.logprobs_S, atol=2e-5)


CALLS: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    length=st.integers(1, 30),
    family=st.integers(0, 1),  # calls of one family have prompts in common
    snapshot=st.sampled_from(["base", "base", "a", "full"]),
    tenant=st.sampled_from("xy"),
    num_samples=st.sampled_from([1, 1, 2, 5]),
    max_tokens=st.integers(1, 26),
    seed=st.integers(0, 3),
    top_k=st.sampled_from([-1, -1, -1, 20]),
    temperature=st.sampled_from([1.0, 0.7, 0.0]),
    stop_tokens=st.sampled_from([(), (), tuple(range(12))]),
    stop_strings=st.sampled_from([(), (), ("7",)]),
    prompt_logprobs=st.booleans(),
)
EVENTS = st.lists(
    st.one_of(CALLS, CALLS, st.integers(1, 6), st.tuples(st.just("cancel"), st.integers(0, 9)), st.booleans()),
    min_size=4,
    max_size=24,
)


def call_of(number: int, options: dict[str, Any]) -> Any:
    options = dict(options)
    tokens = prompt(30, seed=options.pop("family"))[: options.pop("length")]
    return sample(f"r{number}", tokens, **options)


@settings(max_examples=12, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(events=EVENTS, kv_tokens=st.sampled_from([64, 96, 160, 512]), block_size=st.sampled_from([2, 4, 8]))
def test_whatever_comes_and_goes_results_are_those_without_bursts(
    model: BaseModel, events: list[Any], kv_tokens: int, block_size: int
) -> None:
    sampler, graphs = in_bursts(model, kv_tokens=kv_tokens, block_size=block_size, max_running=6, prefill_tokens=16)
    calls: dict[str, Any] = {}
    results: dict[str, Any] = {}

    def step() -> None:
        for finished in sampler.step():
            assert finished.request_id not in results
            results[finished.request_id] = finished.output
        sampler.check()

    for event in events:
        if isinstance(event, dict):
            call = call_of(len(calls), event)
            calls[call.request_id] = call
            sampler.submit(call)
        elif isinstance(event, tuple):
            sampler.cancel(f"r{event[1]}")
        elif isinstance(event, bool):
            graphs.open = event
        else:
            for _ in range(event):
                step()
    results |= drain(sampler)
    assert sampler._seats.pool.available == sampler._seats.pool.num_blocks
    reference = publish(new_sampler(model, kv_tokens=4096, max_running=64), model)
    for request_id in results:
        reference.submit(calls[request_id])
    expected = drain(reference)
    for request_id, output in results.items():
        assert_same(output, expected[request_id])


def test_a_newcomer_with_few_tokens_to_go_does_not_wait_for_the_long_ones(model: BaseModel) -> None:
    sampler, _ = in_bursts(model)
    for number in range(4):
        sampler.submit(sample(f"long {number}", prompt(9), seed=number, max_tokens=150))
    for _ in range(4):
        sampler.step()
    sampler.submit(sample("short", prompt(5), max_tokens=3))
    finished = [end.request_id for _ in range(6) for end in sampler.step()]
    assert finished == ["short"]


@pytest.mark.parametrize(("tenant", "expected"), [("a", [1, 1, 2, 8]), ("another", [2, 2, 2, 8])])
def test_tokens_take_turns_with_the_passes_of_a_long_prompt(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch, tenant: str, expected: list[int]
) -> None:
    """One step beside each pass that leaves some of the same tenant's, two beside others, then as many as there are."""
    sampler, graphs = in_bursts(model, prefill_tokens=16)
    graphs.most_steps = 8
    sampler.submit(sample("neighbour", prompt(5), max_tokens=60))
    for _ in range(2):
        sampler.step()
    steps: list[int] = []
    launch = graphs.launch

    def counted(samples: Sequence[Sample], count: int) -> Flight:
        steps.append(count)
        return launch(samples, count)

    monkeypatch.setattr(graphs, "launch", counted)
    sampler.submit(sample("long", prompt(50), tenant=tenant, max_tokens=30))
    for _ in range(5):
        sampler.step()
    assert steps == expected  # beside the first pass, the burst that was on its way


@pytest.mark.parametrize("steps", range(2, 6))
def test_a_sample_that_begins_again_takes_nothing_of_the_burst_that_it_was_in(model: BaseModel, steps: int) -> None:
    call = sample("a", prompt(10), max_tokens=40, seed=3)
    sampler, _ = in_bursts(model, block_size=4)
    sampler.submit(call)
    for _ in range(steps):
        sampler.step()
    for running in list(sampler._seats.running.values()):
        sampler._seats.suspend(running)
    assert_same(drain(sampler)["a"], run(new_sampler(model), call))


def test_who_has_ended_hears_of_it_although_the_prompts_beside_it_break(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [sample("early", prompt(9), max_tokens=2), sample("late", prompt(5), max_tokens=4)]
    sampler, _ = in_bursts(model)
    sampler.submit(calls[0])
    sampler.step()
    sampler.submit(calls[1])
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "next_tokens", out_of_memory)
        [early] = sampler.step()
    results = {"early": early.output} | drain(sampler)
    for call in calls:
        assert_same(results[call.request_id], run(new_sampler(model), call))


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("2 GiB")


def test_a_burst_that_cannot_begin_makes_everybody_begin_again(model: BaseModel) -> None:
    calls = [sample("long", prompt(9), max_tokens=30), sample("short", prompt(5), max_tokens=1)]
    sampler, graphs = in_bursts(model)
    sampler.submit(calls[0])
    sampler.step()
    sampler.submit(calls[1])
    graphs.error = torch.OutOfMemoryError("2 GiB")
    assert sampler.step() == []
    graphs.error = None
    results = drain(sampler)
    for call in calls:
        assert_same(results[call.request_id], run(new_sampler(model), call))
