"""Sampling on the CPU: tokens per second of our sampler and of transformers' generate, side by side.

python -m benchmarks.sampling_cpu [--rounds N] [--threads N] [--dtype float32]

The model has Qwen3's architecture with 6 layers of width 320 and random weights. Both sides sample the same number of
tokens from the same prompts, at temperature 1, alternately; the best round of each counts. Ours also computes
logprobs; generate, which runs one fixed batch, doesn't. The steps are of the embedded model, without a server.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.recording import Row, percentile, record
from tinsmith.demo import tiny_folder
from tinsmith.models.loading import BaseModel, load_base
from tinsmith.models.weights import LoraWeights
from tinsmith.protocols import BASE_SNAPSHOT, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.wire.packing import SampleCall

REQUESTS, PROMPT, SAMPLED = 64, 64, 128
ADAPTERS, RANK = 8, 16
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)).save_pretrained(folder)
        rows = throughput(folder, getattr(torch, arguments.dtype), arguments.rounds)
    record("sampling_cpu", [*rows, *steps(8), *steps(64)])


def throughput(folder: Path, dtype: torch.dtype, rounds: int) -> list[Row]:
    """Tokens per second of both sides, and their ratio."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model = load_base(folder, dtype=dtype, device=torch.device("cpu"), on_progress=lambda _: None)
    prompts_RP = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (REQUESTS, PROMPT)).astype(np.int32)
    seconds: dict[str, list[float]] = {"generate": [], "ours": [], "ours, 8 adapters": [], "ours, groups of 16": []}
    for _ in range(rounds):
        seconds["generate"].append(generate(module, prompts_RP))
        sampler = new_sampler(model)
        seconds["ours"].append(sample(sampler, prompts_RP, [BASE_SNAPSHOT]))
        seconds["ours, groups of 16"].append(sample(new_sampler(model), prompts_RP[:4], [BASE_SNAPSHOT], 16))
        seconds["ours, 8 adapters"].append(sample(sampler, prompts_RP, publish_adapters(model, sampler)))
    rates = {name: REQUESTS * SAMPLED / min(values) for name, values in seconds.items()}
    rows = [
        Row(f"{name}: {REQUESTS} requests, {PROMPT} + {SAMPLED} tokens", round(rate), "tokens/s")
        for name, rate in rates.items()
    ]
    ratio = Row("ours / generate", round(rates["ours"] / rates["generate"], 2), "times", goal="2.5")
    return [Row("parameters", round(model.parameters / 1e6, 1), "million"), *rows, ratio]


def generate(module: Any, prompts_RP: np.ndarray) -> float:
    """Seconds that transformers needs for one batch."""
    inputs = torch.from_numpy(prompts_RP.astype(np.int64))
    began = time.perf_counter()
    output = module.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=SAMPLED,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert output.shape == (REQUESTS, PROMPT + SAMPLED)
    return time.perf_counter() - began


def new_sampler(model: BaseModel) -> TorchSampler:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    return TorchSampler(model, tokenizer, kv_tokens=2 * REQUESTS * (PROMPT + SAMPLED), max_running=REQUESTS)


def publish_adapters(model: BaseModel, sampler: TorchSampler) -> list[str]:
    names = [f"adapter-{index}" for index in range(ADAPTERS)]
    for index, name in enumerate(names):
        sampler.publish(name, LoraWeights(model.new_adapter(ModelSpec(rank=RANK, seed=index)), model.folder))
    return names


def sample(sampler: TorchSampler, prompts_RP: np.ndarray, snapshots: list[str], num_samples: int = 1) -> float:
    """Seconds that our sampler needs for one request per prompt, spread over the snapshots."""
    began = time.perf_counter()
    for index, prompt_P in enumerate(prompts_RP):
        call = SampleCall(prompt_P, index, num_samples, SAMPLED, stop_at_eos=False)
        sampler.submit(SnapshotCall(str(index), snapshots[index % len(snapshots)], str(index % 4), call))
    while sampler.load:
        sampler.step()
    return time.perf_counter() - began


def steps(rows: int) -> list[Row]:
    """One decoding step of the embedded model, on one thread."""
    torch.set_num_threads(1)
    model = load_base(tiny_folder(), dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda _: None)
    sampler = new_sampler(model)
    prompt_P = np.arange(PROMPT, dtype=np.int32)
    call = SampleCall(prompt_P, 1, rows, SAMPLED, stop_at_eos=False)
    sampler.submit(SnapshotCall("request", BASE_SNAPSHOT, "tenant", call))
    times = []
    while sampler.load:
        began = time.perf_counter()
        sampler.step()
        times.append(1000 * (time.perf_counter() - began))
    name = f"embedded model, {rows} rows: decoding step"
    return [
        Row(f"{name}, fastest tenth", round(percentile(times, 0.1), 2), "ms"),
        Row(f"{name}, median", round(percentile(times, 0.5), 2), "ms"),
    ]


if __name__ == "__main__":
    main()
