"""Sampling on one GPU with many adapters: output tokens per second of the server's own sampler, and vLLM's.

    python -m benchmarks.sampling_gpu [--sizes 0.6b,4b] [--cases sampling,batch1,ragged,groups,…] [--rival FILE …]

Qwen3's shapes with random weights in bfloat16, temperature 1, the logprob of every sampled token; wall time from the
first submission to the last result, prompts included, after a warm-up. Nothing ends early. Then what a start, a new
adapter and its publishing take, and how far sampled logprobs lie from the trainer's. `--rival` names files with the
output of `rival_vllm` on the same machine, which has the same requests. `ragged/lora` is that case in that mode only.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks import sampling_exactness
from benchmarks.qwen3 import fused_base, milliseconds
from benchmarks.recording import Row, record
from benchmarks.sampling_profile import write_profile
from benchmarks.workloads import ADAPTERS, CASES, RANK, SHAPES, Asked, Load, Sizes, made, sampled_tokens, warm_up
from tinsmith.bench import seconds_to_answer
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import LoraWeights
from tinsmith.protocols import BASE_SNAPSHOT, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall

GOALS = {
    "sampling 4b lora8": "20000",
    "sampling 0.6b lora8": "38000",
    "sampling 4b base": "21000",
    "sampling 0.6b base": "40000",
    "batch1 4b lora": "3.5",
    "batch1 0.6b lora": "1.8",
    "start": "60",
    "add an adapter": "50",
    "publish": "5",
    "|sampled - trained logprob|, mean": "0.005",
}
"""By the name of a row, or its beginning."""
TIMES_THE_RIVAL = {"ragged": 1.2, "groups": 1.2}
KV_SHARE = 0.8  # of free memory, about what the rival takes; a server takes less unless told (kv_cache_tokens)
PROBE = sampling_exactness.Probe((64, 256, 1024), RANK, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6b,4b")
    parser.add_argument("--modes", default="lora,base")
    parser.add_argument("--cases", default="sampling,batch1,ragged,groups,rollouts,models,exactness")
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--rival", action="append", default=[], type=Path)
    parser.add_argument("--name", default="sampling_gpu")
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    rivals = rival_values(arguments.rival)
    rows: list[Row] = []
    for size in arguments.sizes.split(","):
        bench = Bench(size, SHAPES[size], arguments.running, arguments.profile)
        for row in bench.rows(arguments.cases.split(","), arguments.modes.split(",")):
            rows.append(compared(row, rivals))
            print(rows[-1], flush=True)
            record(arguments.name, rows, f"1 x {torch.cuda.get_device_name()}")  # each time: the next case may fail
        del bench
        torch.cuda.empty_cache()


def compared(row: Row, rivals: dict[str, float]) -> Row:
    """With the rival's value and our goal, where there are any."""
    rival = rivals.get(row.name)
    goal = next((goal for name, goal in GOALS.items() if row.name.startswith(name)), "")
    factor = TIMES_THE_RIVAL.get(row.name.split()[0])
    if rival and factor:
        goal = f"{factor * rival:.0f}"
    return Row(row.name, row.value, row.unit, f"{rival:g}" if rival else "", goal)


def result_row(case: str, size: str, mode: str, seconds: float, tokens: int) -> Row:
    """How a load's time is told: of a single request by its token, else by tokens per second."""
    if case == "batch1":
        return Row(f"batch1 {size} {mode}", round(1000 * seconds / tokens, 3), "ms/token")
    words = {"rollouts": {"lora": "lora1"}}.get(case, {"lora": f"lora{ADAPTERS}"})
    return Row(f"{case} {size} {words.get(mode, mode)}", round(tokens / seconds), "tokens/s")


def rival_values(files: Sequence[Path]) -> dict[str, float]:
    """By the name of our row, the best of what the rival's RESULT lines say."""
    best: dict[str, Row] = {}
    for path in files:
        for line in path.read_text().splitlines():
            if not line.startswith("RESULT "):
                continue
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            if result["tokens"]:
                row = result_row(**result)
                best[row.name] = better(row, best.get(row.name))
    return {name: row.value for name, row in best.items()}


def better(row: Row, other: Row | None) -> Row:
    """Of two values with one name."""
    if other is None:
        return row
    return min(row, other, key=lambda row: row.value if row.unit == "ms/token" else -row.value)


