"""One whole step of RL through HTTP with the SDK: publish, roll out, forward_backward, optim_step.

    python -m benchmarks.rl_step_gpu [--size 4b|0.6b|tiny] [--rival FILE …] [--rival-training FILE]

Starts a server of its own on loopback, with random weights of Qwen3's shape, and does what an RL loop does with the
`rollouts` load (16 samples for each of 64 prompts): a snapshot of the adapter, all samples at once, all of them as
data of the importance sampling loss, and a step. A step of a few rollouts comes before the one that counts.

The rival is vLLM's rollouts (`--rival`: the output of `rival_vllm 4b lora --cases rollouts`) and PEFT's training with
torch.compile (`--rival-training`: that of `training_gpu --rival --sizes 4b --cases tenants8`) on the same machine: the
sum of their times, with nothing between them. `tiny` is the embedded model, for a look at the benchmark itself.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tinker
import torch
from tinker import types

from benchmarks.qwen3 import random_module
from benchmarks.recording import Row, record
from benchmarks.sampling_gpu import rival_values
from benchmarks.workloads import RANK, SHAPES, Asked, Load, Sizes, rollouts, sampled_tokens
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer

GOAL = 1.3  # times the rival's speed
ADAM = types.AdamParams(learning_rate=1e-4)
TINY_VOCABULARY = 1000


@dataclass(frozen=True, slots=True)
class Seconds:
    """What the parts of one step took, and how many tokens they were."""

    publish: float
    rollouts: float
    data: float
    train: float
    sampled: int
    trained: int

    @property
    def whole(self) -> float:
        return self.publish + self.rollouts + self.data + self.train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4b", choices=[*SHAPES, "tiny"])
    parser.add_argument("--groups", type=int, default=64, help="prompts")
    parser.add_argument("--option", action="append", default=[], help="of `tinsmith serve`, as --option=--log=debug")
    parser.add_argument("--rival", action="append", default=[], type=Path)
    parser.add_argument("--rival-training", type=Path)
    arguments = parser.parse_args()
    size = arguments.size
    if size in SHAPES and not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    with tempfile.TemporaryDirectory() as name:
        model = (
            "tiny" if size == "tiny" else str(write_random(Path(name) / "model", SHAPES[size], torch.device("cuda")))
        )
        server = LocalServer(
            Path(name) / "data", Path(name) / "log.txt", options_of(model, arguments.option), model=model
        )
        step, rows = measure(server, model, _requests(size, arguments.groups))
    theirs = rival_seconds(size, step, arguments.rival, arguments.rival_training)
    accelerator = f"1 x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    rows = [replace(row, name=f"{row.name}, {size}") for row in rows]
    record("rl_step_gpu" if accelerator else "rl_step_cpu", [*step_rows(size, step, theirs), *rows], accelerator)


def write_random(folder: Path, sizes: Sizes, device: torch.device) -> Path:
    """A folder that can be served: random weights in bfloat16, and the embedded model's tokenizer."""
    random_module(sizes, torch.bfloat16, device).save_pretrained(folder)
    for path in tiny_folder().glob("tokenizer*"):
        shutil.copy(path, folder)
    torch.cuda.empty_cache()  # the memory belongs to the server
    return folder


def _requests(size: str, groups: int) -> list[Asked]:
    """Of the embedded model a tenth of the tokens."""
    if size in SHAPES:
        return rollouts(Load(SHAPES[size].vocabulary, 1, seed=1))[:groups]
    asked = rollouts(Load(TINY_VOCABULARY, 1, seed=1))[:groups]
    return [replace(one, prompt=one.prompt[:100], output=25, samples=4) for one in asked]


def options_of(model: str, more: Sequence[str]) -> list[str]:
    return ["--alias", f"*={model}", *more]


def measure(server: LocalServer, model: str, requests: Sequence[Asked]) -> tuple[Seconds, list[Row]]:
    """The step that counts, and rows of what comes before it. Starts and stops the server."""
    began = time.monotonic()
    with server:
        os.environ.update(server.client_environment())
        with tinker.ServiceClient() as service:
            sample_one(service, model)
            answered = time.monotonic() - began
            client = new_client(service, model)
            began = time.monotonic()
            new_client(service, model)
            added = time.monotonic() - began
            rl_step(client, [replace(asked, prompt=asked.prompt[::-1], samples=2) for asked in requests[:8]])
            step = rl_step(client, requests)
        print(server.tail(3000))
    return step, [
        Row("from the start to the first sample", round(answered, 1), "s", goal="60"),
        Row("a further model to train", round(1000 * added, 1), "ms", goal="50"),
    ]


