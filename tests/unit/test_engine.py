"""The engine with the real trainer, sampler and store, on the embedded model: order, errors, paging, recovery."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from transformers import AutoTokenizer

from tinsmith.demo import tiny_folder
from tinsmith.engine.loop import Engine
from tinsmith.engine.sampling_turns import SamplingTurns
from tinsmith.engine.trials import Trials
from tinsmith.models.loading import BaseModel, load_base
from tinsmith.protocols import ModelSpec
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.store import keys, queue, records, tables
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.store.ledger import Ledger, NewCheckpoint
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.jobs import Future, Job
from tinsmith.wire.packing import SampleCall, SampleOutput, TrainCall, TrainOutput

BASE = "tiny"
SESSION = "s"


@cache
def embedded() -> tuple[BaseModel, Any]:
    """The embedded model, loaded once: trainers and samplers never change it."""
    folder = tiny_folder()
    model = load_base(folder, dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda progress: None)
    return model, AutoTokenizer.from_pretrained(folder)


def datums(*rows: list[int], weight: float = 1.0, forward_only: bool = False) -> TrainCall:
    """Cross-entropy of each row's tokens, every one predicting the next."""
    lengths = [len(row) - 1 for row in rows]
    tokens = np.array([token for row in rows for token in row[:-1]], np.int32)
    targets = np.array([token for row in rows for token in row[1:]], np.int32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    weights = np.full(len(tokens), weight, np.float32)
    widths = np.zeros(len(rows), np.int32)
    return TrainCall("cross_entropy", {}, forward_only, tokens, offsets, targets, offsets, widths, {"weights": weights})


@dataclass
class Bench:
    """One server's store, and engines on it that can be started and abandoned at will."""

    folder: Path
    max_models: int = 8
    next_seq: dict[str, int] = field(default_factory=dict)
    fresh: bool = True  # or on what an earlier server left in the folder
    notes: list[Trials] = field(default_factory=list)  # of all engines, whose files a killed process would close

    def __post_init__(self) -> None:
        self.database = Database(f"sqlite:///{self.folder / 'db.sqlite'}")
        self.database.migrate()
        self.doorbell = Doorbell(f"sqlite:///{self.folder / 'db.sqlite'}")
        if self.fresh:
            now = time.time()
            session = records.Session(SESSION, "me", "open", [], {}, "0", None, None, None, now, now)
            self.database.write(records.create_session, session)
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        """A fresh process's engine: nothing in memory. The one before it is abandoned, as if killed."""
        model, tokenizer = embedded()
        self.engine = Engine(
            Ledger(self.database, self.doorbell, BASE),
            TorchTrainer(model, micro_batch_tokens=512, max_adapters=16, max_rank=64),
            TorchSampler(model, tokenizer, kv_tokens=4096, max_running=16),
            NewCheckpoint,
            data_dir=self.folder,
            max_models=self.max_models,
            future_seconds=3600.0,
        )
        self.notes.append(self.engine._trials)
        self.engine.take_over()
        return self.engine

    def close(self) -> None:
        for notes in self.notes:
            notes.close()
        self.doorbell.close()
        self.database.close()

    def run(self) -> None:
        while self.engine.turn():
            pass

    def submit(self, subject: str, kind: str, body: bytes | dict[str, Any], seq: int | None = None) -> str:
        if seq is None:
            seq = self.next_seq.get(subject, 0)
            self.next_seq[subject] = seq + 1
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.database.write(queue.submit, Job(subject, seq, kind, "me", BASE, raw, tokens=8))

    def find(self, request_id: str) -> Future:
        future = self.database.read(queue.find, request_id)
        assert future is not None
        return future

    def result(self, request_id: str) -> bytes:
        self.run()
        future = self.find(request_id)
        assert future.state == "done", future
        assert future.body is not None
        return future.body

    def error(self, request_id: str) -> str:
        self.run()
        future = self.find(request_id)
        assert future.state == "failed", future
        assert future.category == "user"
        return future.error or ""

    def create(self, name: str, rank: int = 4) -> str:
        model_id = self.record_model(name, rank)
        self.submit(model_id, "create_model", {})
        return model_id

    def record_model(self, name: str, rank: int = 4) -> str:
        """A model that its first job, whatever that is, will create."""
        model_id = f"{SESSION}:train:{name}"
        spec = {"rank": rank, "seed": 7, "train_attn": True, "train_mlp": True, "train_unembed": True}
        now = time.time()
        model = records.Model(model_id, SESSION, "me", BASE, BASE, spec, {}, "creating", None, None, now, now)
        self.database.write(records.create_model, model)
        return model_id

    def sampler(self, name: str, snapshot: str, model_id: str | None) -> str:
        sampler_id = f"{SESSION}:sample:{name}"
        record = records.SamplerRecord(sampler_id, SESSION, "me", BASE, BASE, snapshot, model_id, time.time())
        self.database.write(records.create_sampler, record)
        return sampler_id

    def train(self, model_id: str, rows: list[int]) -> str:
        return self.submit(model_id, "forward_backward", datums(rows).to_bytes())

    def step(self, model_id: str) -> str:
        return self.submit(model_id, "optim_step", {"learning_rate": 0.01, "weight_decay": 0.1, "grad_clip_norm": 1.0})

    def logprobs(self, model_id: str) -> np.ndarray[Any, Any]:
        call = datums([5, 6, 7, 8, 9, 10], forward_only=True)
        return TrainOutput.from_bytes(self.result(self.submit(model_id, "forward", call.to_bytes()))).logprobs_M

    def greedy(self, sampler_id: str) -> list[int]:
        call = SampleCall(np.array([40, 41, 42], np.int32), seed=1, max_tokens=8, temperature=0.0, stop_at_eos=False)
        return SampleOutput.from_bytes(
            self.result(self.submit(sampler_id, "sample", call.to_bytes()))
        ).tokens_S.tolist()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@contextmanager
def one_pass_a_turn() -> Iterator[None]:
    """Sampling's turns are one pass long, and not as long as training before them: what a test counts is no time."""
    take_turn = SamplingTurns.take_turn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingTurns, "take_turn", lambda turns, _since: take_turn(turns, math.inf))
        yield


