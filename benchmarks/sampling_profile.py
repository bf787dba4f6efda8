"""Where a sampler's time goes: its steps by kind, and the kernels of one step of each kind.

Knows the sampler's public face only, so a step's kind is told from what it has prefilled and sampled.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tinsmith.protocols import Sampler, SnapshotCall

PROFILED = 3
"""Which step of each kind is profiled: the first ones are not typical."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: tokens of prompts, tokens sampled, and sequences that ran."""

    seconds: float
    prefilled: int
    sampled: int
    running: int

    @property
    def kind(self) -> str:
        if not self.prefilled:
            return "tokens only"
        return "prompts and tokens" if self.sampled else "prompts only"


def write_profile(sampler: Sampler, calls: Sequence[SnapshotCall], path: Path) -> None:
    """Answers the calls; writes a table of steps by kind and by how many ran, and tables of kernels."""
    for call in calls:
        sampler.submit(call)
    steps: list[Step] = []
    seen: dict[str, int] = defaultdict(int)
    tables: dict[str, str] = {}
    while sampler.load:
        expected = steps[-1].kind if steps else ""
        if expected not in tables and seen[expected] == PROFILED:
            step, table = _profiled(sampler)
            tables.setdefault(step.kind, table)
        else:
            step = _step(sampler)
            steps.append(step)
        seen[step.kind] += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*summary(steps), *(f"\n{kind}\n{table}" for kind, table in tables.items())]))


def _step(sampler: Sampler) -> Step:
    before, began = sampler.usage(), time.perf_counter()
    sampler.step()
    seconds, after = time.perf_counter() - began, sampler.usage()
    return Step(seconds, after.prefilled - before.prefilled, after.sampled - before.sampled, before.running)


def _profiled(sampler: Sampler) -> tuple[Step, str]:
    with torch.profiler.profile() as profile:
        step = _step(sampler)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return step, profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70)


def summary(steps: Sequence[Step]) -> list[str]:
    """A line for each kind of step and power of two of sequences that ran."""
    kinds: dict[tuple[str, int], list[Step]] = defaultdict(list)
    for step in steps:
        kinds[step.kind, step.running.bit_length()].append(step)
    lines = [
        f"{'steps':<20}{'running <':>10}{'count':>8}{'seconds':>10}{'prefilled':>12}{'sampled':>12}{'ms each':>10}"
    ]
    for (kind, bits), group in sorted(kinds.items()):
        seconds = sum(step.seconds for step in group)
        prefilled, sampled = sum(step.prefilled for step in group), sum(step.sampled for step in group)
        lines.append(
            f"{kind:<20}{2**bits:>10}{len(group):>8}{seconds:>10.2f}{prefilled:>12}{sampled:>12}"
            f"{1000 * seconds / len(group):>10.2f}"
        )
    return lines
