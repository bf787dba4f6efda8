"""What a power cut may leave: damaged recovery points, checkpoints and write-ahead logs, and how the engine goes on."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store import makers
from tests.unit.test_engine import SESSION, Bench, embedded, lesson
from tinsmith.engine import residency
from tinsmith.store import queue, records
from tinsmith.wire.packing import SampleCall


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def points(bench: Bench) -> list[Path]:
    """All recovery points, oldest first."""
    return sorted((bench.folder / "recovery").glob("*/*"))


def cut(path: Path, chance: random.Random) -> None:
    """Leaves a random part of a file, or nothing of it."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def cut_one_file(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    cut(chance.choice(sorted(folder.iterdir())), chance)


def prune(bench: Bench) -> None:
    """What house-keeping does with payloads that no recovery needs."""
    bench.database.write(makers.prune, 0.0)


def trained(bench: Bench, rounds: int) -> tuple[str, np.ndarray[Any, Any]]:
    """A model with `rounds` recovery points, some steps behind the last, and its log-probabilities."""
    model = bench.create("a")
    for number in range(rounds):
        lesson(bench, model, range(2 * number, 2 * number + 2))
        bench.run()
        bench.engine.write_points()
        prune(bench)
    lesson(bench, model, range(2 * rounds, 2 * rounds + 1))
    return model, bench.logprobs(model)


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_damaged_newest_recovery_point_is_passed_over(bench: Bench, rounds: int, seed: int) -> None:
    model, expected = trained(bench, rounds)
    assert len(points(bench)) == min(rounds, 2)
    cut_one_file(points(bench)[-1], seed)
    bench.new_engine()
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)


def test_a_model_on_a_base_that_has_other_weights_now_says_so_until_those_are_back(bench: Bench) -> None:
    model, expected = trained(bench, 1)
    base, _ = embedded()
    with pytest.MonkeyPatch.context() as others:
        others.setattr(base, "fingerprint", "0123456789abcdef")
        others.setattr(base, "_layouts", {})
        bench.new_engine()
        assert "trained on other weights of the base model" in bench.error(bench.train(model, [1, 2, 3]))
    bench.new_engine()
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)


def test_payloads_that_no_kept_point_needs_are_pruned(bench: Bench) -> None:
    model, _ = trained(bench, 4)
    record = bench.database.read(records.find_model, model)
    assert record is not None and record.recovery_seq is not None
    past = bench.database.read(queue.history, model, -1)
    kept = bench.database.read(queue.payloads, [entry.header.number for entry in past])
    assert {entry.header.seq for entry in past if entry.header.number in kept} == {
        entry.header.seq for entry in past if entry.header.seq > record.recovery_seq
    }


def test_a_model_whose_kept_points_are_all_damaged_says_so_and_others_go_on(bench: Bench) -> None:
    model, _ = trained(bench, 3)
    other = bench.create("other")
    names = [point.name for point in points(bench)]
    for point in points(bench):
        cut_one_file(point, 1)
    bench.new_engine()
    request = bench.train(model, [1, 2, 3])
    fine = bench.train(other, [1, 2, 3])
    bench.run()
    future = bench.find(request)
    assert future.state == "failed"
    assert all(name in (future.error or "") for name in names)
    assert bench.find(fine).state == "done"


def test_a_point_of_an_operation_that_the_log_does_not_have_is_not_used(bench: Bench) -> None:
    """As after a cut log, or a death between writing the point of a load and recording the load."""
    model, expected = trained(bench, 2)
    newest = points(bench)[-1]
    newest.rename(newest.with_name(f"{999:09d}-{newest.name[-8:]}"))
    bench.new_engine()
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)
    assert len(points(bench)) == 1


def save(bench: Bench, model: str, name: str) -> str:
    """The path of a checkpoint."""
    path = f"tinker://{model}/weights/{name}"
    request = {"name": name, "path": path, "ttl_seconds": None, "overwrite": False, "user_metadata": {}}
    bench.result(bench.submit(model, "save_weights", request))
    return path


class EngineDied(BaseException):
    """Stands for a process that ends: nothing in the engine may catch it."""


