"""How far sampled logprobs lie from the trainer's forward logprobs of the same tokens, by family and dtype.

    python -m benchmarks.sampling_exactness [--device cpu|cuda] [--dtype float32 bfloat16] [--family NAME ...]

Two layers of width 32 with random weights for every family (a mistake shows, and so does rounding: their logits are
far steeper than a trained model's), and the embedded, trained model. An adapter of rank 8 is sampled at temperature 1
in company of the base and of another adapter, then all of its tokens go through the trainer's forward. The KL
divergence of sampler and trainer is estimated from the sampled tokens by the mean of r - 1 - log r, where r is the
trainer's probability over the sampler's (the "k3" estimator; unbiased, never negative).
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.qwen3 import choose_device
from benchmarks.recording import Row, record
from tests.tiny_families import FAMILIES, randomize
from tinsmith.demo import tiny_folder
from tinsmith.models.loading import load_base
from tinsmith.protocols import BASE_SNAPSHOT, AdamParams, ModelCall, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall, SampleOutput, TrainCall, TrainOutput

EMBEDDED = "embedded model"
DTYPES = ("float32", "bfloat16")
SAMPLES, SAMPLED, STEPS = 4, 40, 4
OWN, OTHER = "own", "other"


@dataclass(frozen=True, slots=True)
class Probe:
    """What is compared: samples of prompts of these lengths, from an adapter of this rank after a few steps."""

    prompts: tuple[int, ...]
    rank: int
    learning_rate: float


PROBE = Probe((1, 9, 40), 8, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--family", nargs="+", default=[EMBEDDED, *FAMILIES])
    arguments = parser.parse_args()
    device, _, accelerator = choose_device(arguments.device)
    torch.set_num_threads(1)
    record("sampling_exactness", list(measure(arguments.family, arguments.dtype, device)), accelerator)


def measure(families: Sequence[str], dtypes: Sequence[str], device: torch.device) -> Iterator[Row]:
    """Three rows for each family and dtype."""
    with tempfile.TemporaryDirectory() as name:
        for family in families:
            folder = tiny_folder() if family == EMBEDDED else write_model(FAMILIES[family], Path(name) / family)
            for dtype in dtypes:
                difference_S = differences(folder, getattr(torch, dtype), device)
                yield from rows(f"{family}, {dtype}", difference_S)


def write_model(make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    torch.manual_seed(0)
    module = make()
    randomize(module, seed=0)
    module.save_pretrained(folder)
    return folder


def rows(name: str, difference_S: NDArray[np.float64]) -> Iterator[Row]:
    """`difference_S` is the trainer's logprob less the sampler's, of each sampled token."""
    distance_S = np.abs(difference_S)
    yield Row(f"{name}: mean |difference|", float(distance_S.mean()), "nats")
    yield Row(f"{name}: max |difference|", float(distance_S.max()), "nats")
    yield Row(f"{name}: KL (k3)", float(np.mean(np.expm1(difference_S) - difference_S)), "nats")


def differences(folder: Path, dtype: torch.dtype, device: torch.device) -> NDArray[np.float64]:
    """Trainer's less sampler's logprob of every token that the adapter's samples consist of."""
    model = load_base(folder, dtype=dtype, device=device, on_progress=lambda _: None)
    trainer = TorchTrainer(model, micro_batch_tokens=512, max_adapters=2, max_rank=8)
    sampler = TorchSampler(model, AutoTokenizer.from_pretrained(tiny_folder()), kv_tokens=8192, max_running=64)
    return compare(trainer, sampler, PROBE)


def compare(trainer: TorchTrainer, sampler: TorchSampler, probe: Probe) -> NDArray[np.float64]:
    """The same of any trainer and sampler of one model; leaves an adapter and another one in both."""
    vocabulary = trainer.capabilities().vocab_size
    for number, name in enumerate((OWN, OTHER)):
        trainer.add(name, ModelSpec(probe.rank, seed=number))
        train(trainer, name, probe.learning_rate, number, vocabulary)
        sampler.publish(name, trainer.snapshot(name))
    calls = [
        SampleCall(random_prompt(vocabulary, length), seed, SAMPLES, SAMPLED, stop_at_eos=False)
        for seed, length in enumerate(probe.prompts)
    ]
    sampled = sample(sampler, calls)
    [scored] = trainer.forward_backward([ModelCall(OWN, supervised(texts_of(calls, sampled), forward_only=True))])
    assert isinstance(scored, TrainOutput), scored
    expected_M, bounds = scored.logprobs_M.astype(np.float64), scored.target_offsets
    parts = [expected_M[end - SAMPLED : end] for end in bounds[1:]]
    return np.concatenate(parts) - np.concatenate([output.logprobs_S for output in sampled])


def train(trainer: TorchTrainer, name: str, learning_rate: float, seed: int, vocabulary: int) -> None:
    """A few steps on random text: a fresh adapter changes nothing."""
    text = np.random.default_rng([seed, vocabulary]).integers(0, vocabulary, 65).astype(np.int32)
    call = ModelCall(name, supervised([text]))
    for _ in range(STEPS):
        trainer.forward_backward([call])
        trainer.optim_step(name, AdamParams(learning_rate=learning_rate))


def random_prompt(vocabulary: int, length: int) -> NDArray[np.int32]:
    return np.random.default_rng(length).integers(0, vocabulary, length).astype(np.int32)


def sample(sampler: TorchSampler, calls: Sequence[SampleCall]) -> list[SampleOutput]:
    """The outputs of the calls to the adapter, sampled beside the same ones to the base and another adapter."""
    for index, call in enumerate(calls):
        for snapshot in (BASE_SNAPSHOT, OTHER, OWN):
            sampler.submit(SnapshotCall(f"{snapshot} {index}", snapshot, snapshot, call))
    outputs: dict[str, SampleOutput] = {}
    while sampler.load:
        for finished in sampler.step():
            assert isinstance(finished.output, SampleOutput), finished.output
            outputs[finished.request_id] = finished.output
    return [outputs[f"{OWN} {index}"] for index in range(len(calls))]


def texts_of(calls: Sequence[SampleCall], outputs: Sequence[SampleOutput]) -> list[NDArray[np.int32]]:
    """Every sample behind its prompt."""
    return [
        np.concatenate([call.prompt_P, output.tokens_S[start:end]])
        for call, output in zip(calls, outputs, strict=True)
        for start, end in pairwise(output.offsets.tolist())
    ]


def supervised(texts: Sequence[NDArray[np.int32]], *, forward_only: bool = False) -> TrainCall:
    """Every text as one datum whose tokens predict the next."""
    offsets = np.cumsum([0, *(len(text) - 1 for text in texts)])
    return TrainCall(
        loss="cross_entropy",
        config={},
        forward_only=forward_only,
        tokens_T=np.concatenate([text[:-1] for text in texts]),
        token_offsets=offsets,
        targets_M=np.concatenate([text[1:] for text in texts]),
        target_offsets=offsets,
        widths_N=np.zeros(len(texts), np.int32),
        inputs={"weights": np.ones(offsets[-1], np.float32)},
    )


if __name__ == "__main__":
    main()
