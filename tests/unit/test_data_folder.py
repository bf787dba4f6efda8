"""The layout of data folders: older ones are brought up to date, newer ones refused."""

import shutil
from pathlib import Path

import pytest

from tests.unit.test_engine import Bench, lesson
from tinsmith import data_folder, serve
from tinsmith.config import load_settings
from tinsmith.data_folder import LAYOUT, bring_up_to_date
from tinsmith.errors import ConfigError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_of_the_present_layout_and_stays_as_it_is(tmp_path: Path) -> None:
    bring_up_to_date(tmp_path, dict)
    make(tmp_path, "engines/tiny/recovery/a")
    before = files(tmp_path)
    assert before[data_folder.FILE] == f"{LAYOUT}\n"
    bring_up_to_date(tmp_path, dict)
    assert files(tmp_path) == before


def test_what_models_had_is_moved_to_their_engines_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, "recovery/a/1", "recovery/b/1", "recovery/unknown/1", "snapshots/a/s")
    make(tmp_path, "checkpoints/a/weights", "engine")
    engines = tmp_path / "engines"
    bring_up_to_date(tmp_path, lambda: {"a": engines / "tiny", "b": engines / "other"})
    assert files(tmp_path) == {
        "engines/tiny/recovery/a/1/file": "recovery/a/1",
        "engines/other/recovery/b/1/file": "recovery/b/1",
        "engines/tiny/snapshots/a/s/file": "snapshots/a/s",
        "recovery/unknown/1/file": "recovery/unknown/1",
        "checkpoints/a/weights/file": "checkpoints/a/weights",
        data_folder.FILE: f"{LAYOUT}\n",
    }
    assert not (tmp_path / "snapshots").exists()


def test_a_move_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "recovery/a", "recovery/b")
    belongs = dict.fromkeys("ab", tmp_path / "engines" / "tiny")
    real, moved = Path.rename, []

    def fail_at_the_second(self: Path, target: Path) -> Path:
        moved.append(self)
        if len(moved) == 2:
            raise OSError("interrupted")
        return real(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fail_at_the_second)
        with pytest.raises(OSError, match="interrupted"):
            bring_up_to_date(tmp_path, lambda: belongs)
    bring_up_to_date(tmp_path, lambda: belongs)
    moved_to = "engines/tiny/recovery/{}/file"
    assert {name: files(tmp_path)[moved_to.format(name)] for name in "ab"} == {"a": "recovery/a", "b": "recovery/b"}


def test_the_note_outlives_a_power_cut_with_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "recovery/a")
    done: list[str] = []
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        done.append(f"rename {self.name}")
        return real(self, to)

    monkeypatch.setattr(data_folder, "sync", lambda path: done.append(f"sync {path.relative_to(tmp_path)}"))
    monkeypatch.setattr(Path, "rename", rename)
    bring_up_to_date(tmp_path, lambda: {"a": tmp_path / "engines" / "tiny"})
    moved = ["rename a", "sync engines/tiny/recovery"]
    assert done == [*moved, "sync .layout.part", "rename .layout.part", "sync ."]


@pytest.mark.parametrize(("text", "reason"), [(f"{LAYOUT + 1}\n", "a newer one"), ("?", "damaged")])
def test_a_folder_of_a_newer_version_or_with_a_damaged_note_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / data_folder.FILE).write_text(text)
    with pytest.raises(ConfigError, match=reason):
        bring_up_to_date(tmp_path, dict)


def test_a_model_trained_in_the_first_layout_trains_on_in_the_present_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    model = bench.create("a")
    lesson(bench, model, range(6))
    bench.run()
    for _ in range(2):  # two points, so that the log before them is not kept
        lesson(bench, model, range(2))
        bench.run()
        bench.engine.write_points()
    before = bench.engine._ledger.find_model(model)
    assert before is not None and before.recovery_seq is not None
    bench.close()
    shutil.move(tmp_path / "db.sqlite", tmp_path / "tinsmith.db")
    settings = load_settings(None, {}, {"data_dir": tmp_path})
    bring_up_to_date(tmp_path, lambda: serve._folders_of_models(settings))
    folder = tmp_path / "engines" / "tiny"
    shutil.move(tmp_path / "tinsmith.db", folder / "db.sqlite")
    later = Bench(folder, fresh=False, next_seq=bench.next_seq)
    lesson(later, model, range(2))
    later.run()
    assert later.engine._residency.models == [model]
    later.close()
