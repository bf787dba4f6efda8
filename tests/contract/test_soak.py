"""Loops of several tenants while processes are killed again and again: nothing is lost, and no bit moves."""

from pathlib import Path

import pytest

from benchmarks import soak
from tests.throwaway_postgres import throwaway_postgres

pytestmark = [pytest.mark.xdist_group("soak"), pytest.mark.timeout(600)]


@pytest.mark.usefixtures("client_environment")
def test_ten_kills_leave_no_trace_in_answers_weights_or_optimizer_states(tmp_path: Path) -> None:
    roles = ("engine", *["api"] * 3, "tree", *["api"] * 2, "engine", *["api"] * 2)  # starts of the engine cost most
    run = soak.soak(tmp_path, kills=10, seed=1, ranks=(4, 8), roles=roles, deterministic=True)
    assert run.problems == []
    assert {blow.role for blow in run.blows} == {"engine", "api", "tree"}
    assert len(run.blows) >= 10


@pytest.mark.usefixtures("client_environment")
def test_restarts_of_the_database_under_load_are_a_pause_and_nothing_else(tmp_path: Path) -> None:
    with throwaway_postgres() as postgres:
        if postgres is None:
            pytest.skip("NOT TESTED ON POSTGRES: initdb and pg_ctl are not installed")
        with postgres.database() as url:
            roles = ("database", "database", "engine", "database")
            restart = postgres.restart
            run = soak.soak(
                tmp_path, kills=5, seed=3, ranks=(4, 8), roles=roles, database_url=url, restart_database=restart
            )
    assert run.problems == []
    assert [blow.role for blow in run.blows].count("database") >= 3