def lesson(bench: Bench, model_id: str, steps: range) -> None:
    for step in steps:
        bench.train(model_id, [20 + step, 21, 22, 23 + step, 24])
        bench.step(model_id)


def test_operations_run_in_order_of_seq_whatever_their_arrival(bench: Bench) -> None:
    model = bench.create("a")
    late = bench.submit(model, "optim_step", {"learning_rate": 0.1}, seq=3)
    second = bench.submit(model, "forward_backward", datums([1, 2, 3]).to_bytes(), seq=2)
    bench.run()
    assert bench.find(second).state == bench.find(late).state == "running"
    bench.submit(model, "forward_backward", datums([3, 4, 5]).to_bytes(), seq=1)
    assert json.loads(bench.result(late))["metrics"]["grad_norm"] > 0
    assert bench.find(second).state == "done"


def test_a_refused_operation_is_stepped_over(bench: Bench) -> None:
    model = bench.create("a")
    bench.run()
    bench.database.write(queue.reject, Job(model, 1, "forward_backward", "me", BASE, b""), "refused at the door")
    step = bench.submit(model, "optim_step", {}, seq=2)
    assert "metrics" in json.loads(bench.result(step))


def test_a_model_whose_step_is_due_joins_the_next_batch_behind_it(bench: Bench) -> None:
    behind, ready = bench.create("behind"), bench.create("ready")
    bench.run()
    bench.step(behind)
    requests = [bench.train(behind, [1, 2, 3]), bench.train(ready, [4, 5, 6])]
    bench.engine.turn()
    assert [bench.find(request).state for request in requests] == ["done", "done"]


