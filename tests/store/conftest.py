"""A migrated database of each kind, and jobs to put into it."""

from collections.abc import Iterator

import pytest

from tinsmith.store.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()
