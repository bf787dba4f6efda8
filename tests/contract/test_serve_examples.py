"""What the documentation tells a newcomer to run, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tinsmith.demo import walkthrough
from tinsmith.demo.local_server import LocalServer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)
ON_THE_SERVER = pytest.mark.xdist_group("server")


def run(server: LocalServer, *arguments: str) -> str:
    """The output of a Python script that finds the server by its environment variables only."""
    environment = dict(os.environ) | server.client_environment() | {"PYTHONWARNINGS": "error"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@ON_THE_SERVER
def test_the_quick_start_teaches_what_it_says(server: LocalServer) -> None:
    (code,) = re.findall(r"```python\n(import tinker.*?)```", (ROOT / "docs/quickstart.md").read_text(), re.DOTALL)
    output = run(server, "-c", code)
    assert "Kettles." in output
    assert "/weights/kettles" in output


@ON_THE_SERVER
def test_the_first_loop_of_the_readme_learns(server: LocalServer) -> None:
    (code,) = re.findall(r"```python\n(import tinker.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    losses = [float(line) for line in run(server, "-c", code).split()]
    assert len(losses) == 20
    assert losses[-1] < 0.3 * losses[0]


@ON_THE_SERVER
def test_the_supervised_example_learns(server: LocalServer) -> None:
    output = run(server, str(ROOT / "examples/sl_loop.py"), "--steps", "15")
    losses = [float(text) for text in re.findall(r"loss per token ([\d.]+)", output)]
    assert len(losses) == 15
    assert losses[-1] < 0.3 * losses[0]
    assert "/sampler_weights/final" in output


@ON_THE_SERVER
def test_the_reinforcement_example_runs(server: LocalServer) -> None:
    output = run(server, str(ROOT / "examples/rl_loop.py"), "--steps", "2", "--batch-size", "4", "--group-size", "4")
    rewards = [float(text) for text in re.findall(r"reward ([\d.]+)", output)]
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)


def test_the_walk_through_walks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walkthrough, "SUM_STEPS", 2)
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.setenv(name, "")
    with (tmp_path / "output").open("w+") as file:
        walkthrough.walk(tmp_path, Console(file=file, width=200))
        file.seek(0)
        output = file.read()
    assert "I am Tin, a very small model." in output
    assert "/sampler_weights/sums" in output
    assert "right answers" in output
