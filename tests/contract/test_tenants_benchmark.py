"""The benchmark of many tenants runs; what it measures is no matter here."""

import pytest

from benchmarks import tenants
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]


def test_tenants_in_processes_of_their_own_train_on_one_server(server: LocalServer) -> None:
    measured = tenants.run(server, tenants.Load("tiny", tenants=2, steps=2, datums=1, length=8))
    assert len(measured.latencies) == 2 * 2
    assert 1 <= measured.sharing <= 2
    assert set(measured.busy) == {"api", "engine"}