def test_no_step_is_taken_on_a_gradient_that_lost_a_chunk(bench: Bench) -> None:
    model = bench.create("a")
    before = bench.logprobs(model)
    bench.submit(model, "forward_backward", datums([1, 2, 3]).to_bytes(), seq=3)
    bench.database.write(queue.reject, Job(model, 2, "forward_backward", "me", BASE, b""), "its first chunk is bad")
    refused = bench.submit(model, "optim_step", {"learning_rate": 0.1}, seq=4)
    assert f"{model}:2" in bench.error(refused)
    bench.next_seq[model] = 5
    assert np.array_equal(bench.logprobs(model), before)
    bench.train(model, [1, 2, 3])
    assert json.loads(bench.result(bench.step(model)))["metrics"]["grad_norm"] > 0


def test_memory_that_runs_out_fails_the_request_that_needs_it_and_no_neighbours_step(bench: Bench) -> None:
    cursed = 1279

    def run_out(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == cursed).any():
            raise torch.OutOfMemoryError("tried to allocate 3.14 GiB")

    guilty, neighbour = bench.create("guilty"), bench.create("neighbour")
    bench.run()
    module: Any = embedded()[0].module
    with module.get_input_embeddings().register_forward_pre_hook(run_out):
        sound, bad = bench.train(neighbour, [5, 6, 7]), bench.train(guilty, [5, cursed, 7])
        steps = [bench.step(neighbour), bench.step(guilty)]
        bench.run()
    failed = bench.find(bad)
    assert (failed.state, failed.category) == ("failed", "server")
    assert "OutOfMemoryError: tried to allocate 3.14 GiB" in (failed.error or "")
    assert bench.find(sound).state == "done"
    assert json.loads(bench.result(steps[0]))["metrics"]["grad_norm"] > 0
    assert "server error" in bench.error(steps[1])
    bench.train(guilty, [5, 6, 7])
    assert json.loads(bench.result(bench.step(guilty)))["metrics"]["grad_norm"] > 0


