"""What a very long prompt does to those who are decoding: the longest gap between two tokens of a neighbour.

    python -m benchmarks.long_prompt [--device cpu|cuda] [--tokens N] [--neighbours N] [--threads N]

A small model of Qwen3's architecture with random weights and a context of 32,768 tokens. The neighbours decode; then
the prompt arrives. Every step gives each neighbour one token and the prompt one chunk, so a neighbour's gap is a step.
On a CPU a chunk gets shorter the more past it has to look at, so that its step does not get longer with it.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.qwen3 import choose_device, load, milliseconds, write_model
from benchmarks.recording import Row, percentile, record
from benchmarks.workloads import QWEN3_0_6B, Sizes
from tinsmith.demo import tiny_folder
from tinsmith.protocols import BASE_SNAPSHOT, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.sampling.scheduling import LEAST_CHUNK
from tinsmith.wire.packing import SampleCall

SMALL = Sizes(128, 2, 384, 4096, heads=4, kv_heads=2, head_dim=32)
QUIET = 40  # decoding steps before the prompt arrives
CONTEXT = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--neighbours", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype, accelerator = choose_device(arguments.device)
    sizes = SMALL if device.type == "cpu" else QWEN3_0_6B
    measured = measure(sizes, arguments.tokens, arguments.neighbours, device, dtype)
    record("long_prompt", list(measured), accelerator)


def measure(sizes: Sizes, tokens: int, neighbours: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Steps without the prompt and with it, in milliseconds."""
    with tempfile.TemporaryDirectory() as name:
        model = load(write_model(Path(name), sizes, dtype), dtype, device)
    sampler = TorchSampler(
        model, AutoTokenizer.from_pretrained(tiny_folder()), kv_tokens=2 * CONTEXT, max_running=neighbours + 1
    )
    for number in range(neighbours):
        submit(sampler, f"neighbour {number}", 32, QUIET + tokens // LEAST_CHUNK)
    quiet = [milliseconds(sampler.step) for _ in range(QUIET)][8:]
    submit(sampler, "long", tokens, 1)
    busy = []
    while sampler.load > neighbours:
        busy.append(milliseconds(sampler.step))
    assert sampler.load == neighbours, "a neighbour has ended"
    yield Row("parameters", round(model.parameters / 1e6, 1), "million")
    yield Row(f"{neighbours} neighbours decode: step, median", round(median(quiet), 2), "ms")
    yield Row(f"{neighbours} neighbours decode: step, longest", round(max(quiet), 2), "ms")
    name = f"while a prompt of {tokens} tokens runs"
    yield Row(f"{name}: gap between a neighbour's tokens, median", round(median(busy), 2), "ms")
    yield Row(f"{name}: the same, p95", round(percentile(busy, 0.95), 2), "ms")
    yield Row(f"{name}: the same, longest", round(max(busy), 2), "ms")
    yield Row(f"{name}: chunks", len(busy), "steps")
    yield Row(f"{name}: all of its chunks, which a neighbour would wait for without them", round(sum(busy)), "ms")


def submit(sampler: TorchSampler, name: str, length: int, max_tokens: int) -> None:
    prompt_P = np.random.default_rng(length).integers(0, SMALL.vocabulary, length).astype(np.int32)
    call = SampleCall(prompt_P, 1, 1, max_tokens, stop_at_eos=False)
    sampler.submit(SnapshotCall(name, BASE_SNAPSHOT, name, call))


if __name__ == "__main__":
    main()
