"""How fast a model trains and samples on this machine, as a server would run it; what `tinsmith bench` shows.

Loads the model as an engine does and goes through the engine's own interfaces, so the numbers are those of a server
without HTTP and its queue. Random prompts, temperature 1, nothing ends early; adapters are fresh ones.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinsmith.protocols import BASE_SNAPSHOT, AdamParams, ModelCall, ModelSpec, SnapshotCall
from tinsmith.wire.packing import SampleCall, TrainCall, TrainOutput

if TYPE_CHECKING:
    from tinsmith.protocols import Sampler, Trainer


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked for: adapters and their rank, requests at once, and tokens of each."""

    adapters: int = 8
    rank: int = 32
    requests: int = 64
    prompt: int = 256
    output: int = 128


@dataclass(frozen=True, slots=True)
class Measured:
    """One number."""

    name: str
    value: float
    unit: str


def measure(trainer: "Trainer", sampler: "Sampler", load: Load) -> Iterator[Measured]:
    """Everything, one number after the other. Raises UserError for a load that the model cannot take."""
    names = [f"bench {number}" for number in range(load.adapters)]
    for seed, name in enumerate(names):
        trainer.add(name, ModelSpec(load.rank, seed))
    try:
        yield from _training(trainer, names, load)
        started = time.perf_counter()
        for name in names:
            sampler.publish(name, trainer.snapshot(name))
        yield Measured("publish an adapter", 1000 * (time.perf_counter() - started) / len(names), "ms")
        yield from _sampling(sampler, names, load)
    finally:
        for name in names:
            sampler.retract(name)
            trainer.drop(name)


def _training(trainer: "Trainer", names: Sequence[str], load: Load) -> Iterator[Measured]:
    vocabulary, length = trainer.capabilities().vocab_size, load.prompt + load.output
    rows = max(1, load.requests // len(names))
    calls = [ModelCall(name, random_lesson(rows, length, vocabulary, seed)) for seed, name in enumerate(names)]
    seconds_to_train(trainer, calls)
    seconds = min(seconds_to_train(trainer, calls) for _ in range(2))
    tokens = len(names) * rows * length
    yield Measured(f"training, {len(names)} adapters, {rows} x {length} tokens each", tokens / seconds, "tokens/s")


def seconds_to_train(trainer: "Trainer", calls: Sequence[ModelCall]) -> float:
    """Of one forward_backward of all calls, and a step of every model. Raises what a call failed with."""
    started = time.perf_counter()
    for outcome in trainer.forward_backward(calls):
        if not isinstance(outcome, TrainOutput):
            raise outcome
    for call in calls:
        trainer.optim_step(call.model_id, AdamParams())  # its metrics wait for the device
    return time.perf_counter() - started


def random_lesson(rows: int, length: int, vocabulary: int, seed: int) -> TrainCall:
    """`rows` sequences of `length` random tokens, each with a target of its own, for cross entropy."""
    tokens, targets = np.random.default_rng(seed).integers(0, vocabulary, (2, rows * length)).astype(np.int32)
    offsets, widths = np.arange(rows + 1, dtype=np.int64) * length, np.zeros(rows, np.int32)
    weights = {"weights": np.full(rows * length, 1 / (rows * length), np.float32)}
    return TrainCall("cross_entropy", {}, False, tokens, offsets, targets, offsets, widths, weights)


def _sampling(sampler: "Sampler", names: Sequence[str], load: Load) -> Iterator[Measured]:
    _sample(sampler, names, load, requests=1, seed=0)
    for words, snapshots in (("the base model", [BASE_SNAPSHOT]), (f"{len(names)} adapters", names)):
        seconds = _sample(sampler, snapshots, load, requests=load.requests, seed=1)
        yield Measured(
            f"sampling, {load.requests} requests, {words}", load.requests * load.output / seconds, "tokens/s"
        )
    seconds = _sample(sampler, names, load, requests=1, seed=2)
    yield Measured("sampling, 1 request, 1 adapter", 1000 * seconds / load.output, "ms/token")


def _sample(sampler: "Sampler", snapshots: Sequence[str], load: Load, *, requests: int, seed: int) -> float:
    """Seconds that these requests take."""
    random, vocabulary = np.random.default_rng(seed), sampler.capabilities().vocab_size
    calls = []
    for index in range(requests):
        prompt = random.integers(0, vocabulary, load.prompt).astype(np.int32)
        asked = SampleCall(prompt, seed=index, max_tokens=load.output, stop_at_eos=False)
        calls.append(SnapshotCall(f"bench {index}", snapshots[index % len(snapshots)], "bench", asked))
    return seconds_to_answer(sampler, calls)


def seconds_to_answer(sampler: "Sampler", calls: Sequence[SnapshotCall]) -> float:
    """From the first submission to the last result. Raises what a request failed with."""
    started = time.perf_counter()
    for call in calls:
        sampler.submit(call)
    while sampler.load:
        for finished in sampler.step():
            if isinstance(finished.output, Exception):
                raise finished.output
    return time.perf_counter() - started