@pytest.mark.parametrize("restart", [False, True])
def test_a_step_refused_at_the_door_leaves_the_gradient_for_the_next_one(bench: Bench, restart: bool) -> None:
    norms = []
    for name in ("calm", "refused"):
        model = bench.create(name)
        bench.train(model, [1, 2, 3])
        bench.run()
        if name == "refused":
            seq = bench.next_seq[model]
            bench.database.write(queue.reject, Job(model, seq, "optim_step", "me", BASE, b""), "beta1 is 7")
            bench.next_seq[model] = seq + 1
            if restart:
                bench.new_engine()
        norms.append(json.loads(bench.result(bench.step(model)))["metrics"]["grad_norm"])
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_more_jobs_than_one_look_takes_are_all_found_without_another_ring(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.engine.loop.CLAIM_LIMIT", 2)
    model = bench.create("a")
    jobs = [bench.train(model, [1, 2, 3]) for _ in range(5)]
    bench.engine.turn(claim=True)
    while bench.engine.turn(claim=False):
        pass
    assert [bench.find(job).state for job in jobs] == ["done"] * 5


def test_an_error_belongs_to_its_own_request(bench: Bench) -> None:
    good, bad = bench.create("good"), bench.create("bad")
    missing = bench.submit(bad, "load_weights", {"path": "tinker://x/weights/y", "optimizer": True, "create": False})
    fine = bench.train(good, [1, 2, 3])
    assert "tinker://x/weights/y" in bench.error(missing)
    assert bench.find(fine).state == "done"
    assert bench.logprobs(bad).shape == (5,)


def test_a_model_that_could_not_be_created_says_so_to_every_later_request(bench: Bench) -> None:
    model = bench.create("huge", rank=100_000)
    later = bench.train(model, [1, 2, 3])
    assert "could not be created" in bench.error(later)
    assert "100000" in (bench.find(f"{model}:0").error or "")


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_models_beyond_the_limit_take_turns_on_the_device_without_a_trace(bound: str, tmp_path: Path) -> None:
    outcomes = []
    for is_bounded in (True, False):
        (tmp_path / str(is_bounded)).mkdir()
        bench = Bench(tmp_path / str(is_bounded), 1 if is_bounded and bound == "number" else 8)
        trainer: Any = bench.engine._trainer
        if is_bounded and bound == "bytes":
            trainer._model_bytes = trainer._bytes_of([ModelSpec(4, 1), ModelSpec(8, 1)])
        models = [bench.create(name, rank) for name, rank in (("a", 4), ("b", 8), ("c", 0))]
        most = 0
        for step in range(3):
            for model in models:
                bench.train(model, [20 + step, 21, 22, 23, 24])
                bench.train(model, [30, 31 + step, 32])
                bench.run()
                most = max(most, len(trainer._models))
            for model in models:
                bench.step(model)
        assert most == (3 if not is_bounded else 1 if bound == "number" else 2)
        outcomes.append([bench.logprobs(model) for model in models])
        bench.close()
    for paged, resident in zip(*outcomes, strict=True):
        np.testing.assert_allclose(paged, resident, atol=1e-6)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("point", [False, True], ids=["from the log", "from a recovery point"])
def test_a_killed_engine_loses_nothing(bench: Bench, tmp_path: Path, rank: int, point: bool) -> None:
    calm = bench.create("calm", rank)
    lesson(bench, calm, range(4))
    bench.train(calm, [50, 51, 52])
    bench.step(calm)
    expected = bench.logprobs(calm)

    shaken = bench.create("shaken", rank)
    lesson(bench, shaken, range(2))
    bench.run()
    if point:
        bench.engine.write_points()
        bench.new_engine()
    lesson(bench, shaken, range(2, 4))
    bench.train(shaken, [50, 51, 52])
    bench.run()
    bench.step(shaken)
    bench.database.write(queue.claim, BASE, "dying engine", 10)
    bench.new_engine()
    np.testing.assert_allclose(bench.logprobs(shaken), expected, atol=2e-6)


@pytest.mark.parametrize("point", [False, True], ids=["replayed", "paged out"])
def test_an_unnamed_snapshot_survives_its_engine_and_never_changes(bench: Bench, point: bool) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    sampler = bench.sampler("0", f"{SESSION}:sample:0", model)
    request = {"name": None, "path": None, "sampler_id": sampler, "kind": "snapshot"}
    bench.result(bench.submit(model, "save_weights_for_sampler", request))
    before = bench.greedy(sampler)
    lesson(bench, model, range(2, 12))
    assert bench.greedy(sampler) == before
    if point:
        bench.engine.write_points()
    bench.new_engine()
    assert bench.greedy(sampler) == before


def test_a_checkpoint_restores_weights_and_optimizer_and_its_name_cannot_be_taken_twice(bench: Bench) -> None:
    model = bench.create("a")
    lesson(bench, model, range(3))
    path = f"tinker://{model}/weights/one"
    save = {"name": "one", "path": path, "ttl_seconds": None, "overwrite": False, "user_metadata": {}}
    bench.submit(model, "save_weights", save)
    again = bench.submit(model, "save_weights", save)
    expected = bench.logprobs(model)
    lesson(bench, model, range(3, 5))
    moved = bench.logprobs(model)
    assert "exists already" in bench.error(again)

    twin = bench.create("twin")
    bench.submit(twin, "load_weights", {"path": path, "optimizer": True, "create": False})
    np.testing.assert_allclose(bench.logprobs(twin), expected, atol=1e-6)
    lesson(bench, twin, range(3, 5))
    np.testing.assert_allclose(bench.logprobs(twin), moved, atol=2e-6)


def test_a_save_beyond_what_its_owners_key_may_store_writes_nothing(bench: Bench) -> None:
    def save(name: str, *, overwrite: bool = False) -> str:
        path = f"tinker://{model}/weights/{name}"
        body = {"name": name, "path": path, "ttl_seconds": None, "overwrite": overwrite, "user_metadata": {}}
        return bench.submit(model, "save_weights", body)

    def folders() -> list[str]:
        return sorted(path.name.partition("-")[0] for path in bench.folder.glob("checkpoints/*/weights/*"))

    model = bench.create("a")
    key = replace(keys.new_key("tiny")[1], owner="me", max_storage=1000)
    bench.database.write(keys.create_key, key)
    assert "at most 1000" in bench.error(save("one"))
    assert folders() == []
    bench.database.write(lambda conn: conn.execute(sa.update(tables.keys).values(owner="nobody")) and None)
    bench.result(save("one"))
    size = bench.database.read(records.find_checkpoint, f"tinker://{model}/weights/one").size_bytes
    key = replace(keys.new_key("mine")[1], owner="me", max_storage=2 * size)
    bench.database.write(keys.create_key, key)
    bench.result(save("two"))
    assert f"stores {2 * size} bytes of at most {2 * size}" in bench.error(save("three"))
    assert folders() == ["one", "two"]
    bench.result(save("two", overwrite=True))
    assert folders() == ["one", "two"]
    assert bench.logprobs(model).any()


def test_sampling_goes_on_between_the_micro_batches_of_another_tenants_long_request(bench: Bench) -> None:
    model_id = bench.create("a")
    bench.run()
    sampler_id = bench.sampler("base", "base", None)
    prompt = np.array([5, 6, 7], np.int32)
    asked = SampleCall(prompt, seed=1, max_tokens=4, stop_at_eos=False)
    sample = bench.submit(sampler_id, "sample", asked.to_bytes(), seq=0)
    rows = [[4 + (row + place) % 90 for place in range(301)] for row in range(8)]  # 2,400 tokens: 8 micro-batches
    long = bench.submit(model_id, "forward_backward", datums(*rows).to_bytes())
    states = []
    complete = bench.engine._ledger.complete_soon
    bench.engine._ledger.complete_soon = lambda outcomes: (complete(outcomes), states.append(bench.find(long).state))[0]
    bench.engine.turn()
    assert bench.find(sample).state == "done"
    assert "running" in states, "the sample ended before the long request did"
    bench.run()
    assert bench.find(long).state == "done"


def test_a_finished_session_frees_its_models(bench: Bench) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    bench.run()
    bench.engine.write_points()
    assert list((bench.folder / "recovery").iterdir())
    bench.database.write(records.finish_session, SESSION, "me", "success")
    bench.engine.close_models()
    record = bench.database.read(records.find_model, model)
    assert record is not None
    assert record.state == "closed"
    assert not list((bench.folder / "recovery").iterdir())
    assert "session is over" in bench.error(bench.train(model, [1, 2, 3]))


def test_a_model_that_asks_for_it_keeps_only_its_latest_checkpoints_also_on_disk(bench: Bench) -> None:
    model = bench.create("a")
    bench.run()
    bench.database.write(records.update_model, model, user_metadata={"keep_checkpoints": "2"})
    paths = [f"tinker://{model}/weights/{number}" for number in range(4)]
    for number, path in enumerate(paths):
        bench.result(bench.submit(model, "save_weights", {"path": path, "name": str(number), "overwrite": False}))
    found = [bench.database.read(records.find_checkpoint, path) for path in paths]
    assert [checkpoint is not None for checkpoint in found] == [False, False, True, True]
    kept = {folder.name for folder in (bench.folder / "checkpoints").glob("*/weights/*")}
    assert kept == {Path(checkpoint.folder).name for checkpoint in found if checkpoint is not None}
