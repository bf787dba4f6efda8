"""The latest checkpoints stay, and whatever is used; the others of the model go."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from tests.store.makers import finish, job, model, session
from tinsmith.errors import UserError
from tinsmith.store import queue, records, retention
from tinsmith.store.database import Database
from tinsmith.wire.jobs import Outcome


@pytest.fixture
def conn(database: Database) -> Iterator[sa.Connection]:
    with database._writing.connect() as conn, conn.begin():
        records.create_session(conn, session())
        yield conn


def path(number: int, model_id: str = "m") -> str:
    return f"tinker://{model_id}/weights/{number}"


def save(conn: sa.Connection, numbers: range, model_id: str = "m", kind: str = "training", **fields: Any) -> None:
    """A model with checkpoints that were made in this order."""
    if records.find_model(conn, model_id) is None:
        records.create_model(conn, model(model_id))
    for number in numbers:
        record = records.Checkpoint(
            path(number, model_id), model_id, kind, str(number), "alice", "tiny", "Tiny", {}, f"/{number}", 1, False,
            {}, float(number), None,
        )  # fmt: skip
        records.create_checkpoint(conn, replace(record, **fields))


def dropped(conn: sa.Connection, keep: int = 2, kind: str = "training") -> list[str]:
    return [checkpoint.name for checkpoint in retention.drop_superseded(conn, "m", kind, keep)]


def test_the_latest_of_a_kind_stay_and_other_kinds_and_models_are_left_alone(conn: sa.Connection) -> None:
    save(conn, range(5))
    save(conn, range(5, 8), kind="sampler")
    save(conn, range(5), "other")
    assert dropped(conn) == ["2", "1", "0"]
    assert dropped(conn) == []
    assert [records.find_checkpoint(conn, path(number)) is None for number in range(8)] == [True] * 3 + [False] * 5
    assert all(records.find_checkpoint(conn, path(number, "other")) for number in range(5))


def test_a_models_own_wish_comes_first_and_nothing_is_dropped_unasked(conn: sa.Connection) -> None:
    save(conn, range(4))
    assert dropped(conn, keep=0) == []
    records.update_model(conn, "m", user_metadata={"keep_checkpoints": "3"})
    assert dropped(conn, keep=1) == ["0"]
    records.update_model(conn, "m", user_metadata={"keep_checkpoints": 0})
    assert dropped(conn, keep=1) == []


def test_what_is_published_or_has_a_lifetime_stays_and_lifetimes_do_not_count(conn: sa.Connection) -> None:
    save(conn, range(1), public=True)
    save(conn, range(1, 2), expires_at=2.0**40)
    save(conn, range(2, 5))
    save(conn, range(5, 6), expires_at=2.0**40)
    assert dropped(conn) == ["2"]


def test_what_an_open_sampler_samples_from_stays_until_its_session_ends(conn: sa.Connection) -> None:
    save(conn, range(4))
    records.create_sampler(conn, records.SamplerRecord("s:sample:0", "s", "alice", "tiny", "T", path(0), "m", 1.0))
    assert dropped(conn) == ["1"]
    records.finish_session(conn, "s", "alice", "success")
    assert dropped(conn) == ["0"]


def test_what_an_accepted_request_names_stays_until_it_has_ended(conn: sa.Connection) -> None:
    save(conn, range(4))
    body = json.dumps({"path": path(1), "optimizer": True}).encode()
    queue.submit(conn, job("new", 0, kind="load_weights", body=body))
    finish(conn, "done", 0)
    assert dropped(conn) == ["0"]
    [header] = queue.claim(conn, "tiny", "engine", 1)
    assert dropped(conn) == []
    queue.complete(conn, [Outcome(header.number, b"{}")])
    assert dropped(conn) == ["1"]


@pytest.mark.parametrize("value", ["three", "-1", 1.5, True, None, "1" * 10])
def test_a_wish_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="keep_checkpoints"):
        retention.wanted({"keep_checkpoints": value}, 0)
