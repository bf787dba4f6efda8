"""Sampling on one GPU with many adapters: output tokens per second of the server's own sampler, and vLLM's.

    python -m benchmarks.sampling_gpu [--sizes 0.6b,4b] [--cases adapters,base,one,ragged,groups] [--rival FILE …]

Qwen3's shapes with random weights in bfloat16, temperature 1, the logprob of every sampled token; wall time from the
first submission to the last result, prompts included, after a warm-up. Nothing ends early. `--rival` names files with
the output of vLLM's run on the same machine, whose RESULT lines say what it reached (the same requests).
"""

import argparse
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.qwen3 import SHAPES, Sizes, random_base
from benchmarks.recording import Row, record
from tinsmith.bench import seconds_to_answer
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import LoraWeights
from tinsmith.protocols import ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.wire.packing import SampleCall

ADAPTERS, RANK = 8, 32
GOALS = {
    "sampling 4b lora8": "20000",
    "sampling 0.6b lora8": "38000",
    "sampling 4b base": "21000",
    "sampling 0.6b base": "40000",
    "batch1 4b lora": "3.5",
    "batch1 0.6b lora": "1.8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6b,4b")
    parser.add_argument("--cases", default="adapters,base,one,ragged,groups,publish")
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--rival", action="append", default=[], type=Path)
    parser.add_argument("--name", default="sampling_gpu")
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    rivals = dict(_rivals(arguments.rival))
    rows: list[Row] = []
    for size in arguments.sizes.split(","):
        bench = Bench(size, SHAPES[size], arguments.running)
        for case in arguments.cases.split(","):
            for row in bench.case(case):
                rival = rivals.get(row.name, "")
                rows.append(Row(row.name, row.value, row.unit, rival, GOALS.get(row.name, "")))
                print(rows[-1], flush=True)
        if arguments.profile:
            bench.profile(arguments.profile / f"{size}.txt")
        del bench
        torch.cuda.empty_cache()
    record(arguments.name, rows, f"1 x {torch.cuda.get_device_name()}")


class Bench:
    """One model, its adapters, and a sampler."""

    def __init__(self, size: str, sizes: Sizes, running: int) -> None:
        self._size, self._vocabulary = size, sizes.vocabulary
        started = time.perf_counter()
        self._model = random_base(sizes, torch.bfloat16, torch.device("cuda"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        free, _ = torch.cuda.mem_get_info()
        per_token = self._model.cache_shape.numbers * 2
        self._sampler = TorchSampler(
            self._model,
            tokenizer,
            kv_tokens=int(free * 0.5) // per_token,
            max_running=running,
            max_rank=RANK,
        )
        self._sampler.warm_up(lambda progress: None)
        torch.cuda.synchronize()
        self.started = time.perf_counter() - started
        for index in range(ADAPTERS):
            self._sampler.publish(f"adapter {index}", adapter(self._model, index))
        self._run(self._requests(64, 32, 16, adapters=True))
        self._run(self._requests(64, 32, 16, adapters=False))

    def case(self, name: str) -> Iterator[Row]:
        """The rows of one case."""
        size = self._size
        if name in ("adapters", "base"):
            word = "lora8" if name == "adapters" else "base"
            rates = [
                self._rate(self._requests(256, 256, 512, adapters=name == "adapters", seed=seed)) for seed in (1, 2)
            ]
            yield Row(f"sampling {size} {word}", round(max(rates)), "tokens/s")
        elif name == "one":
            for word in ("lora", "base"):
                seconds = self._run(self._requests(1, 256, 512, adapters=word == "lora"))
                yield Row(f"batch1 {size} {word}", round(1000 * seconds / 512, 3), "ms/token")
        elif name == "ragged":
            yield Row(f"ragged {size} lora8", round(self._rate(ragged(self._vocabulary))), "tokens/s")
        elif name == "groups":
            yield Row(f"groups {size} lora8", round(self._rate(groups(self._vocabulary))), "tokens/s")
        elif name == "publish":
            yield Row(f"start {size}", round(self.started, 1), "s")
            yield Row(f"publish {size}", round(self._publishing(), 3), "ms")

    def _publishing(self) -> float:
        weights = adapter(self._model, 99)
        times = []
        for index in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            self._sampler.publish(f"new {index}", LoraWeights(weights.adapter.copy(), "random"))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        for index in range(20):
            self._sampler.retract(f"new {index}")
        return 1000 * mean(times[2:])

    def _requests(self, count: int, prompt: int, output: int, *, adapters: bool, seed: int = 0) -> list[SnapshotCall]:
        """Other prompts for another seed, so that none is in the cache already."""
        rng = random.Random(f"{count} {prompt} {output} {adapters} {seed}")
        return [
            _call(index, [rng.randrange(100, self._vocabulary - 100) for _ in range(prompt)], output, adapters)
            for index in range(count)
        ]

    def _rate(self, calls: Sequence[SnapshotCall]) -> float:
        """Output tokens per second."""
        tokens = sum((call.call.max_tokens or 0) * call.call.num_samples for call in calls)
        return tokens / self._run(calls)

    def _run(self, calls: Sequence[SnapshotCall]) -> float:
        torch.cuda.synchronize()
        return seconds_to_answer(self._sampler, calls)

    def profile(self, path: Path) -> None:
        """Kernels by time of a stretch of decoding 256 rows with adapters."""
        for call in self._requests(256, 256, 128, adapters=True):
            self._sampler.submit(call)
        for _ in range(14):
            self._sampler.step()
        with torch.profiler.profile() as profile:
            self._sampler.step()
            torch.cuda.synchronize()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70)
        )
        while self._sampler.load:
            self._sampler.step()


