"""Training on one GPU: eight tenants' LoRA in one batch, and all weights of a model, against rivals in the same run.

    python -m benchmarks.training_gpu [--rounds N] [--sizes 0.6b 4b] [--cases tenants8 checkpointed full] [--no-rival]

Qwen3's shapes with random bfloat16 weights; 16 x 1024 random tokens; rank 32 on every linear layer but the head, or no
adapters; forward, backward and AdamW. Ours goes through the trainer, from arrays of tokens to weights. The rivals are
PEFT (with one adapter, as it can have only one in a compiled batch) and plain transformers, both with torch.compile, in
processes of their own, since compiled code stays in memory. With all weights trained, ours keeps weights, gradients
and moments in fp32, and transformers in bfloat16.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.qwen3 import fused_base, milliseconds, random_module
from benchmarks.recording import Row, record
from benchmarks.workloads import SHAPES
from tinsmith.bench import random_lesson, seconds_to_train
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

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
    """How ours runs: rows of a pass; `checkpointed` computes layers again in backward, `full` trains all weights.

    The latter keeps logits too, so that a pass has fewer rows than are set: 16,384 of them.
    """

    case: str
    rows: int
    speed: str = ""  # the goals: tokens per second, GB
    peak: str = ""


FULL_LEAD = 1.3  # the goal where all weights are trained, times the rival's speed
SETTINGS = {
    "0.6b": [Setting("tenants8", 16_384, "150000"), Setting("full", 21_504)],
    "4b": [Setting("tenants8", 8_192, "33000", "45"), Setting("checkpointed", 6_144, "24000", "20")],
}
RIVALS = ("tenants8", "full")  # the cases that have one
CASES = ("tenants8", "checkpointed", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--no-rival", action="store_true", help="each takes a minute or more to compile")
    parser.add_argument("--rival", action="store_true", help="measures only the rival of this size and case")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    if arguments.rival:
        result = rival(arguments.sizes[0], arguments.cases[0], arguments.rounds)
        print(json.dumps([result.tokens_per_second, result.peak]))
        return
    rows: list[Row] = []
    for size in arguments.sizes:
        settings = [setting for setting in SETTINGS[size] if setting.case in arguments.cases]
        compared = [] if arguments.no_rival else [each.case for each in settings if each.case in RIVALS]
        theirs = {case: rival_in_a_process(size, case, arguments.rounds) for case in compared}
        rows += measure(size, settings, arguments.rounds, theirs)
        record("training_gpu", rows, f"1 x {torch.cuda.get_device_name()}")  # each time: the next size may fail


def measure(size: str, settings: Sequence[Setting], rounds: int, rivals: Mapping[str, Result]) -> list[Row]:
    """All of our rows of one size; `rivals` has the rivals' results by case."""
    base, rows = fused_base(SHAPES[size], torch.device("cuda")), []
    for setting in settings:
        result, theirs = ours(base, setting, rounds), rivals.get(setting.case)
        speed, peak = (f"{theirs.tokens_per_second:.0f}", f"{theirs.peak:.1f}") if theirs else ("", "")
        goal = f"{FULL_LEAD * theirs.tokens_per_second:.0f}" if theirs and setting.case == "full" else setting.speed
        name = f"training {size} {setting.case}"
        rows.append(Row(name, round(result.tokens_per_second), "tokens/s", speed, goal))
        memory = f"training {size} memory" if setting.case == "tenants8" else f"{name} memory"
        rows.append(Row(memory, round(result.peak, 1), "GB", peak, setting.peak))
    return rows


def ours(base: BaseModel, setting: Setting, rounds: int) -> Result:
    """Every model's forward_backward in one batch, and every model's step."""
    tenants, rank = (1, 0) if setting.case == "full" else (TENANTS, RANK)
    trainer = TorchTrainer(
        base,
        micro_batch_tokens=setting.rows,
        max_adapters=TENANTS,
        max_rank=RANK,
        gradient_checkpointing=setting.case == "checkpointed",
    )
    names = [f"tenant {number}" for number in range(tenants)]
    for seed, name in enumerate(names):
        trainer.add(name, ModelSpec(rank, seed, train_unembed=False))
    calls = [
        ModelCall(name, random_lesson(SEQUENCES // tenants, LENGTH, base.vocab_size, seed))
        for seed, name in enumerate(names)
    ]
    return timed(partial(seconds_to_train, trainer, calls), rounds)


def timed(step: Callable[[], object], rounds: int) -> Result:
    """After some rounds that do not count."""
    for _ in range(WARM_ROUNDS):
        step()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step) for _ in range(rounds)]
    return Result(SEQUENCES * LENGTH / median(times) * 1000, torch.cuda.max_memory_allocated() / 1e9)


def rival(size: str, case: str, rounds: int) -> Result:
    """torch.compile, with PEFT or all weights: the whole batch in one pass, the loss of transformers."""
    module: Any = random_module(SHAPES[size], torch.bfloat16, torch.device("cuda"))
    module.set_attn_implementation("sdpa")
    module.config.use_cache = False
    model = module.train().requires_grad_(True)
    if case != "full":
        module.enable_input_require_grads()
        config = LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", target_modules=LINEARS)
        model = get_peft_model(module, config, autocast_adapter_dtype=False).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    compiled: Any = torch.compile(model)
    tokens_NL = torch.randint(100, 150_000, (SEQUENCES, LENGTH), device="cuda")

    def step() -> None:
        compiled(input_ids=tokens_NL, labels=tokens_NL).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, rounds)


def rival_in_a_process(size: str, case: str, rounds: int) -> Result:
    asked = ["--rival", "--sizes", size, "--cases", case, "--rounds", str(rounds)]
    command = [sys.executable, "-m", "benchmarks.training_gpu", *asked]
    began = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    print(f"the rival at {size} {case} took {time.monotonic() - began:.0f} s")
    return Result(*json.loads(run.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
