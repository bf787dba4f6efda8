"""The registry of base models."""

from dataclasses import replace

import pytest
import sqlalchemy as sa

from tests.store import makers
from tinsmith.errors import NotFoundError, UserError
from tinsmith.store import records, registry
from tinsmith.store.database import Database

MODEL = registry.RegisteredModel("qwen", "/models/qwen", "/models/qwen", "auto", 0, False, "Qwen3", 600_000_000, 1.0)
OTHER = replace(MODEL, name="llama", base="meta/llama", folder="/cache/llama", max_context=4096, created_at=2.0)


def make_checkpoint(conn: sa.Connection, base: str) -> None:
    makers.make_model(conn, "m")
    checkpoint = records.Checkpoint(
        "tinker://m/weights/x", "m", "training", "x", "alice", base, base, {}, "/f", 1, False, {}, 1.0, None
    )
    records.create_checkpoint(conn, checkpoint)


def test_models_are_listed_in_the_order_in_which_they_were_added(database: Database) -> None:
    assert database.read(registry.list_registered) == []
    for model in (OTHER, MODEL):
        database.write(registry.register, model)
    assert database.read(registry.list_registered) == [MODEL, OTHER]


def test_a_name_and_a_model_are_registered_once(database: Database) -> None:
    database.write(registry.register, MODEL)
    for again in (MODEL, replace(OTHER, name="qwen"), replace(MODEL, name="other")):
        with pytest.raises(UserError, match="as 'qwen'"):
            database.write(registry.register, again)
    assert database.read(registry.list_registered) == [MODEL]


def test_a_model_that_checkpoints_depend_on_is_removed_only_by_force(database: Database) -> None:
    for model in (MODEL, OTHER):
        database.write(registry.register, model)
    database.write(make_checkpoint, MODEL.base)
    with pytest.raises(UserError, match=r"1 checkpoints.*--force"):
        database.write(registry.unregister, "qwen", force=False)
    assert database.write(registry.unregister, "llama", force=False) == OTHER
    assert database.write(registry.unregister, "qwen", force=True) == MODEL
    assert database.read(registry.list_registered) == []
    assert database.read(records.find_checkpoint, "tinker://m/weights/x") is not None
    with pytest.raises(NotFoundError, match="'qwen'"):
        database.write(registry.unregister, "qwen", force=False)
