"""Runs recipes of the cookbook in one folder, one after the other, against one server.

Knows how a recipe is started, bounded and read (`recipe_runner` does the running); not which recipes there are.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.contract import recipe_runner

Metrics = list[dict[str, float]]


@dataclass
class Cookbook:
    """Runs recipes in `folder`. An order is bounded by `seconds`."""

    runner: subprocess.Popen[str]
    folder: Path
    seconds: float = 280.0

    def run(self, recipe: str, log_path: str, *arguments: str) -> Metrics:
        """The metrics that the recipe logged below `log_path`, one entry a step; it must end well."""
        code = self.start(recipe, log_path, [f"log_path={self.folder / log_path}", *arguments])
        assert code == 0, f"{recipe} ended with code {code}; its output ends:\n{self.output(log_path)[-4000:]}"
        return self.metrics(log_path)

    def start(self, recipe: str, name: str, arguments: Sequence[str], said: str = "", path: str = "") -> int:
        """A recipe's exit code, -9 if it took too long. It reads `said` as its input and imports from `path`, too."""
        spoken = self.folder / f"{name}.in"
        spoken.write_text(said)
        order = {
            "module": recipe if recipe.startswith("tests.") else f"tinker_cookbook.recipes.{recipe}",
            "arguments": list(arguments),
            "folder": str(self.folder),
            "input": str(spoken),
            "log": str(self.folder / f"{name}.log"),
            "path": path,
            "seconds": self.seconds,
        }
        assert self.runner.stdin is not None
        assert self.runner.stdout is not None
        print(json.dumps(order), file=self.runner.stdin, flush=True)
        return int(self.runner.stdout.readline())

    def output(self, name: str) -> str:
        """What a recipe printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def metrics(self, log_path: str) -> Metrics:
        """What a recipe logged below `log_path`; nothing if it logs nothing."""
        file = self.folder / log_path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def opened_cookbook(folder: Path, client_environment: dict[str, str], seconds: float = 280.0) -> Iterator[Cookbook]:
    """A cookbook whose recipes find a server by `client_environment`."""
    environment = os.environ | client_environment
    environment |= {
        "HF_HOME": str(folder / "hub"),
        "TINKER_COOKBOOK_RUNS_DIR": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, recipe_runner.__file__]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        yield Cookbook(runner, folder, seconds)
        assert runner.stdin is not None
        runner.stdin.close()
