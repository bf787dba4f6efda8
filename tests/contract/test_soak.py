"""Loops of several tenants while processes are killed again and again: nothing is lost, and no bit moves."""

from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = [pytest.mark.xdist_group("soak"), pytest.mark.timeout(600)]


@pytest.mark.usefixtures("client_environment")
def test_ten_kills_leave_no_trace_in_answers_weights_or_optimizer_states(tmp_path: Path) -> None:
    roles = ("engine", *["api"] * 3, "tree", *["api"] * 2, "engine", *["api"] * 2)  # starts of the engine cost most
    run = soak.soak(tmp_path, kills=10, seed=1, ranks=(4, 8), roles=roles, deterministic=True, minutes=3)
    assert run.problems == []
    assert {kill.role for kill in run.kills} == {"engine", "api", "tree"}
    assert len(run.kills) >= 10
