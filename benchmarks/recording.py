"""Writes what a benchmark measured, with everything needed to judge or repeat it, to benchmarks/results/NAME.json.

Knows nothing of what is measured. `report.py` makes one page of all files.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from tinsmith.config import mask_password

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tinsmith", "torch", "transformers", "tinker", "sqlalchemy", "starlette", "uvicorn")


@dataclass(frozen=True, slots=True)
class Row:
    """One number. `rival` is the best known value of other servers, `goal` our aim; both as text, with bounds."""

    name: str
    value: float
    unit: str
    rival: str = ""
    goal: str = ""


def record(name: str, rows: Iterable[Row], accelerator: str = "") -> Path:
    """Writes results/`name`.json and prints the rows. `accelerator` names the GPUs that were used, if any."""
    rows = list(rows)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "hardware": hardware(accelerator),
        "pace": pace(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["python", "-m", f"benchmarks.{_program()}", *map(mask_password, sys.argv[1:])]),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    for row in rows:
        print(f"{row.name:<58} {row.value:>12,.6g} {row.unit}")
    return path


def hardware(accelerator: str = "") -> str:
    """Processor, usable cores, memory and accelerator, in words."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    words = f"{_processor()}, {cores} cores, {memory:.0f} GiB"
    return f"{words}; {accelerator}" if accelerator else words


def pace() -> float:
    """Seconds for ten million additions in Python: what tells a slow hour of a shared machine from a slow program."""
    began, total = time.perf_counter(), 0
    for number in range(10_000_000):
        total += number
    return round(time.perf_counter() - began, 2)


def versions() -> dict[str, str]:
    """Python's and the packages' versions, of those installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checked-out commit, with a plus when files differ from it."""
    hash_ = _git("rev-parse", "--short", "HEAD")
    return hash_ + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", "tinsmith") else "")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _program() -> str:
    return Path(sys.argv[0]).stem


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    return run.stdout.strip()