def adapter(model: BaseModel, seed: int) -> LoraWeights:
    """Random weights in every linear layer but the head, as the rival has them."""
    made = model.new_adapter(ModelSpec(RANK, seed, train_unembed=False))
    generator = torch.Generator(made.weights.device).manual_seed(seed)
    made.weights.normal_(0, 0.02, generator=generator)
    made.weights_changed()
    return LoraWeights(made, "random")


def ragged(vocabulary: int) -> list[SnapshotCall]:
    """512 requests with prompts of 32 to 2,048 tokens and outputs of 16 to 1,024."""
    rng = random.Random(1)
    lengths = [(rng.randint(32, 2048), rng.randint(16, 1024)) for _ in range(512)]
    return [
        _call(index, [rng.randrange(100, vocabulary - 100) for _ in range(prompt)], output, True)
        for index, (prompt, output) in enumerate(lengths)
    ]


def groups(vocabulary: int) -> list[SnapshotCall]:
    """16 samples of 256 tokens for each of 64 prompts of 1,024 tokens."""
    rng = random.Random(2)
    return [
        _call(index, [rng.randrange(100, vocabulary - 100) for _ in range(1024)], 256, True, samples=16)
        for index in range(64)
    ]


def _call(index: int, prompt: Sequence[int], output: int, adapters: bool, samples: int = 1) -> SnapshotCall:
    asked = SampleCall(
        np.array(prompt, np.int32), seed=index, num_samples=samples, max_tokens=output, stop_at_eos=False
    )
    return SnapshotCall(f"request {index}", f"adapter {index % ADAPTERS}" if adapters else "base", "tenant", asked)


def _rivals(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """By the name of our row, what vLLM's RESULT lines say: the better of repeated runs comes last."""
    names = {
        "batch256": "sampling",
        "batch256-rep": "sampling",
        "batch1": "batch1",
        "ragged": "ragged",
        "groups": "groups",
    }
    for path in files:
        for line in path.read_text().splitlines():
            found = re.search(r"RESULT vllm (\S+) (base|lora) (\S+) .*?out_tok_s=(\d+) ms_per_step=([\d.]+)", line)
            if found is None or found[3] not in names:
                continue
            size, mode, tag, rate, step = found[1].lower(), found[2], found[3], found[4], found[5]
            word = mode if tag == "batch1" else {"lora": "lora8", "base": "base"}[mode]
            yield f"{names[tag]} {size} {word}", step if tag == "batch1" else rate


if __name__ == "__main__":
    main()
