"""Sampling on the CPU: tokens per second of our sampler and of transformers' generate, side by side.

python -m benchmarks.sampling_cpu [--rounds N] [--threads N]

The model has Qwen3's architecture with 6 layers of width 320 (8.3 M parameters) and random weights. Both sides sample
the same number of tokens from the same prompts, at temperature 1, alternately; the best round of each counts. Ours also
computes logprobs; generate, which runs one fixed batch, doesn't. The rows with HTTP are the same requests through a
server and the real SDK, against the sampler alone with the server's number of threads.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.recording import Row, record
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer
from tinsmith.models.loading import BaseModel, load_base
from tinsmith.models.weights import LoraWeights
from tinsmith.protocols import BASE_SNAPSHOT, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.wire.packing import SampleCall

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 960,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
GOALS = {("bfloat16", 1): "1.5", ("bfloat16", 16): "1.8", ("bfloat16", 64): "2.5"}
"""Ours / generate, by dtype and number of requests."""
ADAPTERS_GOAL, GROUP_GOAL, HTTP_GOAL = "0.85", "1.3", "10"


@dataclass(frozen=True)
class Load:
    """How many requests at once, of how many tokens; `group` samples of one prompt of `group_prompt` tokens."""

    requests: tuple[int, ...] = (1, 16, 64)
    prompt: int = 32
    sampled: int = 128
    adapters: int = 8
    rank: int = 16
    group: int = 16
    group_prompt: int = 512

    def prompts(self, requests: int) -> np.ndarray:
        """Int32 [requests, prompt]."""
        return _random_tokens(requests, self.prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    load = Load()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", SHAPE)
        for dtype in ("float32", "bfloat16"):
            torch.set_num_threads(arguments.threads)
            rows += throughput(folder, dtype, load, arguments.rounds)
        rows += served(folder, load, Path(name), arguments.rounds)
    record("sampling_cpu", rows)


def write_model(folder: Path, shape: dict[str, int]) -> Path:
    """A random model, with the embedded model's tokenizer."""
    Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(folder)
    return folder


