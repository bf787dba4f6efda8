"""Memory and time of training on one long sequence: the loss over a large vocabulary, and a whole step.

    python -m benchmarks.training_memory [--device cpu|cuda] [--rounds N] [--tokens N] [--vocabulary N] [--hidden N …]

The loss, from hidden states to their gradient, against the plain implementation (logits, log_softmax, gather,
backward), with and without a LoRA adapter on the head; then a whole step of a model with gradient checkpointing on and
off. Extra memory is the peak minus what was there before: on CUDA of torch's allocator, on the CPU of the resident set,
measured in a process of its own for each side. Times are taken in turns, in one process.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.qwen3 import Case, choose_device, interleaved, load, write_model
from benchmarks.recording import Row, record
from benchmarks.workloads import QWEN3_0_6B, SMALL, Sizes
from tinsmith.models.head import target_logprobs
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, Segment
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainCall

RANK = 16
MIB = 2**20
PLAIN, OURS = "plain", "ours"
Measure = Callable[["Problem"], int]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is measured, in a form that another process can be told."""

    device: str
    tokens: int
    vocabulary: int
    hidden: int
    side: str = OURS
    adapter: bool = False  # on the head
    whole: bool = False  # a step of the whole model instead of the loss alone
    checkpointing: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=0, help="0: as the device's default")
    parser.add_argument("--vocabulary", type=int, default=0, help="0: as the device's default")
    parser.add_argument("--hidden", type=int, nargs="+", help="hidden sizes of the loss's cases")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # what a process of its own measures; it prints the bytes
    arguments = parser.parse_args()
    if arguments.side:
        print(resident_extra(Problem(**json.loads(arguments.side))))
        return
    device, _, accelerator = choose_device(arguments.device)
    tokens, vocabulary, hiddens = (2048, 32_768, [512]) if device.type == "cpu" else (8192, 151_936, [1024, 2560])
    problem = Problem(device.type, arguments.tokens or tokens, arguments.vocabulary or vocabulary, 0)
    extra = cuda_extra if device.type == "cuda" else extra_of_a_process
    rows = measure(problem, arguments.hidden or hiddens, arguments.rounds, extra)
    record("training_memory", rows, accelerator)


def measure(problem: Problem, hiddens: list[int], rounds: int, extra: Measure) -> list[Row]:
    """All rows of these hidden sizes; the whole step is of the first. `extra` measures memory."""
    rows = []
    for hidden in hiddens:
        for adapter in (False, True):
            rows += list(_loss_rows(replace(problem, hidden=hidden, adapter=adapter), rounds, extra))
    return [*rows, *_step_rows(replace(problem, hidden=hiddens[0], whole=True), rounds, extra)]


def _loss_rows(problem: Problem, rounds: int, extra: Measure) -> Iterator[Row]:
    sides = {side: replace(problem, side=side) for side in (PLAIN, OURS)}
    memory, times = _measure_sides(sides, rounds, extra)
    name = f"loss, hidden {problem.hidden}, {'with an' if problem.adapter else 'no'} adapter on the head"
    for side in sides:
        yield Row(f"{name}: {side}, extra memory", round(memory[side] / MIB, 1), "MiB")
        yield Row(f"{name}: {side}, best time", round(min(times[side]), 2), "ms")
        yield Row(f"{name}: {side}, median time", round(median(times[side]), 2), "ms")
    share, slower = 100 * memory[OURS] / memory[PLAIN], min(times[OURS]) / min(times[PLAIN])
    yield Row(f"{name}: memory, ours / plain", round(share, 2), "%", goal="5")
    yield Row(f"{name}: time, ours / plain", round(slower, 3), "times", goal="1.1")


def _step_rows(problem: Problem, rounds: int, extra: Measure) -> Iterator[Row]:
    sides = {
        f"gradient checkpointing {'on' if chosen else 'off'}": replace(problem, checkpointing=chosen)
        for chosen in (False, True)
    }
    memory, times = _measure_sides(sides, rounds, extra)
    for name in sides:
        yield Row(f"whole step, {name}: extra memory", round(memory[name] / MIB, 1), "MiB")
        yield Row(f"whole step, {name}: best time", round(min(times[name]), 1), "ms")


def _measure_sides(
    sides: dict[str, Problem], rounds: int, extra: Measure
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """(extra bytes, milliseconds of every round), by side."""
    memory = {name: extra(problem) for name, problem in sides.items()}
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: prepared(problem, Path(folder) / str(i)) for i, (name, problem) in enumerate(sides.items())}
        return memory, interleaved(cases, rounds)


# Memory


def cuda_extra(problem: Problem) -> int:
    """Bytes by which torch's allocations peaked above what they were before the run."""
    with tempfile.TemporaryDirectory() as folder:
        case = prepared(problem, Path(folder))
        case.prepare()
        case.run()  # libraries take their workspaces
        case.prepare()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run()
        return torch.cuda.max_memory_allocated() - before


