"""Snapshots: what publishing one costs, many adapters in one decoding batch, and one that waits on disk.

    python -m benchmarks.snapshots [--repetitions N]

The embedded model. "In process" is the engine's part of `save_weights_and_get_sampling_client`: the copy of an adapter
and its publication; "through the SDK" is all of it, from a client's call to its sampling client. The server that pages
keeps two dozen snapshots in memory.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import tinker
import torch
from tinker import types
from transformers import AutoTokenizer

from benchmarks.qwen3 import load, milliseconds
from benchmarks.recording import Row, record
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import LoraWeights
from tinsmith.protocols import ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall

RANKS = (32, 128)
ROWS, STEPS = 64, 48
CROWDS = (1, 8, 64)
PLACES = 12  # models that the paging server keeps; of snapshots twice as many
PROMPT = list(range(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    model = load(tiny_folder(), torch.float32, torch.device("cpu"))
    rows = [*publishing(model, repetitions), *crowds(model, STEPS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--max-lora-adapters", str(PLACES)]
        with LocalServer(folder / "data", folder / "log.txt", arguments) as server:
            os.environ.update(server.client_environment())
            with tinker.ServiceClient() as service:
                rows += served(service, repetitions)
    record("snapshots", rows)


def publishing(model: BaseModel, repetitions: int) -> Iterator[Row]:
    """Copying an adapter and handing it to the sampler."""
    trainer = TorchTrainer(model, micro_batch_tokens=512, max_adapters=len(RANKS), max_rank=max(RANKS))
    sampler = new_sampler(model)

    def publish(model_id: str) -> None:
        sampler.publish(model_id, trainer.snapshot(model_id))

    for rank in RANKS:
        model_id = f"rank {rank}"
        trainer.add(model_id, ModelSpec(rank=rank, seed=1))
        times = [milliseconds(partial(publish, model_id)) for _ in range(repetitions)]
        size = trainer.snapshot(model_id).nbytes / 2**20
        name = f"publish an adapter of rank {rank} ({size:.1f} MiB), in process"
        yield Row(f"{name}, median", round(median(times), 3), "ms")


def crowds(model: BaseModel, steps: int) -> Iterator[Row]:
    """One decoding step of as many rows, spread over more and more snapshots."""
    for count in CROWDS:
        sampler = new_sampler(model)
        for number in range(count):
            weights = LoraWeights(model.new_adapter(ModelSpec(rank=16, seed=number)), model.folder)
            sampler.publish(str(number), weights)
        for row in range(ROWS):
            call = SampleCall(np.array(PROMPT, np.int32), row, 1, steps + 8, stop_at_eos=False)
            sampler.submit(SnapshotCall(str(row), str(row % count), str(row), call))
        times = [milliseconds(sampler.step) for _ in range(steps)][8:]
        name = f"{ROWS} rows of {count} snapshot{'s' * (count > 1)} of rank 16: decoding step, median"
        yield Row(name, round(median(times), 2), "ms")


def new_sampler(model: BaseModel) -> TorchSampler:
    return TorchSampler(model, AutoTokenizer.from_pretrained(tiny_folder()), kv_tokens=16_384, max_running=ROWS)


def served(service: tinker.ServiceClient, repetitions: int) -> Iterator[Row]:
    """The same for a client, and samples from snapshots in memory and on disk."""
    client = service.create_lora_training_client("tiny", rank=32).result()
    samplers: list[tinker.SamplingClient] = []

    def publish() -> None:
        samplers.append(client.save_weights_and_get_sampling_client().result())

    def step() -> None:
        client.optim_step(types.AdamParams()).result()  # without a gradient: nothing but the way there and back

    both = [(milliseconds(publish), milliseconds(step)) for _ in range(2 * PLACES)][2:]  # until the memory is full
    name = "save_weights_and_get_sampling_client through the SDK"
    yield Row(f"{name}, median", round(median(times for times, _ in both), 2), "ms", goal="20")
    yield Row(f"{name}, best", round(min(times for times, _ in both), 2), "ms")
    yield Row("a request without work through the SDK, median", round(median(times for _, times in both), 2), "ms")
    yield Row("a request without work through the SDK, best", round(min(times for _, times in both), 2), "ms")
    times = [milliseconds(publish) for _ in range(repetitions)]
    yield Row(f"{name}, one paged out for each, median", round(median(times), 2), "ms")
    prompt, one = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=1, stop=[], seed=1)

    def draw(sampler: tinker.SamplingClient) -> None:
        sampler.sample(prompt, 1, one).result()

    cold = [milliseconds(partial(draw, sampler)) for sampler in samplers]  # by turns: never those in memory
    warm = [milliseconds(partial(draw, samplers[-1])) for _ in range(repetitions)]
    yield Row("one token from a snapshot in memory, median", round(median(warm), 2), "ms")
    yield Row("one token from a snapshot on disk, median", round(median(cold), 2), "ms")


if __name__ == "__main__":
    main()
