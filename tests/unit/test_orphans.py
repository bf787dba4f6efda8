"""Folders of checkpoints that no record refers to: collected when an engine starts, and nothing else is."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_engine import BASE, Bench, datums, lesson
from tests.unit.test_recovery import EngineDied, dying, save
from tinsmith import serve
from tinsmith.config import Settings
from tinsmith.engine.checkpoints import orphans, write_folder
from tinsmith.errors import UnavailableError
from tinsmith.manifests import verify_folder
from tinsmith.store import queue, records
from tinsmith.store.ledger import Ledger
from tinsmith.wire.jobs import Job


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def folders(bench: Bench) -> list[Path]:
    return sorted((bench.folder / "checkpoints").glob("*/*/*"))


def asking(bench: Bench, model: str) -> str:
    """A request to save `model` under a name."""
    path = f"tinker://{model}/weights/one"
    request = {"name": "one", "path": path, "ttl_seconds": None, "overwrite": False, "user_metadata": {}}
    return bench.submit(model, "save_weights", request)


def test_a_checkpoint_whose_engine_died_before_recording_it_is_collected_and_written_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    bench.run()
    request = asking(bench, model)
    with monkeypatch.context() as patch:
        patch.setattr("tinsmith.store.ledger.Ledger.complete_with", dying)
        patch.setattr("tinsmith.engine.operations.remove_folder", dying)  # a process that was killed tidies nothing
        with pytest.raises(EngineDied):
            bench.run()
    [orphan] = folders(bench)
    bench.new_engine()
    assert folders(bench) == []
    bench.result(request)
    [written] = folders(bench)
    assert written != orphan


def test_checkpoints_that_are_recorded_stay_wherever_the_data_folder_was_when_they_were(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = bench.create("a")
    save(bench, model, "one")
    kept = [path.name for path in folders(bench)]
    bench.new_engine()
    assert [path.name for path in folders(bench)] == kept
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(bench.folder, moved, dirs_exist_ok=True)
    later = Bench(moved, fresh=False)
    later.close()
    assert [path.name for path in folders(later)] == kept


def test_a_deleted_checkpoint_whose_files_outlived_its_record_is_collected(bench: Bench) -> None:
    model = bench.create("a")
    path, other = save(bench, model, "one"), save(bench, model, "two")
    bench.database.write(records.delete_checkpoint, path)
    bench.new_engine()
    assert [path.name.partition("-")[0] for path in folders(bench)] == ["two"]
    record = bench.database.read(records.find_checkpoint, other)
    assert record is not None
    verify_folder(Path(record.folder))


def test_a_starting_server_collects_what_a_killed_api_left_of_copies(bench: Bench) -> None:
    model = bench.create("a")
    save(bench, model, "one")
    [original] = folders(bench)
    segment = bench.folder / "checkpoints" / "copy" / "weights"
    shutil.copytree(original, segment / "one-0a1b", copy_function=os.link)
    (segment / ".two-0a1b.part").mkdir()
    serve._collect_leftovers(Settings(data_dir=bench.folder, database_url=f"sqlite:///{bench.folder}/db.sqlite"))
    assert list(segment.iterdir()) == []
    verify_folder(original)


def test_folders_that_another_database_may_know_or_somebody_is_writing_are_left_alone(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"12345")

    for name, request_id in (("ours-1", "m:1"), ("theirs-1", "x:1"), ("older-1", "")):
        write_folder(tmp_path / "m" / "weights" / name, fill, request_id)
    (tmp_path / "m" / "weights" / ".new-1.ab.part").mkdir()
    (tmp_path / "m" / "weights" / "by-hand").mkdir()
    found = orphans(tmp_path, [], lambda request_id: request_id.startswith("m:"))
    assert [path.name for path in found] == ["ours-1"]
    assert orphans(tmp_path, ["/elsewhere/m/weights/ours-1"], lambda request_id: True) == [
        tmp_path / "m" / "weights" / "theirs-1"
    ]


def test_a_checkpoint_that_may_have_been_recorded_keeps_its_files(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that goes away in the middle of a commit can leave it open whether that was made."""
    model = bench.create("a")
    bench.run()
    request = asking(bench, model)
    record = Ledger.complete_with

    def lose_the_answer(self: Ledger, *what: object, **records: object) -> None:
        record(self, *what, **records)  # type: ignore[arg-type]
        raise UnavailableError("the database is away; whether it was written is unknown")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "complete_with", lose_the_answer)
        bench.engine.turn()
    bench.result(request)
    checkpoint = bench.database.read(records.find_checkpoint, f"tinker://{model}/weights/one")
    assert checkpoint is not None
    verify_folder(Path(checkpoint.folder))


def test_a_request_that_cannot_be_read_fails_alone(bench: Bench) -> None:
    """It must not end the engine, which would meet it again at every start."""
    model, other = bench.create("a"), bench.create("b")
    bench.run()
    bench.database.write(queue.submit, Job(model, 1, "forward_backward", "me", BASE, b"no request", tokens=8))
    fine = bench.submit(other, "forward_backward", datums([1, 2, 3]).to_bytes())
    bench.run()
    bad = bench.find(f"{model}:1")
    assert (bad.state, bad.category) == ("failed", "server")
    assert bench.find(fine).state == "done"