@pytest.mark.parametrize("create", [False, True])
def test_a_load_whose_engine_died_before_recording_it_runs_again(
    bench: Bench, create: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    request = {"path": save(bench, model, "one"), "optimizer": True, "create": create}
    expected = bench.logprobs(model)
    twin = bench.create("twin")
    bench.run()
    if create:  # the model's first request is the load
        twin = bench.record_model("born")
    load = bench.submit(twin, "load_weights", request)
    monkeypatch.setattr("tinsmith.engine.trials.LIMIT", 3)  # it is not the load's fault
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("tinsmith.store.ledger.Ledger.complete_with", dying)
            with pytest.raises(EngineDied):
                bench.run()
        bench.new_engine()
    bench.result(load)
    np.testing.assert_allclose(bench.logprobs(twin), expected, atol=1e-6)


def dying(*_: object, **__: object) -> None:
    raise EngineDied


def test_a_damaged_checkpoint_is_refused_by_name(bench: Bench) -> None:
    model = bench.create("a")
    path = save(bench, model, "precious")
    [folder] = (bench.folder / "checkpoints").glob("*/weights/precious-*")
    cut_one_file(folder, 3)
    before = bench.logprobs(model)
    load = bench.submit(model, "load_weights", {"path": path, "optimizer": True, "create": False})
    bench.run()
    assert "precious" in (bench.find(load).error or "")
    np.testing.assert_array_equal(bench.logprobs(model), before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_harmed_log_of_the_database_loses_no_request_that_was_accepted(
    bench: Bench, tmp_path: Path, seed: int, harm: str
) -> None:
    """Answers to submissions wait for the disk, results do not: what they say is computed again."""
    model = bench.create("a")
    lesson(bench, model, range(3))
    bench.run()
    bench.engine.write_points()
    lesson(bench, model, range(3, 5))
    accepted = bench.next_seq[model]
    bench.database.sync()
    log = Path(f"{bench.folder / 'db.sqlite'}-wal")
    on_disk = log.stat().st_size
    bench.run()
    bench.engine.write_points()
    bench.engine.write_points()
    expected = bench.logprobs(model)
    copy = tmp_path / "after"
    copy.mkdir()
    for path in (bench.folder / "db.sqlite", log):
        shutil.copy(path, copy)
    shutil.copytree(bench.folder / "recovery", copy / "recovery")
    with (copy / log.name).open("r+b") as file:
        place = random.Random(seed).randrange(on_disk, log.stat().st_size)
        if harm == "cut":
            file.truncate(place)
        else:
            file.seek(place)
            [byte] = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1]))
    later = Bench(copy, next_seq={model: accepted}, fresh=False)
    try:
        np.testing.assert_allclose(later.logprobs(model), expected, atol=2e-6)
    finally:
        later.close()


def flip(path: Path, chance: random.Random) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if path.name == "manifest.json":  # of its bytes, only checksums and names matter
        place = content.index(b'"sha256": "') + 11 + chance.randrange(64)
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def harms() -> list[Any]:
    """Every file of a written folder, cut off and with a bit flipped."""
    files = ("manifest.json", "adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json")
    return [pytest.param(harm, name, id=f"{harm.__name__} {name}") for harm in (cut, flip) for name in files]


@pytest.mark.parametrize(("harm", "name"), harms())
def test_whatever_file_of_a_recovery_point_is_harmed_the_model_comes_back_with_the_same_bits(
    bench: Bench, harm: Any, name: str
) -> None:
    """From the point before it: both ways, the log behind the older point is executed again."""
    model, _ = trained(bench, 3)
    older, newest = points(bench)
    shutil.copytree(newest, bench.folder / "whole")
    shutil.rmtree(newest)
    bench.new_engine()
    expected = bench.logprobs(model)
    shutil.copytree(bench.folder / "whole", newest)
    harm(newest / name, random.Random(name))
    bench.new_engine()
    np.testing.assert_array_equal(bench.logprobs(model), expected)
    assert older.exists()


@pytest.mark.parametrize(("harm", "name"), harms())
def test_whatever_file_of_a_checkpoint_is_harmed_it_is_refused_by_name_and_its_neighbour_is_not(
    bench: Bench, harm: Any, name: str
) -> None:
    model = bench.create("a")
    lesson(bench, model, range(1))
    good, bad = save(bench, model, "good"), save(bench, model, "bad")
    expected = bench.logprobs(model)
    [folder] = (bench.folder / "checkpoints").glob("*/weights/bad-*")
    harm(folder / name, random.Random(name))
    twin = bench.create("twin")
    refused, loaded = (
        bench.submit(twin, "load_weights", {"path": path, "optimizer": True, "create": False}) for path in (bad, good)
    )
    bench.run()
    assert folder.name in (bench.find(refused).error or "")
    assert bench.find(loaded).state == "done"
    np.testing.assert_array_equal(bench.logprobs(twin), expected)


def test_a_snapshot_harmed_on_disk_is_refused_by_name_and_its_model_and_other_snapshots_are_not(bench: Bench) -> None:
    model = bench.create("a")
    samplers = [bench.sampler(name, f"{SESSION}:sample:{name}", model) for name in ("whole", "harmed")]
    for sampler in samplers:
        request = {"name": None, "path": None, "sampler_id": sampler, "kind": "snapshot"}
        bench.result(bench.submit(model, "save_weights_for_sampler", request))
    lesson(bench, model, range(1))
    expected, drawn = bench.logprobs(model), bench.greedy(samplers[0])
    bench.engine.write_points()
    [folder] = (bench.folder / "snapshots").glob("*/*harmed")
    flip(folder / "adapter_model.safetensors", random.Random(1))
    bench.new_engine()
    call = SampleCall(np.array([40, 41, 42], np.int32), seed=1, max_tokens=8, temperature=0.0, stop_at_eos=False)
    asked = bench.submit(samplers[1], "sample", call.to_bytes())
    assert bench.greedy(samplers[0]) == drawn
    assert folder.name in (bench.find(asked).error or "")
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=1e-6)


def test_a_model_that_came_back_by_a_long_way_has_a_shorter_one_next_time(bench: Bench) -> None:
    """Engines that die often never live to write a recovery point when it is due."""
    model = bench.create("a")
    lesson(bench, model, range(residency.LONG_LOG // 2 + 1))
    expected = bench.logprobs(model)
    assert points(bench) == []
    bench.new_engine()
    np.testing.assert_array_equal(bench.logprobs(model), expected)
    assert len(points(bench)) == 1
    bench.new_engine()
    np.testing.assert_array_equal(bench.logprobs(model), expected)
    assert len(points(bench)) == 1
