"""LoRA training on one GPU: eight tenants in one batch, against PEFT with torch.compile in the same run.

    python -m benchmarks.training_gpu [--rounds N] [--sizes 0.6b 4b] [--no-rival]

Qwen3's shapes with random bfloat16 weights; 16 x 1024 random tokens, rank 32 on every linear layer but the head;
forward, backward and AdamW. Ours goes through the trainer, from arrays of tokens to weights. The rival has one adapter,
as it can have only one in a compiled batch, and runs in a process of its own, since its compiled code stays in memory.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.qwen3 import fused_base, milliseconds, random_module
from benchmarks.recording import Row, record
from benchmarks.workloads import SHAPES
from tinsmith.bench import random_lesson
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainOutput

SEQUENCES, LENGTH, TENANTS, RANK = 16, 1024, 8, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens per second in the median round, and the peak of torch's allocations in GB."""

    tokens_per_second: float
    peak: float


@dataclass(frozen=True, slots=True)
class Setting:
    """How ours runs: rows of a pass, and whether backward computes the layers again."""

    name: str
    rows: int
    recomputes: bool
    goals: tuple[str, str]  # tokens per second, GB


SETTINGS = {
    "0.6b": [Setting("training 0.6b", 16_384, False, ("150000", ""))],
    "4b": [
        Setting("training 4b", 8_192, False, ("33000", "45")),
        Setting("training 4b checkpointed", 4_096, True, ("24000", "20")),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--no-rival", action="store_true", help="it takes a minute or more to compile")
    parser.add_argument("--rival", choices=list(SHAPES), help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    if arguments.rival:
        result = rival(arguments.rival, arguments.rounds)
        print(json.dumps([result.tokens_per_second, result.peak]))
        return
    rows = []
    for size in arguments.sizes:
        theirs = None if arguments.no_rival else rival_in_a_process(size, arguments.rounds)
        rows += measure(size, arguments.rounds, theirs)
    record("training_gpu", rows, f"1 x {torch.cuda.get_device_name()}")


def measure(size: str, rounds: int, theirs: Result | None) -> list[Row]:
    """All of our rows of one size; `theirs` is the rival's result."""
    base, rows = fused_base(SHAPES[size], torch.device("cuda")), []
    for setting in SETTINGS[size]:
        result = ours(base, setting, rounds)
        same = theirs if theirs and not setting.recomputes else None  # the rival recomputes nothing
        speed, peak = (f"{same.tokens_per_second:.0f}", f"{same.peak:.1f}") if same else ("", "")
        name = setting.name if setting.recomputes else f"{setting.name} tenants{TENANTS}"
        rows.append(Row(name, round(result.tokens_per_second), "tokens/s", speed, setting.goals[0]))
        name = f"{setting.name} memory"
        rows.append(Row(name, round(result.peak, 1), "GB", peak, setting.goals[1]))
    return rows


def ours(base: BaseModel, setting: Setting, rounds: int) -> Result:
    """Every tenant's forward_backward in one batch, and every tenant's step."""
    trainer = TorchTrainer(
        base,
        micro_batch_tokens=setting.rows,
        max_adapters=TENANTS,
        max_rank=RANK,
        gradient_checkpointing=setting.recomputes,
    )
    names = [f"tenant {number}" for number in range(TENANTS)]
    for seed, name in enumerate(names):
        trainer.add(name, ModelSpec(RANK, seed, train_unembed=False))
    calls = [
        ModelCall(name, random_lesson(SEQUENCES // TENANTS, LENGTH, base.vocab_size, seed))
        for seed, name in enumerate(names)
    ]

    def step() -> None:
        for outcome in trainer.forward_backward(calls):
            if not isinstance(outcome, TrainOutput):
                raise outcome
        for name in names:
            trainer.optim_step(name, AdamParams(learning_rate=1e-4))

    return timed(step, rounds)


def timed(step: Callable[[], None], rounds: int) -> Result:
    """After some rounds that do not count."""
    for _ in range(WARM_ROUNDS):
        step()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step) for _ in range(rounds)]
    return Result(SEQUENCES * LENGTH / median(times) * 1000, torch.cuda.max_memory_allocated() / 1e9)


def rival(size: str, rounds: int) -> Result:
    """PEFT and torch.compile: one adapter, the whole batch in one pass, the loss of transformers."""
    module = random_module(SHAPES[size], torch.bfloat16, torch.device("cuda"))
    module.set_attn_implementation("sdpa")
    module.config.use_cache = False
    module.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", target_modules=LINEARS)
    model: Any = get_peft_model(module, config, autocast_adapter_dtype=False).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    compiled = torch.compile(model)
    tokens_NL = torch.randint(100, 150_000, (SEQUENCES, LENGTH), device="cuda")

    def step() -> None:
        compiled(input_ids=tokens_NL, labels=tokens_NL).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, rounds)


def rival_in_a_process(size: str, rounds: int) -> Result:
    command = [sys.executable, "-m", "benchmarks.training_gpu", "--rival", size, "--rounds", str(rounds)]
    began = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    print(f"the rival at {size} took {time.monotonic() - began:.0f} s")
    return Result(*json.loads(run.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
