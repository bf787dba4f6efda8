"""A full disk: what cannot be written fails with that reason, nothing is half-written, and work goes on."""

import json
import logging
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import save_file

from tests.unit.test_engine import Bench, datums, lesson
from tinsmith.engine.checkpoints import DiskFullError, write_folder
from tinsmith.errors import UnavailableError
from tinsmith.store.ledger import Ledger
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall, SampleOutput


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No room for weights: the first bytes of a folder are written, then the kernel says what it says."""
    save = TorchTrainer.save

    def run_out(self: TorchTrainer, model_id: str, folder: Path, **what: Any) -> None:
        save(self, model_id, folder, **what)
        Path("/dev/full").write_bytes(b"more")

    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "save", run_out)
        yield


def saving(bench: Bench, model: str) -> str:
    path = f"tinker://{model}/weights/one"
    request = {"name": "one", "path": path, "ttl_seconds": None, "overwrite": False, "user_metadata": {}}
    return bench.submit(model, "save_weights", request)


def weight_files(bench: Bench) -> list[Path]:
    return [path for name in ("checkpoints", "recovery") for path in (bench.folder / name).rglob("*") if path.is_file()]


def test_a_checkpoint_without_room_fails_with_the_reason_and_leaves_nothing(
    bench: Bench, request: pytest.FixtureRequest
) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    expected = bench.logprobs(model)
    request.getfixturevalue("full_disk")
    save = saving(bench, model)
    bench.run()
    future = bench.find(save)
    assert (future.state, future.category) == ("failed", "server")
    assert "no space is left on the server's disk" in (future.error or "")
    assert weight_files(bench) == []
    np.testing.assert_array_equal(bench.logprobs(model), expected)


def test_a_recovery_point_without_room_is_tried_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    bench.run()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(TorchTrainer, "save", lambda *_, **__: Path("/dev/full").write_bytes(b"more"))
        bench.engine.write_points()
    assert "no space is left" in caplog.text
    assert weight_files(bench) == []
    lesson(bench, model, range(2, 3))
    expected = bench.logprobs(model)
    bench.engine.write_points()
    assert weight_files(bench) != []
    bench.new_engine()
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)


def test_a_load_that_cannot_be_made_safe_is_not_made(bench: Bench, request: pytest.FixtureRequest) -> None:
    model, other = bench.create("a"), bench.create("other")
    lesson(bench, other, range(2))
    bench.result(saving(bench, other))
    lesson(bench, model, range(3, 5))
    expected = bench.logprobs(model)
    request.getfixturevalue("full_disk")
    load = bench.submit(
        model, "load_weights", {"path": f"tinker://{other}/weights/one", "optimizer": True, "create": False}
    )
    bench.run()
    assert "no space is left" in (bench.find(load).error or "")
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)


def limit_database(bench: Bench, pages: int | None) -> None:
    """Lets the database file of the writer grow to so many pages; None: no more than it has."""

    def limit(conn: sa.Connection) -> None:
        count = conn.exec_driver_sql("PRAGMA page_count").scalar_one() if pages is None else pages
        conn.exec_driver_sql(f"PRAGMA max_page_count = {count}")

    bench.database.write(limit)


ROWS = [[(3 * row + place) % 90 + 4 for place in range(301)] for row in range(8)]


def taught(bench: Bench, name: str) -> str:
    """A model whose first request has a result too large for the pages that a database has left."""
    model = bench.create(name)
    bench.run()
    teach(bench, model)
    return model


def teach(bench: Bench, model: str) -> None:
    bench.submit(model, "forward_backward", datums(*ROWS).to_bytes())
    bench.step(model)


def test_a_full_database_stops_nothing_for_good(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    expected = bench.logprobs(taught(bench, "calm"))
    model = taught(bench, "a")
    limit_database(bench, None)
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            bench.engine.turn()
    assert "database or disk is full" in caplog.text
    limit_database(bench, 2**30)
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)
    assert {bench.find(f"{model}:{seq}").state for seq in range(3)} == {"done"}


@pytest.mark.parametrize("method", ["complete", "complete_with"], ids=["of a pass", "of a step"])
def test_a_result_that_could_not_be_written_is_computed_once_more_from_the_log(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = taught(bench, "calm")
    expected = json.loads(bench.result(f"{calm}:2"))["metrics"]
    hurt = bench.create("hurt")
    bench.run()
    write, failures = getattr(Ledger, method), [UnavailableError("the database is full")]

    def full_once(self: Ledger, *what: Any, **records: Any) -> None:
        if failures:
            raise failures.pop()
        write(self, *what, **records)

    monkeypatch.setattr(Ledger, method, full_once)
    teach(bench, hurt)
    bench.run()  # ends with the failure
    assert json.loads(bench.result(f"{hurt}:2"))["metrics"] == pytest.approx(expected, rel=1e-5)
    assert failures == []
    np.testing.assert_allclose(bench.logprobs(hurt), bench.logprobs(calm), atol=2e-6)


def test_samples_under_way_begin_again_when_the_database_was_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = bench.sampler("base", "base", None)
    expected = bench.greedy(sampler)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "complete", lambda *_: raise_full())
        call = SampleCall(np.array([40, 41, 42], np.int32), seed=1, max_tokens=8, temperature=0.0, stop_at_eos=False)
        request = bench.submit(sampler, "sample", call.to_bytes())
        for _ in range(3):
            bench.engine.turn()
    assert SampleOutput.from_bytes(bench.result(request)).tokens_S.tolist() == expected


def raise_full() -> None:
    raise UnavailableError("the database is full")


def test_safetensors_that_meet_a_limit_are_told_from_other_errors(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(DiskFullError, match="weights could not be written"):
            write_folder(
                tmp_path / "weights", lambda into: save_file({"a": torch.zeros(2**20)}, into / "a.safetensors")
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