class Bench:
    """One model, its adapters, and a sampler."""

    def __init__(self, size: str, sizes: Sizes, running: int, profiles: Path | None = None) -> None:
        """Profiles of loads are written to the folder `profiles`."""
        self._size, self._vocabulary, self._profiles = size, sizes.vocabulary, profiles
        started = time.perf_counter()
        self._model = fused_base(sizes, torch.device("cuda"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        free, _ = torch.cuda.mem_get_info()
        per_token = self._model.cache_shape.numbers * 2
        self._sampler = TorchSampler(
            self._model,
            tokenizer,
            kv_tokens=int(free * KV_SHARE) // per_token,
            max_running=running,
            max_rank=RANK,
        )
        self._sampler.warm_up(lambda progress: None)
        if self._sampler._cuda is None:
            raise SystemExit("this device samples without captured steps (the log says why): nothing to compare")
        torch.cuda.synchronize()
        self._started = time.perf_counter() - started
        for number in range(ADAPTERS):
            self._sampler.publish(f"adapter {number}", adapter(self._model, number))
        for adapters in (ADAPTERS, 0):
            self._answer(warm_up(Load(sizes.vocabulary, adapters, 0)))

    def rows(self, cases: Sequence[str], modes: Sequence[str]) -> Iterator[Row]:
        """Every case in every mode; then what knows no modes."""
        for mode in modes:
            for case, _, only in (case.partition("/") for case in cases):
                if case in CASES and only in ("", mode):
                    yield self._load(case, mode)
        yield Row(f"start {self._size}", round(self._started, 1), "s")
        others: dict[str, Callable[[], Iterator[Row]]] = {"models": self._models, "exactness": self._exactness}
        for case in cases:
            if case in others:
                yield from others[case]()

    def _load(self, case: str, mode: str) -> Row:
        best: Row | None = None
        for requests in made(case, self._vocabulary, ADAPTERS if mode == "lora" else 0):
            seconds = self._answer(requests)
            best = better(result_row(case, self._size, mode, seconds, sampled_tokens(requests)), best)
        if self._profiles:
            requests = CASES[case](Load(self._vocabulary, ADAPTERS if mode == "lora" else 0, 0))
            write_profile(self._sampler, calls_of(requests), self._profiles / f"{case}_{self._size}_{mode}.txt")
        assert best is not None, "every load is measured at least once"
        return best

    def _answer(self, requests: Sequence[Asked]) -> float:
        torch.cuda.synchronize()
        return seconds_to_answer(self._sampler, calls_of(requests))

    def _models(self) -> Iterator[Row]:
        """What it takes to add an adapter and to publish one."""
        trainer = TorchTrainer(self._model, micro_batch_tokens=4096, max_adapters=ADAPTERS, max_rank=RANK)
        specs = [ModelSpec(RANK, seed, train_unembed=False) for seed in range(ADAPTERS)]
        adding = [milliseconds(partial(trainer.add, f"new {spec.seed}", spec)) for spec in specs]
        yield Row(f"add an adapter, {self._size}", round(median(adding), 2), "ms")
        times = []
        for index in range(20):
            publish = partial(self._sampler.publish, f"{index}")
            times.append(milliseconds(lambda publish=publish: publish(trainer.snapshot("new 0"))))
        for index in range(20):
            self._sampler.retract(f"{index}")
        yield Row(f"publish {self._size}", round(mean(times[2:]), 3), "ms")

    def _exactness(self) -> Iterator[Row]:
        trainer = TorchTrainer(self._model, micro_batch_tokens=4096, max_adapters=2, max_rank=RANK)
        distance_S = np.abs(sampling_exactness.compare(trainer, self._sampler, PROBE))
        name = "|sampled - trained logprob|"
        yield Row(f"{name}, mean, {self._size}", float(f"{distance_S.mean():.3g}"), "nats")
        yield Row(f"{name}, largest of {len(distance_S)}, {self._size}", float(f"{distance_S.max():.3g}"), "nats")


def adapter(model: BaseModel, seed: int) -> LoraWeights:
    """Random weights in every linear layer but the head, as the rival has them."""
    made = model.new_adapter(ModelSpec(RANK, seed, train_unembed=False))
    generator = torch.Generator(made.weights.device).manual_seed(seed)
    made.weights.normal_(0, 0.02, generator=generator)
    made.weights_changed()
    return LoraWeights(made, "random")


def calls_of(requests: Sequence[Asked]) -> list[SnapshotCall]:
    return [
        SnapshotCall(
            f"request {index}",
            BASE_SNAPSHOT if asked.adapter is None else f"adapter {asked.adapter}",
            "tenant",
            SampleCall(
                np.array(asked.prompt, np.int32),
                seed=index,
                num_samples=asked.samples,
                max_tokens=asked.output,
                stop_at_eos=False,
            ),
        )
        for index, asked in enumerate(requests)
    ]


if __name__ == "__main__":
    main()