def throughput(folder: Path, dtype: str, load: Load, rounds: int) -> list[Row]:
    """Tokens per second of both sides and their ratios, for every number of requests; then adapters, then a group."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model = load_base(folder, dtype=getattr(torch, dtype), device=torch.device("cpu"), on_progress=lambda _: None)
    rows: list[Row] = []
    for requests in load.requests:
        seconds = best_of(rounds, actions(module, model, load, requests))
        rows += rates(f"{dtype}, {requests} requests", seconds, requests * load.sampled, GOALS.get((dtype, requests)))
    seconds = best_of(rounds, group_actions(model, load))
    ratio = seconds["group"] / seconds["one"]
    name = f"{dtype}, prompt of {load.group_prompt} tokens: first tokens of {load.group} samples / of one"
    return [*rows, Row(name, round(ratio, 2), "times", goal=GROUP_GOAL)]


def actions(module: Any, model: BaseModel, load: Load, requests: int) -> dict[str, Callable[[], None]]:
    """What is timed alternately. Adapters are measured with the most requests only."""
    prompts_RP = load.prompts(requests)
    found = {
        "generate": lambda: generate(module, prompts_RP, load.sampled),
        "ours": lambda: sample(new_sampler(model, load), prompts_RP, load.sampled),
    }
    if requests == max(load.requests):
        adapted = new_sampler(model, load)
        names = publish_adapters(model, adapted, load)
        found["ours, adapters"] = lambda: sample(adapted, prompts_RP, load.sampled, names)
    return found


def group_actions(model: BaseModel, load: Load) -> dict[str, Callable[[], None]]:
    """The first token of one sample, and those of a group, each with an empty cache."""
    prompt_1P = _random_tokens(1, load.group_prompt)
    return {
        "one": lambda: sample(new_sampler(model, load), prompt_1P, 1),
        "group": lambda: sample(new_sampler(model, load), prompt_1P, 1, num_samples=load.group),
    }


def best_of(rounds: int, timed: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each action's fastest round; they take turns."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, action in timed.items():
            began = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in seconds.items()}


def rates(prefix: str, seconds: dict[str, float], tokens: int, goal: str | None) -> Iterator[Row]:
    for name, value in seconds.items():
        yield Row(f"{prefix}: {name}", round(tokens / value), "tokens/s")
    yield Row(f"{prefix}: ours / generate", round(seconds["generate"] / seconds["ours"], 2), "times", goal=goal or "")
    if "ours, adapters" in seconds:
        ratio = seconds["ours"] / seconds["ours, adapters"]
        yield Row(f"{prefix}: adapters / base", round(ratio, 2), "times", goal=ADAPTERS_GOAL)


def generate(module: Any, prompts_RP: np.ndarray, sampled: int) -> None:
    inputs = torch.from_numpy(prompts_RP.astype(np.int64))
    output = module.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=sampled,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert output.shape == (len(prompts_RP), prompts_RP.shape[1] + sampled)


def new_sampler(model: BaseModel, load: Load) -> TorchSampler:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    requests = max(*load.requests, load.group)
    tokens = requests * (load.prompt + load.sampled + 16) + load.group * 16 + load.group_prompt
    return TorchSampler(model, tokenizer, kv_tokens=tokens, max_running=requests)


def publish_adapters(model: BaseModel, sampler: TorchSampler, load: Load) -> list[str]:
    names = [f"adapter-{index}" for index in range(load.adapters)]
    for index, name in enumerate(names):
        sampler.publish(name, LoraWeights(model.new_adapter(ModelSpec(rank=load.rank, seed=index)), model.folder))
    return names


def sample(
    sampler: TorchSampler,
    prompts_RP: np.ndarray,
    sampled: int,
    snapshots: list[str] | None = None,
    num_samples: int = 1,
) -> None:
    """One request per prompt, spread over the snapshots, until all have ended."""
    names = snapshots or [BASE_SNAPSHOT]
    for index, prompt_P in enumerate(prompts_RP):
        call = SampleCall(prompt_P, index, num_samples, sampled, stop_at_eos=False)
        sampler.submit(SnapshotCall(str(index), names[index % len(names)], str(index % 4), call))
    while sampler.load:
        sampler.step()


def served(folder: Path, load: Load, scratch: Path, rounds: int) -> list[Row]:
    """The most requests at once through a server, and in process: what HTTP and the queue take."""
    requests = max(load.requests)
    torch.set_num_threads(1)  # what the server gives so small a model
    model = load_base(folder, dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda _: None)
    prompts_RP = load.prompts(requests)
    with LocalServer(scratch / "data", scratch / "log.txt", model=str(folder)) as server:
        os.environ.update(server.client_environment())
        with tinker.ServiceClient() as service:
            client = service.create_sampling_client(base_model=str(folder))
            timed = {
                "in process": lambda: sample(new_sampler(model, load), prompts_RP, load.sampled),
                "through HTTP": lambda: sample_served(client, prompts_RP, load.sampled),
            }
            seconds = best_of(rounds, timed)
    prefix, tokens = f"float32, one thread, {requests} requests", requests * load.sampled
    rows = [Row(f"{prefix}: {name}", round(tokens / value), "tokens/s") for name, value in seconds.items()]
    share = 100 * (1 - seconds["in process"] / seconds["through HTTP"])
    return [*rows, Row(f"{prefix}: share of HTTP and queue", round(share, 1), "%", goal=HTTP_GOAL)]


def sample_served(client: tinker.SamplingClient, prompts_RP: np.ndarray, sampled: int) -> None:
    params = types.SamplingParams(max_tokens=sampled, temperature=1.0, stop=[])
    prompts = [types.ModelInput.from_ints(prompt_P.tolist()) for prompt_P in prompts_RP]
    futures = [client.sample(prompt, 1, params) for prompt in prompts]
    for future in futures:
        [sequence] = future.result().sequences
        assert len(sequence.tokens) == sampled


def _random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (rows, length)).astype(np.int32)


if __name__ == "__main__":
    main()
