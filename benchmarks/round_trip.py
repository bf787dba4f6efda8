"""How long a client waits for its answer: SDK, HTTP, queue, engine and arithmetic, on two small models.

    python -m benchmarks.round_trip [--repetitions N]

Starts a server of its own. Each number is the time from calling the SDK to having the result, one request (or one
pipelined pair) at a time. "compute" rows are the same work in the trainer and the sampler alone, without a server.
The models are the embedded one (1.8 M parameters) and one of the size that the rival was measured with (0.2 M).
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import tinker
from tinker import types
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.recording import Row, percentile, record
from tinsmith.config import Settings
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer
from tinsmith.protocols import BASE_SNAPSHOT, AdamParams, ModelCall, ModelSpec, SnapshotCall, Trainer
from tinsmith.wire.packing import SampleCall, TrainCall

RANK = 16
SHORT, LONG, LONG_DATUMS = 8, 128, 8
PROMPT, SAMPLES, SAMPLED = 16, 8, 64
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WARM_UP = 10
LEARNING_RATE = 1e-4

CASES = {
    "forward_backward, 8 tokens": ("153", "15.3"),
    "optim_step": ("102", "10.2"),
    "forward_backward 8 x 128 tokens + optim_step": ("206 to 330", "compute"),
    "sample 8 x 64 tokens": ("156", "compute"),
}
"""Case: (the best rival's median in ms on two such cores, with a model of 0.2 M parameters; our goal)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=60)
    repetitions = parser.parse_args().repetitions
    results: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for prefix, model in (("", "tiny"), ("0.2 M parameters: ", str(small_model(folder / "small")))):
            served = measure_served(model, folder / "served", repetitions)
            computed = measure(backend_actions(model), repetitions)
            results += [*rows(served, prefix, CASES), *rows(computed, f"{prefix}compute: ", {})]
    record("round_trip", results)


def measure_served(model: str, folder: Path, repetitions: int) -> dict[str, list[float]]:
    folder.mkdir(exist_ok=True)
    with LocalServer(folder / "data", folder / "log.txt", ["--alias", f"*={model}"], model=model) as server:
        os.environ.update(server.client_environment())
        with tinker.ServiceClient() as service:
            return measure(client_actions(service), repetitions)


def small_model(folder: Path) -> Path:
    """A random model of the embedded one's kind with 0.2 M parameters, and the same tokenizer."""
    shutil.copytree(tiny_folder(), folder)
    config = AutoConfig.from_pretrained(folder)
    for name, value in SMALL.items():
        setattr(config, name, value)
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def client_actions(service: tinker.ServiceClient) -> dict[str, Callable[[], object]]:
    """What users do, by case."""
    client = service.create_lora_training_client("tiny", rank=RANK).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    short, long = [datum(SHORT)], [datum(LONG, first) for first in range(LONG_DATUMS)]
    adam = types.AdamParams(learning_rate=LEARNING_RATE)
    prompt = types.ModelInput.from_ints(list(range(PROMPT)))
    params = types.SamplingParams(max_tokens=SAMPLED, stop=[])

    def train() -> None:
        gradient, step = client.forward_backward(long, "cross_entropy"), client.optim_step(adam)
        gradient.result()
        step.result()

    actions: list[Callable[[], object]] = [
        lambda: client.forward_backward(short, "cross_entropy").result(),
        lambda: client.optim_step(adam).result(),
        train,
        lambda: sampler.sample(prompt, SAMPLES, params).result(),
    ]
    return dict(zip(CASES, actions, strict=True))


def backend_actions(model: str) -> dict[str, Callable[[], object]]:
    """The same work without server and client, by case."""
    from tinsmith.backend import load_backend
    from tinsmith.served import Served, base_of

    trainer, sampler = load_backend(Settings(), Served(model, base_of(model)), lambda progress: None)
    trainer.add("model", ModelSpec(rank=RANK, seed=1))
    short, long = calls(1, SHORT), calls(LONG_DATUMS, LONG)
    prompt = SampleCall(np.arange(PROMPT, dtype=np.int32), 1, SAMPLES, SAMPLED, stop_at_eos=False)

    def sample() -> None:
        sampler.submit(SnapshotCall("request", BASE_SNAPSHOT, "tenant", prompt))
        while not sampler.step():
            pass

    actions: list[Callable[[], object]] = [
        lambda: trainer.forward_backward(short),
        lambda: step(trainer),
        lambda: (trainer.forward_backward(long), step(trainer)),
        sample,
    ]
    return dict(zip(CASES, actions, strict=True))


def step(trainer: Trainer) -> None:
    trainer.optim_step("model", AdamParams(learning_rate=LEARNING_RATE))


def datum(length: int, first: int = 0) -> types.Datum:
    """A datum of `length` tokens with a target at each. Another `first`, and it begins in another way."""
    targets = np.arange(first + 1, first + length + 1)
    weights = np.ones(length, np.float32)
    model_input = types.ModelInput.from_ints(list(range(first, first + length)))
    return types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets, "weights": weights})


def calls(datums: int, length: int) -> list[ModelCall]:
    """The same datums as they reach the trainer."""
    offsets = np.arange(datums + 1, dtype=np.int64) * length
    tokens = (np.arange(datums)[:, None] + np.arange(length)).ravel().astype(np.int32)
    inputs = {"weights": np.ones(datums * length, np.float32)}
    widths = np.zeros(datums, np.int32)
    return [
        ModelCall("model", TrainCall("cross_entropy", {}, False, tokens, offsets, tokens + 1, offsets, widths, inputs))
    ]


def measure(actions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every repetition, by case. An optim_step is timed with a gradient waiting, as in training."""
    times = {}
    for case, action in actions.items():
        prepare = actions["forward_backward, 8 tokens"] if case == "optim_step" else None
        for _ in range(WARM_UP):
            _milliseconds(action, prepare)
        times[case] = [_milliseconds(action, prepare) for _ in range(repetitions)]
    return times


def _milliseconds(action: Callable[[], object], prepare: Callable[[], object] | None) -> float:
    if prepare is not None:
        prepare()
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def rows(times: dict[str, list[float]], prefix: str, compared: dict[str, tuple[str, str]]) -> Iterator[Row]:
    """Median and 95th percentile of each case."""
    for case, values in times.items():
        rival, goal = compared.get(case, ("", ""))
        yield Row(f"{prefix}{case}, median", round(median(values), 2), "ms", rival, goal)
        yield Row(f"{prefix}{case}, p95", round(percentile(values, 0.95), 2), "ms")


if __name__ == "__main__":
    main()
