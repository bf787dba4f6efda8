"""What every tier shares: databases to test on, and how hypothesis chooses its examples.

One Postgres server per test run, one database per test. Examples are the same in every run, so that a change fails or
passes for its own sake; `make fuzz` takes new ones.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.throwaway_postgres import ThrowawayPostgres, find_binaries, new_folder

_FOLDER = pytest.StashKey[Path]()

# How long an example takes is the machine's affair.
settings.register_profile("fresh", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("repeated", settings.get_profile("fresh"), derandomize=True, database=None)
settings.load_profile("repeated")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test draws the same numbers, whatever was drawn before it in this process."""
    random.seed(0)
    for name, seed in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if name in sys.modules:  # it takes seconds to import
            getattr(sys.modules[name], seed)(0)


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {}).get("postgres_folder")
    if find_binaries() is not None:
        config.stash[_FOLDER] = Path(given) if given else new_folder()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Parallel workers share the folder, and so the server, of the process that started them."""
    if _FOLDER in node.config.stash:
        node.workerinput["postgres_folder"] = str(node.config.stash[_FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    binaries = find_binaries()
    if not hasattr(config, "workerinput") and _FOLDER in config.stash and binaries is not None:
        ThrowawayPostgres(config.stash[_FOLDER], binaries).stop()


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> ThrowawayPostgres:
    """A running Postgres server, shared by all tests."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("NOT TESTED ON POSTGRES: initdb and pg_ctl are not installed")
    server = ThrowawayPostgres(pytestconfig.stash[_FOLDER], binaries)
    server.start()
    return server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite database that does not exist yet."""
    return f"sqlite:///{tmp_path}/tinsmith.db"


@pytest.fixture
def postgres_url(postgres: ThrowawayPostgres) -> Iterator[str]:
    """An empty Postgres database."""
    with postgres.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
