"""What the API says of several engines together."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.api_fixtures import CAPABILITIES
from tinsmith.api.catalog import Catalog
from tinsmith.config import Settings
from tinsmith.errors import UnavailableError, UserError
from tinsmith.served import Served
from tinsmith.store import records
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell

SERVED = (Served("one", "/models/one"), Served("two", "two"))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(Settings(data_dir=tmp_path).effective_database_url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def catalog(database: Database, tmp_path: Path) -> Catalog:
    """Not started: a test looks itself."""
    aliases = {"uno": "one", "*": "two"}
    return Catalog(SERVED, aliases, database, Doorbell(Settings(data_dir=tmp_path).effective_database_url))


def announce(catalog: Catalog, base: str, state: str, *, knows: bool = True) -> tuple[str, str]:
    """The server's state after an engine has told its own."""
    known = CAPABILITIES.to_dict() if knows else None
    engine = records.EngineRecord(base, "e", 1, state, f"of {base}", known, time.time())
    catalog._database.write(records.put_engine, engine)
    catalog._look()
    return catalog.state


def test_a_server_is_ready_when_all_engines_have_been_and_then_as_long_as_one_is(catalog: Catalog) -> None:
    assert catalog.state[0] == "starting"
    assert announce(catalog, "two", "ready")[0] == "starting"
    assert announce(catalog, "/models/one", "loading", knows=False) == ("loading", "of /models/one")
    assert announce(catalog, "/models/one", "ready")[0] == "ready"
    assert announce(catalog, "/models/one", "loading")[0] == "ready"
    assert announce(catalog, "two", "loading")[0] == "loading"


def test_contexts_are_told_once_all_are_known_but_for_models_whose_engine_failed_first(catalog: Catalog) -> None:
    announce(catalog, "two", "ready")
    with pytest.raises(UnavailableError, match="engine of one is not ready"):
        catalog.contexts()
    announce(catalog, "/models/one", "failed", knows=False)
    assert catalog.contexts() == {"two": CAPABILITIES.max_context}
    announce(catalog, "two", "failed", knows=False)
    assert catalog.contexts() == {"two": CAPABILITIES.max_context}
    announce(catalog, "/models/one", "ready")
    assert set(catalog.contexts()) == {"/models/one", "two"}


def test_names_are_found_exactly_then_before_a_colon_then_by_the_star(catalog: Catalog) -> None:
    wanted = {"one": "one", "/models/one": "one", "uno": "one", "uno:peft:8": "one", "two": "two", "anything": "two"}
    assert {name: catalog.require(name).name for name in wanted} == wanted
    assert catalog.names("/models/one") == ["one", "/models/one", "uno"]
    assert catalog.names("two") == ["two"]


def test_without_a_star_an_unknown_name_is_refused_with_the_known_ones(database: Database, tmp_path: Path) -> None:
    catalog = Catalog(SERVED, {}, database, Doorbell(Settings(data_dir=tmp_path).effective_database_url))
    with pytest.raises(UserError, match=r"'three'; it serves one, two, /models/one \(.*--alias three=one"):
        catalog.require("three")
