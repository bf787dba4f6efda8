"""What `--deterministic` costs on one GPU: the same training and sampling without it and with it.

    python -m benchmarks.deterministic_gpu [--sizes 0.6b,4b] [--parts sampling,training] [--rounds N]

Qwen3's shapes with random weights in bfloat16. Sampling: 256 requests of 256 + 512 tokens of eight adapters, and one
such request. Training: 16 x 1024 tokens, of eight tenants and of one. The column `rival` is ours without the setting,
the goal is 35 % more time than that.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.qwen3 import fused_base, milliseconds
from benchmarks.recording import Row, record
from benchmarks.workloads import ADAPTERS, RANK, SHAPES, Asked, Load, batch1, sampling, warm_up
from tinsmith.bench import random_lesson, seconds_to_answer, seconds_to_train
from tinsmith.models.exact import make_exact
from tinsmith.models.loading import BaseModel
from tinsmith.models.weights import LoraWeights
from tinsmith.protocols import ModelCall, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall

MOST = 1.35  # times as long
SEQUENCES, LENGTH = 16, 1024
MICRO_BATCH = 8192  # tokens, as a deterministic server has by itself
WARM_ROUNDS = 3
KV_SHARE = 0.3  # of free memory


@dataclass(frozen=True, slots=True)
class Measured:
    """A number, and whether more of it is better."""

    name: str
    value: float
    unit: str
    more_is_better: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6b,4b")
    parser.add_argument("--parts", default="sampling,training")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    rows: list[Row] = []
    for size in arguments.sizes.split(","):
        base = fused_base(SHAPES[size], torch.device("cuda"))
        parts = arguments.parts.split(",")
        plain = list(measured(base, size, parts, arguments.rounds))
        make_exact(base, print)
        for before, after in zip(plain, measured(base, size, parts, arguments.rounds), strict=True):
            rows.append(compared(before, after))
            print(rows[-1], flush=True)
        record("deterministic_gpu", rows, f"1 x {torch.cuda.get_device_name()}")
        del base
        torch.cuda.empty_cache()


def compared(before: Measured, after: Measured) -> Row:
    goal = before.value / MOST if before.more_is_better else before.value * MOST
    return Row(f"deterministic {after.name}", after.value, after.unit, f"{before.value:g}", f"{goal:.4g}")


def measured(base: BaseModel, size: str, parts: Sequence[str], rounds: int) -> Iterator[Measured]:
    """As the base model is: exact or not."""
    if "sampling" in parts:
        yield from _sampling(base, size)
        torch.cuda.empty_cache()
    for word, tenants in (("tenants8", 8), ("tenants1", 1)) if "training" in parts else ():
        yield Measured(f"training {size} {word}", round(_training(base, tenants, rounds)), "tokens/s")
        torch.cuda.empty_cache()


def _sampling(base: BaseModel, size: str) -> Iterator[Measured]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokens = int(torch.cuda.mem_get_info()[0] * KV_SHARE) // (base.cache_shape.numbers * 2)
    options = {"kv_tokens": tokens, "max_running": 256, "max_rank": RANK}
    sampler = TorchSampler(base, tokenizer, deterministic=base.exact is not None, **options)
    sampler.warm_up(lambda _: None)
    for number in range(ADAPTERS):
        sampler.publish(f"adapter {number}", _adapter(base, number))
    _seconds(sampler, warm_up(Load(base.vocab_size, ADAPTERS, 0)))
    many = sampling(Load(base.vocab_size, ADAPTERS, 1))
    sampled = sum(asked.output for asked in many)
    yield Measured(f"sampling {size} lora8", round(sampled / _seconds(sampler, many)), "tokens/s")
    (one,) = batch1(Load(base.vocab_size, ADAPTERS, 1))
    yield Measured(f"batch1 {size} lora", round(1000 * _seconds(sampler, [one]) / one.output, 3), "ms/token", False)


def _adapter(base: BaseModel, seed: int) -> LoraWeights:
    made = base.new_adapter(ModelSpec(RANK, seed, train_unembed=False))
    made.weights.normal_(0, 0.02, generator=torch.Generator(made.weights.device).manual_seed(seed))
    made.weights_changed()
    return LoraWeights(made, "random")


def _seconds(sampler: TorchSampler, load: Sequence[Asked]) -> float:
    calls = [
        SnapshotCall(
            f"request {number}",
            f"adapter {asked.adapter}",
            "tenant",
            SampleCall(np.array(asked.prompt, np.int32), seed=number, max_tokens=asked.output, stop_at_eos=False),
        )
        for number, asked in enumerate(load)
    ]
    torch.cuda.synchronize()
    return seconds_to_answer(sampler, calls)


def _training(base: BaseModel, tenants: int, rounds: int) -> float:
    """Tokens per second of every tenant's forward_backward, in one batch, and step."""
    limits = {"micro_batch_tokens": MICRO_BATCH, "max_adapters": tenants, "max_rank": RANK}
    trainer = TorchTrainer(base, **limits, deterministic=base.exact is not None)
    names = [f"tenant {number}" for number in range(tenants)]
    for seed, name in enumerate(names):
        trainer.add(name, ModelSpec(RANK, seed, train_unembed=False))
    lessons = [random_lesson(SEQUENCES // tenants, LENGTH, base.vocab_size, seed) for seed in range(tenants)]
    calls = [ModelCall(name, lesson) for name, lesson in zip(names, lessons, strict=True)]
    step = partial(seconds_to_train, trainer, calls)
    for _ in range(WARM_ROUNDS):
        step()
    return SEQUENCES * LENGTH / median(milliseconds(step) for _ in range(rounds)) * 1000


if __name__ == "__main__":
    main()
