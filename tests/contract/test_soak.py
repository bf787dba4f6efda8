"""Loops of several tenants while processes are killed again and again: nothing is lost, and no bit moves."""

from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = [pytest.mark.xdist_group("soak"), pytest.mark.timeout(600)]


@pytest.mark.usefixtures("client_environment")
def test_ten_kills_leave_no_trace_in_answers_weights_or_optimizer_states(tmp_path: Path) -> None:
    roles = ("engine", "api", "api", "tree", "api", "server", "api")  # few of those that cost a start of the engine
    run = soak.soak(tmp_path, kills=10, seed=7, ranks=(4, 8), roles=roles, deterministic=True, minutes=8)
    assert run.problems == []
    assert {kill.role for kill in run.kills} == {"engine", "api", "tree", "server"}
    assert len(run.kills) >= 10
