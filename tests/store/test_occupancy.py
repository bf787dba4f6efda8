"""Two servers on one database: each base model is one server's, until that ends or loses it."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tinsmith.store.notifications import connect
from tinsmith.store.occupancy import Occupancy, OccupiedError


@contextmanager
def serving(url: str, *bases: str) -> Iterator[Occupancy]:
    occupancy = Occupancy(url, bases, wait_seconds=0.0)
    try:
        yield occupancy
    finally:
        occupancy.close()


def cut_off(url: str) -> None:
    """Ends the connections that hold locks in this database, as a restart of Postgres would."""
    with connect(url) as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )


def test_a_second_server_of_the_same_model_is_refused_with_what_to_do(database_url: str) -> None:
    with serving(database_url, "other", "tiny"):
        with pytest.raises(OccupiedError, match=r"'tiny'.*--database-url"), serving(database_url, "third", "tiny"):
            pass
        with serving(database_url, "third"):  # the refused one has let go of what it had
            pass


def test_servers_of_different_models_share_a_database(database_url: str) -> None:
    with serving(database_url, "tiny"), serving(database_url, "other"):
        pass


def test_a_model_is_free_when_its_server_has_ended(database_url: str) -> None:
    for _ in range(2):
        with serving(database_url, "tiny"):
            pass


def test_a_model_in_another_database_is_another_one(database_url: str, sqlite_url: str) -> None:
    with serving(database_url, "tiny"), serving(f"{sqlite_url}-2", "tiny"):
        pass


def test_who_loses_the_connection_takes_the_model_again(postgres_url: str) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        first.check(lost.append)
        cut_off(postgres_url)
        first.check(lost.append)
        assert lost == []
        with pytest.raises(OccupiedError), serving(postgres_url, "tiny"):
            pass


def test_who_loses_the_connection_before_postgres_does_takes_the_model_again(postgres_url: str) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        alive, first._locks._conn = first._locks._conn, None  # type: ignore[attr-defined]
        first._wait_seconds = 30.0  # for Postgres to end what it is told to
        first.check(lost.append)
        alive.close()
        assert lost == []
        with pytest.raises(OccupiedError), serving(postgres_url, "tiny"):
            pass


def test_who_finds_another_server_there_afterwards_is_told(postgres_url: str) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        cut_off(postgres_url)
        with serving(postgres_url, "tiny"):
            first.check(lost.append)
    assert len(lost) == 1


def test_a_database_that_is_away_is_waited_for(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[OccupiedError] = []
    with serving(postgres_url, "tiny") as first:
        cut_off(postgres_url)
        with monkeypatch.context() as away:
            away.setattr(psycopg, "connect", refuse)
            first.check(lost.append)
        assert lost == []
        first.check(lost.append)
        with pytest.raises(OccupiedError), serving(postgres_url, "tiny"):
            pass


def refuse(*_arguments: object, **_options: object) -> None:
    raise psycopg.OperationalError("connection refused")
