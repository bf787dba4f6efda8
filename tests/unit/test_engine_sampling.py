"""The engine beside a sampler that is full, broken or deserted, and the snapshots that it keeps."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from tests.unit.test_engine import BASE, SESSION, Bench, datums, lesson, one_pass_a_turn
from tinsmith.engine.loop import KEEP_ORDER_SECONDS
from tinsmith.errors import UnavailableError, UserError
from tinsmith.store import queue, records, snapshots, tables
from tinsmith.store.tables import jobs, sessions
from tinsmith.wire.jobs import Job, Outcome
from tinsmith.wire.packing import SampleCall

LONG = 40


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    with one_pass_a_turn():
        yield bench
    bench.close()


def ask(bench: Bench, sampler: str, seq: int, max_tokens: int = LONG, **options: Any) -> str:
    call = SampleCall(np.array([5, 6, 7], np.int32), seed=seq, max_tokens=max_tokens, stop_at_eos=False, **options)
    return bench.submit(sampler, "sample", call.to_bytes(), seq=seq)


def states(bench: Bench, request_ids: list[str]) -> list[str]:
    return [bench.find(request_id).state for request_id in request_ids]


def publish(bench: Bench, model: str, name: str, kind: str = "snapshot") -> str:
    """A sampler of the model's weights as they are now."""
    sampler = bench.sampler(name, f"{SESSION}:sample:{name}", model)
    request = {"name": None, "path": None, "sampler_id": sampler, "kind": kind}
    bench.result(bench.submit(model, "save_weights_for_sampler", request))
    return sampler


# A full sampler


