"""Folders of weights: whole or not at all, and never altered unnoticed."""

import os
from pathlib import Path

import pytest

from tinsmith.engine.checkpoints import remove_folder, sweep, write_folder
from tinsmith.manifests import MANIFEST, DamagedCheckpointError, verify_folder


def fill(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"12345")
    (folder / "config.json").write_text("{}")


def test_a_written_folder_verifies_and_knows_its_size(tmp_path: Path) -> None:
    size = write_folder(tmp_path / "a" / "b", fill)
    assert size == sum(path.stat().st_size for path in (tmp_path / "a" / "b").iterdir())
    assert verify_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b" / "weights.bin").read_bytes() == b"12345"


def test_everything_on_the_way_to_a_written_folder_is_on_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and the names of files: a folder's own name is in the folder above it."""
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    (tmp_path / "root").mkdir()
    write_folder(tmp_path / "root" / "model" / "weights" / "one", fill)
    draft = next(name for name in synced if name.endswith(".part"))
    assert synced[:2] == ["root", "model"]
    assert {*synced[2:-2]} == {"weights.bin", "config.json", MANIFEST}
    assert synced[-2:] == [draft, "weights"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def break_off(folder: Path) -> None:
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "x", break_off)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "empty manifest", "odd manifest"])
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "step-7"
    write_folder(folder, fill)
    match damage:
        case "truncate":
            (folder / "weights.bin").write_bytes(b"123")
        case "flip":
            (folder / "weights.bin").write_bytes(b"12346")
        case "remove":
            (folder / "weights.bin").unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "empty manifest":
            (folder / MANIFEST).write_text("")
        case "odd manifest":
            (folder / MANIFEST).write_text('{"files": {"weights.bin": 3}}')
    with pytest.raises(DamagedCheckpointError, match="step-7"):
        verify_folder(folder)


def test_a_removed_folder_is_gone_and_removing_it_again_is_no_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", fill)
    remove_folder(tmp_path / "x")
    remove_folder(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_sweeping_removes_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "model" / "good", fill)
    for leftover in (".good.ab12.part", ".old.cd34.gone"):
        (tmp_path / "model" / leftover).mkdir()
        fill(tmp_path / "model" / leftover)
    sweep(tmp_path)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["good"]