def extra_of_a_process(problem: Problem) -> int:
    """`resident_extra` of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.training_memory", "--side", json.dumps(asdict(problem))]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    root = Path(__file__).parent.parent
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=root)
    return int(run.stdout.split()[-1])


def resident_extra(problem: Problem) -> int:
    """Bytes by which this process's resident set peaked above what it was before the run."""
    with tempfile.TemporaryDirectory() as folder:
        warm = prepared(replace(problem, tokens=32), Path(folder) / "warm")
        warm.run()
        case = prepared(problem, Path(folder) / "full")
        case.prepare()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        case.run()
        return _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


# The work


def prepared(problem: Problem, folder: Path) -> Case:
    """What is to be run, with its model in memory; `folder` is for the model's files."""
    return _step(problem, folder) if problem.whole else _loss(problem, folder)


def _sizes(problem: Problem) -> Sizes:
    if problem.whole:
        full = SMALL if problem.device == "cpu" else QWEN3_0_6B
        return replace(full, hidden=problem.hidden, vocabulary=problem.vocabulary)
    return Sizes(problem.hidden, 1, problem.hidden, problem.vocabulary, heads=2, kv_heads=1, head_dim=64)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The end of a forward pass: hidden states and targets, the head's weight, an adapter of it or None."""

    model: BaseModel
    hidden_TD: Tensor
    targets_T: Tensor
    adapter: Adapter | None

    def clear(self) -> None:
        self.hidden_TD.grad = None


def loss_inputs(problem: Problem, folder: Path) -> LossInputs:
    """Random ones, of a model with random weights."""
    device, dtype, _ = choose_device(problem.device)
    model = load(write_model(folder, _sizes(problem), dtype), dtype, device)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(problem.tokens, problem.hidden, generator=generator).to(device, dtype).requires_grad_()
    targets_T = torch.randint(problem.vocabulary, (problem.tokens,), generator=generator).to(device)
    if not problem.adapter:
        return LossInputs(model, hidden_TD, targets_T, None)
    adapter = model.new_adapter(ModelSpec(rank=RANK, seed=0))
    adapter.require_grad()
    return LossInputs(model, hidden_TD, targets_T, adapter)


def _loss(problem: Problem, folder: Path) -> Case:
    inputs = loss_inputs(problem, folder)
    return Case(partial(plain_loss if problem.side == PLAIN else our_loss, inputs), inputs.clear)


def our_loss(inputs: LossInputs) -> None:
    """Forward and backward."""
    segments = [Segment(inputs.adapter, 0, len(inputs.targets_T))]
    target_logprobs(inputs.model, inputs.hidden_TD, segments, None, inputs.targets_T).sum().backward()


def plain_loss(inputs: LossInputs) -> None:
    """The same with all logits in memory."""
    logits_TV = inputs.hidden_TD @ inputs.model.module.get_output_embeddings().weight.t()
    pair = inputs.adapter.pair(inputs.model.head_linear) if inputs.adapter else None
    if inputs.adapter is not None and pair is not None:
        matrix_a, matrix_b = (matrix.detach().requires_grad_() for matrix in pair)
        logits_TV = logits_TV + inputs.adapter.scale * ((inputs.hidden_TD @ matrix_a.t()) @ matrix_b.t())
    logits_TV.float().log_softmax(-1).gather(1, inputs.targets_T[:, None]).sum().backward()


def _step(problem: Problem, folder: Path) -> Case:
    device, dtype, _ = choose_device(problem.device)
    model = load(write_model(folder, _sizes(problem), dtype), dtype, device)
    trainer = TorchTrainer(
        model,
        micro_batch_tokens=problem.tokens,
        max_adapters=1,
        max_rank=RANK,
        gradient_checkpointing=problem.checkpointing,
    )
    trainer.add("model", ModelSpec(rank=RANK, seed=0))
    calls = [ModelCall("model", call(problem.tokens, problem.vocabulary))]

    def run() -> None:
        trainer.forward_backward(calls)
        trainer.optim_step("model", AdamParams())

    return Case(run)


def call(tokens: int, vocabulary: int) -> TrainCall:
    """One sequence of random tokens, with a target at each."""
    tokens_T = np.random.default_rng(0).integers(0, vocabulary, tokens + 1).astype(np.int32)
    offsets, widths = np.array([0, tokens], np.int64), np.zeros(1, np.int32)
    weights = {"weights": np.ones(tokens, np.float32)}
    return TrainCall("cross_entropy", {}, False, tokens_T[:-1], offsets, tokens_T[1:], offsets, widths, weights)


if __name__ == "__main__":
    main()