@pytest.mark.parametrize("limit", [{"MAX_SAMPLING": 2}, {"MAX_SAMPLING_TOKENS": 9}], ids=str)
def test_training_passes_the_samples_that_a_full_sampler_leaves_in_the_queue(
    limit: dict[str, int], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limit.items():
        monkeypatch.setattr(f"tinsmith.engine.sampling_turns.{name}", value)
    monkeypatch.setattr("tinsmith.engine.loop.CLAIM_LIMIT", 2)
    model, sampler = bench.create("a"), bench.sampler("base", "base", None)
    bench.run()
    samples = [ask(bench, sampler, seq) for seq in range(6)]
    training = [bench.train(model, [1, 2, 3]), bench.step(model)]
    for _ in range(4):
        bench.engine.turn()
    assert states(bench, training) == ["done", "done"]
    assert states(bench, samples) == ["running"] * 2 + ["queued"] * 4
    while bench.engine.turn(claim=False):
        pass
    assert states(bench, samples) == ["done"] * 6


def test_another_owners_request_is_not_hidden_behind_thousands(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.engine.sampling_turns.MAX_SAMPLING", 4)
    monkeypatch.setattr("tinsmith.engine.loop.CLAIM_LIMIT", 2)
    model, sampler = bench.create("a"), bench.sampler("base", "base", None)
    bench.run()
    flood = [ask(bench, sampler, seq) for seq in range(12)]
    bench.engine.turn()
    assert states(bench, flood) == ["running"] * 4 + ["queued"] * 8
    trained = [bench.train(model, [1, 2, 3]) for _ in range(7)]
    other = bench.sampler("other", "base", None)
    call = SampleCall(np.array([5, 6, 7], np.int32), seed=1, max_tokens=1, stop_at_eos=False)
    small = bench.database.write(queue.submit, Job(other, 0, "sample", "other", BASE, call.to_bytes(), 4))
    bench.engine.turn()
    assert states(bench, [small, *trained]) == ["done"] * 8
    assert states(bench, flood) == ["running"] * 4 + ["queued"] * 8


# A broken sampler


@pytest.mark.parametrize("during", ["pause", "turn"])
def test_a_sampler_that_breaks_ends_its_own_requests_and_no_training(during: str, bench: Bench) -> None:
    model, sampler = bench.create("a"), bench.sampler("base", "base", None)
    bench.run()
    engine: Any = bench.engine
    samples = [ask(bench, sampler, seq) for seq in range(3)]
    bench.engine.turn()
    backend, step = engine._sampling._sampler, engine._sampling._sampler.step

    def break_once() -> None:
        backend.step = step
        raise ZeroDivisionError("no such luck")

    if during == "pause":
        long = bench.train(model, [1, 2, 3])
        engine._claim()
        backend.step = break_once
        engine._train()
    else:
        long = bench.train(model, [1, 2, 3])
        backend.step = break_once
        engine.turn()
    bench.run()
    assert bench.find(long).state == "done"
    for request_id in samples:
        failed = bench.find(request_id)
        assert (failed.state, failed.category) == ("failed", "server")
        assert "ZeroDivisionError: no such luck" in (failed.error or "")
    assert backend.load == 0
    backend.check()
    bench.result(bench.step(model))
    bench.result(ask(bench, sampler, 3))


# Deserted samples


def test_a_sample_that_its_client_gives_up_leaves_the_sampler_and_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.engine.sampling_turns.MAX_SAMPLING", 2)
    engine: Any = bench.engine
    engine._bell = engine._ledger.listen()
    sampler = bench.sampler("base", "base", None)
    kept, running, queued = [ask(bench, sampler, seq) for seq in range(3)]
    engine.turn()
    for seq in (1, 2):
        bench.doorbell.ring("jobs", bench.database.write(queue.give_up, sampler, seq))
    assert engine._sampling._sampler.load == 2
    assert engine._hear(5.0)
    assert engine._sampling._sampler.load == 1
    engine._sampling._sampler.check()
    bench.run()
    assert states(bench, [kept, running, queued]) == ["done", "expired", "expired"]
    engine._bell.close()


def test_samples_of_a_silent_client_are_dropped_and_those_of_others_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.engine.sampling_turns.MAX_SAMPLING", 4)
    long_ago = time.time() - 3600
    alive = records.Session("alive", "me", "open", [], {}, "0", None, None, None, long_ago, time.time())
    bench.database.write(records.create_session, alive)
    silent_sampler = bench.sampler("base", "base", None)
    record = records.SamplerRecord("alive:sample:0", "alive", "me", "tiny", "tiny", "base", None, time.time())
    bench.database.write(records.create_sampler, record)
    silent = [ask(bench, silent_sampler, seq) for seq in range(3)]
    fresh = ask(bench, silent_sampler, 3)
    others = [ask(bench, "alive:sample:0", seq) for seq in range(2)]
    bench.engine.turn()
    bench.database.write(make_old, long_ago, [*silent, *others])
    bench.engine.drop_abandoned_samples()
    assert bench.engine._sampling._sampler.load == 4, "the server has not been there for long enough to be found"
    bench.engine._silence.began_at = long_ago
    bench.engine.drop_abandoned_samples()
    assert bench.engine._sampling._sampler.load == 1
    bench.run()
    assert states(bench, silent) == ["expired"] * 3
    assert states(bench, [fresh, *others]) == ["done"] * 3


def make_old(conn: sa.Connection, created_at: float, request_ids: list[str]) -> None:
    """Requests of long ago, of a session not heard of since."""
    conn.execute(sa.update(sessions).where(sessions.c.id == SESSION).values(seen_at=created_at))
    for request_id in request_ids:
        subject, _, seq = request_id.rpartition(":")
        which = (jobs.c.subject == subject) & (jobs.c.seq == int(seq))
        conn.execute(sa.update(jobs).where(which).values(created_at=created_at))


def test_a_sample_given_up_by_a_ring_that_was_lost_is_found_by_house_keeping(bench: Bench) -> None:
    sampler = bench.sampler("base", "base", None)
    ask(bench, sampler, 0)
    bench.engine.turn()
    bench.database.write(queue.give_up, sampler, 0)
    bench.engine.drop_abandoned_samples()
    assert bench.engine._sampling._sampler.load == 0


def test_a_sample_given_up_before_it_began_may_be_forgotten_meanwhile(bench: Bench) -> None:
    sampler = bench.sampler("base", "base", None)
    given_up, other = (ask(bench, sampler, seq) for seq in range(2))
    bench.engine._claim()
    bench.database.write(queue.give_up, sampler, 0)
    while bench.engine._ledger.prune(time.time()):  # as another engine on the database would
        pass
    bench.run()
    assert states(bench, [given_up, other]) == ["expired", "done"]


# Snapshots


def test_a_passing_snapshot_touches_no_disk(bench: Bench) -> None:
    model = bench.create("a")
    lesson(bench, model, range(2))
    bench.run()
    before = files(bench)
    for kind in ("snapshot", "inflight"):
        publish(bench, model, kind, kind)
    assert files(bench) == before


def files(bench: Bench) -> set[Path]:
    """All but the database's own."""
    return {path for path in bench.folder.rglob("*") if path.is_file() and "db.sqlite" not in path.name}


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_snapshots_beyond_the_bound_wait_on_disk_and_come_back_as_they_were(bound: str, bench: Bench) -> None:
    model = bench.create("a")
    bench.run()
    engine: Any = bench.engine
    if bound == "number":
        engine._residency._max_snapshots = 3
    else:
        engine._sampling._sampler._snapshots._limit = 3 * engine._trainer.snapshot(model).nbytes
    samplers, first = [], []
    for turn in range(10):
        lesson(bench, model, range(10 * turn, 10 * turn + 4))
        samplers.append(publish(bench, model, str(turn)))
        first.append(bench.greedy(samplers[-1]))
        assert len(engine._sampling._sampler._snapshots) <= 3 + 1  # and the base
    assert len({tuple(tokens) for tokens in first}) > 5
    for _ in range(2):
        assert [bench.greedy(sampler) for sampler in samplers] == first
    bench.new_engine()
    assert [bench.greedy(sampler) for sampler in samplers] == first


def test_one_snapshot_larger_than_all_room_is_sampled_still(bench: Bench) -> None:
    model = bench.create("a")
    bench.run()
    bench.engine._sampling._sampler._snapshots._limit = 1  # type: ignore[attr-defined]
    samplers = [publish(bench, model, str(turn)) for turn in range(3)]
    assert len({tuple(bench.greedy(sampler)) for sampler in samplers}) == 1


def test_a_finished_session_leaves_no_snapshot_behind_wherever_it_is(bench: Bench) -> None:
    model = bench.create("a")
    engine: Any = bench.engine
    engine._residency._max_snapshots = 2
    samplers = [publish(bench, model, str(turn)) for turn in range(4)]
    assert (bench.folder / "snapshots").exists()
    bench.database.write(records.finish_session, SESSION, "me", "success")
    engine.close_models()
    assert not list((bench.folder / "snapshots").iterdir())
    assert list(engine._sampling._sampler._snapshots) == ["base"]
    call = SampleCall(np.array([4], np.int32), seed=1, max_tokens=1)
    assert "session is over" in bench.error(bench.submit(samplers[0], "sample", call.to_bytes()))


def test_an_inflight_sampler_that_was_paged_out_comes_back_as_it_was_saved_last(bench: Bench) -> None:
    model = bench.create("a")
    engine: Any = bench.engine
    engine._residency._max_snapshots = 1
    inflight = publish(bench, model, "inflight", "inflight")
    early = bench.greedy(inflight)
    publish(bench, model, "other")  # pages it out
    lesson(bench, model, range(8))
    again = publish(bench, model, "again", "inflight")
    late = bench.greedy(inflight)
    assert late == bench.greedy(again) != early
    publish(bench, model, "another")
    assert bench.greedy(inflight) == late


def test_training_data_of_unfinished_batches_is_not_mistaken_for_samples(bench: Bench) -> None:
    """A model's jobs survive the silence of its client."""
    model = bench.create("a")
    bench.run()
    request = bench.submit(model, "forward_backward", datums([1, 2, 3]).to_bytes())
    bench.database.write(make_old, time.time() - 3600, [request])
    bench.database.write(queue.give_up_silent, "tiny", time.time() - 60)
    bench.run()
    assert bench.find(request).state == "done"


# Superseded snapshots


def grow_old(bench: Bench, *unused: str) -> None:
    """Makes it two hours ago that all samplers were made, and that these were asked for anything."""

    def shift(conn: sa.Connection) -> None:
        made, written = tables.samplers.c.created_at, tables.samplers.c.written_at
        asked, ended = jobs.c.created_at, jobs.c.finished_at
        conn.execute(sa.update(tables.samplers).values(created_at=made - 7200, written_at=written - 7200))
        of_them = sa.update(jobs).where(jobs.c.subject.in_(unused))
        conn.execute(of_them.values(created_at=asked - 7200, finished_at=ended - 7200))

    bench.database.write(shift)


def look_again(bench: Bench) -> None:
    """Deletes what has not been used for an hour, in an engine that has run for as long."""
    engine: Any = bench.engine
    engine._snapshot_seconds = 3600.0
    engine._silence.began_at = time.time() - 3600.0
    engine.drop_superseded_snapshots()


def series(bench: Bench, names: str) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Samplers of one model as it learns, on disk and on the device, and what each of them says."""
    model = bench.create("a")
    samplers, said = {}, {}
    for turn, name in enumerate(names):
        lesson(bench, model, range(10 * turn, 10 * turn + 4))
        samplers[name] = publish(bench, model, name)
        said[name] = bench.greedy(samplers[name])
    bench.engine.write_points()
    return samplers, said


def on_disk(bench: Bench) -> set[str]:
    return {folder.name[-1] for folder in (bench.folder / "snapshots").glob("*/*")}


def asked(bench: Bench, sampler: str, seq: int) -> str:
    return ask(bench, sampler, seq, max_tokens=1)


def test_a_superseded_snapshot_that_nobody_samples_from_is_deleted_and_no_other(bench: Bench) -> None:
    samplers, said = series(bench, "abcd")
    assert on_disk(bench) == set("abcd")
    grow_old(bench, *(samplers[name] for name in "abd"))  # c was used just now, d is the newest
    waiting = asked(bench, samplers["b"], 77)
    look_again(bench)
    assert on_disk(bench) == set("bcd")
    assert bench.find(waiting).state == "queued"
    for _ in range(2):
        assert {name: bench.greedy(samplers[name]) for name in "bcd"} == {name: said[name] for name in "bcd"}
        bench.new_engine()
    assert "superseded" in bench.error(asked(bench, samplers["a"], 77))


def test_what_all_inflight_samplers_of_a_model_share_is_never_superseded(bench: Bench) -> None:
    model = bench.create("a")
    inflight = publish(bench, model, "inflight", "inflight")
    publish(bench, model, "newer")
    said = bench.greedy(inflight)
    grow_old(bench, inflight)
    look_again(bench)
    assert bench.greedy(inflight) == said


def test_a_snapshot_that_could_not_be_written_supersedes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    samplers, said = series(bench, "a")
    model = f"{SESSION}:train:a"
    failed = bench.sampler("b", f"{SESSION}:sample:b", model)
    with monkeypatch.context() as broken:
        broken.setattr(bench.engine._trainer, "snapshot", no_room)
        request = {"name": None, "path": None, "sampler_id": failed, "kind": "snapshot"}
        assert "no room" in bench.error(bench.submit(model, "save_weights_for_sampler", request))
    grow_old(bench, samplers["a"])
    look_again(bench)
    assert bench.greedy(samplers["a"]) == said["a"]
    assert "could not be saved" in bench.error(asked(bench, failed, 77))
    publish(bench, model, "c")
    grow_old(bench, samplers["a"])
    look_again(bench)
    assert "superseded" in bench.error(asked(bench, samplers["a"], 78))


def no_room(model_id: str) -> None:
    raise UserError("no room")


def test_nothing_is_superseded_by_another_models_snapshot(bench: Bench) -> None:
    early = publish(bench, bench.create("a"), "early")
    publish(bench, bench.create("b"), "late")
    grow_old(bench, early)
    look_again(bench)
    assert bench.greedy(early)


def test_after_a_pause_of_the_server_clients_have_time_to_sample_from_what_they_had(bench: Bench) -> None:
    samplers, said = series(bench, "ab")
    grow_old(bench, samplers["a"])
    engine: Any = bench.new_engine()
    engine._snapshot_seconds = 3600.0
    engine.drop_superseded_snapshots()
    assert bench.greedy(samplers["a"]) == said["a"]


def test_many_superseded_snapshots_are_deleted_a_few_at_a_time_without_long_pauses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "AT_ONCE", 2)
    samplers, _ = series(bench, "abcd")
    grow_old(bench, *samplers.values())
    engine: Any = bench.engine
    engine._snapshot_seconds, engine._silence.began_at = 3600.0, time.time() - 3600.0
    for left in ("cd", "d"):
        engine._kept_order_at -= 1.0 if left == "d" else KEEP_ORDER_SECONDS
        engine.turn()
        assert on_disk(bench) == set(left)


def test_without_a_time_superseded_snapshots_stay(bench: Bench) -> None:
    samplers, said = series(bench, "ab")
    grow_old(bench, samplers["a"])
    bench.engine.drop_superseded_snapshots()
    assert bench.greedy(samplers["a"]) == said["a"]


@pytest.mark.parametrize("point", [True, False])
def test_an_engine_that_dies_before_it_deletes_a_snapshot_leaves_that_to_the_next(bench: Bench, point: bool) -> None:
    model = bench.create("a")
    samplers = [publish(bench, model, name) for name in "ab"]
    if point:
        lesson(bench, model, range(4))
        bench.run()
        bench.engine.write_points()
        assert on_disk(bench) == set("ab")
    grow_old(bench, samplers[0])
    assert bench.engine._ledger.release_superseded_snapshots(time.time() - 3600) == ([(samplers[0], model)], False)
    engine: Any = bench.new_engine()
    assert on_disk(bench) == (set("b") if point else set())
    bench.greedy(samplers[1])  # brings the model back, from the point or from its beginning
    engine._residency.require_model(model)
    assert samplers[0] not in engine._residency._snapshots


# A crowd


def test_a_crowd_does_not_fill_the_sampler_beside_a_small_tenant_and_all_is_done(bench: Bench) -> None:
    crowd = bench.sampler("crowd", "base", None)
    now = time.time()
    session = records.Session("t", "me", "open", [], {}, "0", None, None, None, now, now)
    bench.database.write(records.create_session, session)
    record = records.SamplerRecord("t:sample:0", "t", "me", BASE, BASE, "base", None, now)
    small = bench.database.write(records.create_sampler, record).id
    engine: Any = bench.engine
    turns = engine._sampling
    turns._passes._most = 4.0
    quiet = [ask(bench, small, 0)]
    loud = [ask(bench, crowd, seq, max_tokens=8) for seq in range(40)]
    while states(bench, quiet) != ["done"]:
        turns._passes._most = 4.0
        engine.turn()
        assert sum(header.subject == crowd for header in turns._inside.values()) <= 4
    assert set(states(bench, loud)) == {"done", "running"}
    bench.run()
    assert set(states(bench, loud)) == {"done"}


# Results


@contextmanager
def store_held_up(bench: Bench) -> Iterator[None]:
    """Nothing is written until the block ends."""
    go_on = threading.Event()
    waiting = bench.database.write_soon(lambda _: go_on.wait(60))
    try:
        yield
    finally:
        go_on.set()
        waiting.result()


def test_the_next_pass_runs_while_results_are_written(bench: Bench) -> None:
    sampler = bench.sampler("base", "base", None)
    short, long = ask(bench, sampler, 0, max_tokens=1), ask(bench, sampler, 1)
    backend, sampling = bench.engine._sampling._sampler, bench.engine._sampling
    bench.engine._claim()
    sampling._admit()
    with store_held_up(bench):
        while not sampling._ending:
            sampling.take_turn(time.monotonic())
        for _ in range(3):
            sampling.take_turn(time.monotonic())
        assert states(bench, [short, long]) == ["running"] * 2
        assert backend.load == 1
    bench.run()
    assert states(bench, [short, long]) == ["done"] * 2


def test_results_that_could_not_be_written_are_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = bench.sampler("base", "base", None)
    asked_for = [ask(bench, sampler, seq, max_tokens=2 + seq) for seq in range(3)]
    with monkeypatch.context() as broken:
        broken.setattr("tinsmith.store.ledger._complete", fail_to_write)
        while not bench.engine._astray:
            bench.engine.turn()
    assert states(bench, asked_for) == ["running"] * 3
    bench.run()
    assert states(bench, asked_for) == ["done"] * 3
    assert not bench.engine._sampling._samples


def fail_to_write(*_arguments: object) -> list[str]:
    raise UnavailableError("the database is away")


def test_what_breaks_between_two_passes_of_training_is_not_blamed_on_it_and_loses_no_sample(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampler = bench.create("a"), bench.sampler("base", "base", None)
    bench.run()
    short, trained = ask(bench, sampler, 0, max_tokens=1), bench.train(model, [1, 2, 3])
    with monkeypatch.context() as broken:
        broken.setattr("tinsmith.store.ledger._complete", divide_by_zero)
        with pytest.raises(ZeroDivisionError):  # which ends the process
            bench.engine.turn()
        assert states(bench, [short, trained]) == ["running"] * 2
    bench.new_engine()
    bench.run()
    assert states(bench, [short, trained]) == ["done"] * 2


def divide_by_zero(_conn: sa.Connection, outcomes: list[Outcome], _base: str) -> list[str]:
    if all(outcome.error is None for outcome in outcomes):
        raise ZeroDivisionError
    return queue.complete(_conn, outcomes)
