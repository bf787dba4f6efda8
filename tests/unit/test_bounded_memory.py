"""What an engine holds in memory does not grow with the tenants it once had, nor with what is queued."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from tests.unit.test_engine import Bench, lesson
from tests.unit.test_recovery import save
from tinsmith.engine import loop, sampling_turns, silence
from tinsmith.store import records
from tinsmith.store.tables import sessions
from tinsmith.wire.packing import SampleCall


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def held(bench: Bench) -> dict[str, int]:
    """How many things of tenants the engine, its trainer and its sampler hold, by kind."""
    engine, residency = bench.engine, bench.engine._residency
    return {
        "lanes": len(engine._lanes),
        "shares": engine._shares.kept,
        "sampling": len(engine._sampling._inside),
        "models": len(residency._models),
        "points": len(residency._points),
        "snapshots": len(residency._snapshots),
        "trained": len(engine._trainer._models),  # type: ignore[attr-defined]
        "published": len(engine._sampling._sampler._snapshots) - 1,  # type: ignore[attr-defined]
    }


def test_nothing_is_left_of_models_whose_session_is_over(bench: Bench) -> None:
    for number in range(4):
        model = bench.create(f"m{number}", rank=4)
        bench.create(f"huge{number}", rank=100_000)
        lesson(bench, model, range(2))
        sampler = bench.sampler(str(number), f"s:sample:{number}", model)
        request = {"name": None, "path": None, "sampler_id": sampler, "kind": "snapshot"}
        bench.result(bench.submit(model, "save_weights_for_sampler", request))
        bench.greedy(sampler)
    bench.engine.write_points()
    assert held(bench)["models"] == held(bench)["published"] == 4
    bench.database.write(records.finish_session, "s", "me", "success")
    bench.engine.close_models()
    assert not any(held(bench).values()), held(bench)


def test_models_and_snapshots_of_silent_sessions_leave_the_device_for_newer_ones(bench: Bench) -> None:
    bench.engine._residency._max_snapshots = 2 * bench.max_models
    for number in range(3 * bench.max_models):
        model = bench.create(f"m{number}")
        sampler = bench.sampler(str(number), f"s:sample:{number}", model)
        request = {"name": None, "path": None, "sampler_id": sampler, "kind": "snapshot"}
        bench.result(bench.submit(model, "save_weights_for_sampler", request))
    assert held(bench)["models"] == held(bench)["trained"] == bench.max_models
    assert held(bench)["snapshots"] == held(bench)["published"] == 2 * bench.max_models


def test_what_a_silent_client_has_on_the_device_waits_on_disk_until_it_comes_back(bench: Bench) -> None:
    model = bench.create("m")
    lesson(bench, model, range(2))
    sampler = bench.sampler("0", "s:sample:0", model)
    request = {"name": None, "path": None, "sampler_id": sampler, "kind": "snapshot"}
    bench.result(bench.submit(model, "save_weights_for_sampler", request))
    drawn, expected = bench.greedy(sampler), bench.logprobs(model)
    bench.engine.rest_silent_models()
    assert held(bench)["models"] == 1, "its client beats"
    bench.engine._silence.began_at = 0.0
    bench.database.write(fall_silent, silence.PATIENCE_SECONDS + 1)
    bench.engine.rest_silent_models()
    bench.engine.close_models()
    assert held(bench) | {"lanes": 0, "shares": 0} == dict.fromkeys(held(bench), 0)
    np.testing.assert_allclose(bench.logprobs(model), expected, atol=1e-6)
    assert bench.greedy(sampler) == drawn


def test_a_session_that_is_silent_for_a_day_ends_unless_the_server_was_away_itself(bench: Bench) -> None:
    model = bench.create("m")
    lesson(bench, model, range(2))
    kept, expected = save(bench, model, "kept"), bench.logprobs(model)
    bench.database.write(fall_silent, silence.SILENT_SECONDS + 1)
    bench.engine.close_models()
    assert held(bench)["models"] == 1
    bench.engine._silence.began_at = 0.0
    bench.engine.close_models()
    assert not any(held(bench).values()), held(bench)
    assert "session is over" in bench.error(bench.train(model, [1, 2, 3]))
    heir = bench.create("heir")
    bench.result(bench.submit(heir, "load_weights", {"path": kept, "optimizer": True, "create": False}))
    np.testing.assert_array_equal(bench.logprobs(heir), expected)


def test_a_machine_that_wakes_up_does_not_end_the_sessions_that_slept_with_it(bench: Bench) -> None:
    slept = [0.0]
    bench.engine._silence = silence.Silence(lambda: time.time() + slept[0])
    bench.engine._silence.began_at = 0.0
    model = bench.create("m")
    lesson(bench, model, range(2))
    bench.run()
    slept[0] = silence.SILENT_SECONDS + 3600.0
    keep_house(bench)
    assert held(bench)["models"] == 1, "its client has had no time to beat"
    bench.engine._silence.began_at = 0.0
    keep_house(bench)
    assert not any(held(bench).values()), "it has, and did not"


def keep_house(bench: Bench) -> None:
    bench.engine._kept_house_at = -loop.KEEP_HOUSE_SECONDS
    bench.engine.turn()


def fall_silent(conn: sa.Connection, seconds: float) -> None:
    conn.execute(sa.update(sessions).values(seen_at=time.time() - seconds))


def test_queued_sampling_stays_in_the_database_beyond_the_samplers_share(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CLAIM_LIMIT", 2)
    monkeypatch.setattr(sampling_turns, "MAX_SAMPLING_TOKENS", 16)  # of 8 each, says the bench
    sampler = bench.sampler("base", "base", None)
    call = SampleCall(np.array([40, 41, 42], np.int32), seed=1, max_tokens=5, stop_at_eos=False)
    asked = [bench.submit(sampler, "sample", call.to_bytes()) for _ in range(9)]
    most = 0
    while bench.engine.turn():
        most = max(most, len(bench.engine._sampling._inside))
    assert most == 2
    assert all(bench.find(request).state == "done" for request in asked)