def sample_one(service: tinker.ServiceClient, model: str) -> None:
    sampler = service.create_sampling_client(base_model=model).result()
    sampler.sample(types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=1)).result()


def new_client(service: tinker.ServiceClient, model: str) -> tinker.TrainingClient:
    """An adapter where the rival's is: on all linear layers but the head."""
    return service.create_lora_training_client(model, rank=RANK, train_unembed=False).result()


def rl_step(client: tinker.TrainingClient, requests: Sequence[Asked]) -> Seconds:
    """Publishes, samples, and trains on all samples."""
    times = [time.monotonic()]
    sampler = client.save_weights_and_get_sampling_client().result()
    times.append(time.monotonic())
    futures = [
        sampler.sample(
            types.ModelInput.from_ints(asked.prompt),
            asked.samples,
            types.SamplingParams(max_tokens=asked.output, seed=number, stop=[]),
        )
        for number, asked in enumerate(requests)
    ]
    groups = [future.result().sequences for future in futures]
    times.append(time.monotonic())
    data = [
        datum
        for asked, group in zip(requests, groups, strict=True)
        for datum in group_data(asked.prompt, [(sample.tokens, sample.logprobs or []) for sample in group])
    ]
    times.append(time.monotonic())
    trained, stepped = client.forward_backward(data, "importance_sampling"), client.optim_step(ADAM)
    outputs = trained.result().loss_fn_outputs
    stepped.result()
    times.append(time.monotonic())
    assert len(outputs) == len(data), f"{len(outputs)} outputs for {len(data)} data"
    tokens = sum(datum.model_input.length for datum in data)
    return Seconds(*np.diff(times).tolist(), sampled_tokens(list(requests)), tokens)


def group_data(prompt: Sequence[int], samples: Sequence[tuple[Sequence[int], Sequence[float]]]) -> list[types.Datum]:
    """A datum of each (tokens, logprobs), with its share of even tokens as reward, less its group's mean."""
    rewards = np.array([np.mean(np.asarray(tokens) % 2 == 0) for tokens, _ in samples])
    data = []
    for (tokens, logprobs), advantage in zip(samples, rewards - rewards.mean(), strict=True):
        text = np.array([*prompt, *tokens], np.int64)
        before = len(prompt) - 1
        inputs = {
            "target_tokens": text[1:],
            "logprobs": np.concatenate([np.zeros(before), logprobs]).astype(np.float32),
            "advantages": np.repeat([0.0, advantage], [before, len(tokens)]).astype(np.float32),
        }
        data.append(types.Datum(model_input=types.ModelInput.from_ints(text[:-1].tolist()), loss_fn_inputs=inputs))
    return data


def rival_seconds(size: str, step: Seconds, sampling: Sequence[Path], training: Path | None) -> tuple[float, float]:
    """What vLLM's rollouts and PEFT's training take for the same tokens; 0 where it was not measured."""
    rate = rival_values(sampling).get(f"rollouts {size} lora1", 0)
    trained = json.loads(training.read_text().splitlines()[-1])[0] if training else 0
    return (step.sampled / rate if rate else 0, step.trained / trained if trained else 0)


def step_rows(size: str, step: Seconds, theirs: tuple[float, float]) -> Iterator[Row]:
    """The whole step and its parts."""
    rollouts, training = theirs
    whole = rollouts + training if rollouts and training else 0
    goal = f"{whole / GOAL:.1f}" if whole else ""
    yield Row(f"rl step {size} http", round(step.whole, 2), "s", _seconds(whole), goal)
    yield Row(f"rl step {size}: publish", round(1000 * step.publish, 1), "ms")
    yield Row(f"rl step {size}: rollouts, {step.sampled} tokens", round(step.rollouts, 2), "s", _seconds(rollouts))
    yield Row(f"rl step {size}: data", round(step.data, 2), "s")
    name = f"rl step {size}: forward_backward and optim_step, {step.trained} tokens"
    yield Row(name, round(step.train, 2), "s", _seconds(training))


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value else ""


if __name__ == "__main__":
    main()
