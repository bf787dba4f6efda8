"""The examples for people who come from TRL: both halves of each pair run, and of supervised learning they agree."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer

EXAMPLES = Path(__file__).parents[2] / "examples" / "migration"
LOSSES_OF_TRL = [10.5413, 7.5717, 10.9976, 6.7230, 4.9327, 3.9093, 3.2108, 2.8928, 2.5660, 2.4366]
"""What `trl_sft.py --rank 0` printed with TRL 1.16."""

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]


def run(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(name: str, output: str) -> list[float]:
    return [float(text) for text in re.findall(rf"{name} ([\d.]+)", output)]


def test_a_supervised_run_has_the_losses_that_it_has_in_trl(server: LocalServer) -> None:
    output = run("tinker_sft.py", "--model", "tiny", "--rank", "0", **server.client_environment())
    np.testing.assert_allclose(numbers("loss", output), LOSSES_OF_TRL, rtol=1e-3)


def test_a_supervised_run_with_an_adapter_begins_alike_and_learns(server: LocalServer) -> None:
    losses = numbers("loss", run("tinker_sft.py", "--model", "tiny", **server.client_environment()))
    assert losses[0] == LOSSES_OF_TRL[0]
    assert losses[-1] < 0.6 * losses[0]


def test_a_reinforcement_run_reaches_its_end(server: LocalServer) -> None:
    output = run("tinker_grpo.py", "--model", "tiny", "--steps", "2", **server.client_environment())
    assert len(numbers("reward", output)) == 2
    assert "/sampler_weights/sums" in output


@needs_trl
def test_trl_has_those_losses_still() -> None:
    output = run("trl_sft.py", "--model", str(tiny_folder()), "--rank", "0")
    np.testing.assert_allclose(numbers("loss", output), LOSSES_OF_TRL, rtol=1e-3)


@needs_trl
def test_the_reinforcement_example_of_trl_runs() -> None:
    output = run("trl_grpo.py", "--model", str(tiny_folder()), "--steps", "1", "--questions", "2", "--group-size", "4")
    assert len(numbers("reward", output)) == 1
