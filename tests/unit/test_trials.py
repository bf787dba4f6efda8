"""Requests that an engine dies of: found apart from their neighbours, and given up with the evidence."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.unit.test_engine import SESSION, Bench
from tinsmith.engine.trials import MOST_RESTORING, PULSE, BrokenModelError, DeadlyRequestError, Trials, pulse_file
from tinsmith.store import records
from tinsmith.wire.packing import SampleCall

CURSED = 1279  # a token whose embedding kills the engine
EMBEDDING = F.embedding


class EngineDied(BaseException):
    """Stands for a process that ends: nothing in the engine may catch it."""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@contextmanager
def cursed_token(error: Callable[[], BaseException]) -> Iterator[None]:
    """Every pass of the embedded model in which `CURSED` comes raises what `error` makes."""

    def cursed(tokens: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        if (tokens == CURSED).any():
            raise error()
        return EMBEDDING(tokens, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "embedding", cursed)
        yield


@contextmanager
def without_curse() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "embedding", EMBEDDING)
        yield


@pytest.fixture
def curse() -> Iterator[None]:
    with cursed_token(EngineDied):
        yield


def run_to_the_end(bench: Bench, most: int = 6) -> int:
    """Runs everything, with a new engine after each death; how many died."""
    for deaths in range(most):
        try:
            bench.run()
        except EngineDied:
            bench.new_engine()
        else:
            return deaths
    raise AssertionError(f"{most} engines died")


def failure(bench: Bench, request_id: str) -> str:
    future = bench.find(request_id)
    assert (future.state, future.category) == ("failed", "server"), future
    return future.error or ""


def ask(bench: Bench, sampler_id: str, tokens: list[int]) -> str:
    call = SampleCall(np.array(tokens, np.int32), seed=1, max_tokens=4, temperature=0.0, stop_at_eos=False)
    return bench.submit(sampler_id, "sample", call.to_bytes())


@pytest.mark.usefixtures("curse")
def test_a_training_request_that_kills_the_engine_fails_and_its_neighbours_in_the_batch_do_not(
    bench: Bench,
) -> None:
    calm, guilty, innocent = (bench.create(name) for name in ("calm", "guilty", "innocent"))
    bench.train(calm, [5, 6, 7])
    bench.step(calm)
    expected = bench.logprobs(calm)
    bench.run()
    fine, deadly = bench.train(innocent, [5, 6, 7]), bench.train(guilty, [5, CURSED, 7])
    steps = [bench.step(innocent), bench.step(guilty)]
    assert run_to_the_end(bench) == 2
    assert "died 2 times while running this request" in failure(bench, deadly)
    assert bench.find(fine).state == bench.find(steps[0]).state == "done"
    assert "no step was taken" in bench.error(steps[1])
    np.testing.assert_allclose(bench.logprobs(innocent), expected, atol=1e-6)
    bench.train(guilty, [5, 6, 7])
    assert json.loads(bench.result(bench.step(guilty)))["metrics"]["grad_norm"] > 0


@pytest.mark.usefixtures("curse")
def test_a_sample_that_kills_the_engine_fails_and_the_other_samples_do_not(bench: Bench) -> None:
    sampler = bench.sampler("base", "base", None)
    before = [ask(bench, sampler, [40 + n, 41, 42]) for n in range(2)]
    deadly = ask(bench, sampler, [5, CURSED, 7])
    behind = [ask(bench, sampler, [50 + n, 41, 42]) for n in range(2)]
    assert run_to_the_end(bench) == 2
    assert "the last time with no other request beside it" in failure(bench, deadly)
    assert [bench.find(request).state for request in before + behind] == ["done"] * 4


def test_a_snapshot_that_kills_the_engine_when_it_is_loaded_fails_its_samples_and_no_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = bench.create("a"), bench.sampler("base", "base", None)
    path = f"tinker://{model}/sampler_weights/one"
    request = {"name": "one", "path": path, "sampler_id": None, "kind": "snapshot"}
    bench.result(bench.submit(model, "save_weights_for_sampler", request))

    def die(*_: object) -> None:
        raise EngineDied

    monkeypatch.setattr("tinsmith.sampling.sampler.TorchSampler.publish", die)
    deadly = ask(bench, bench.sampler("named", path, model), [5, 6, 7])
    fine = ask(bench, base, [5, 6, 7])
    assert run_to_the_end(bench) == 2
    assert "died 2 times" in failure(bench, deadly)
    assert bench.find(fine).state == "done"


def test_a_step_that_kills_the_engine_fails_and_leaves_the_weights_alone(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bench.create("a")
    before = bench.logprobs(model)
    bench.train(model, [1, 2, 3])
    bench.run()

    def die(*_: object) -> None:
        raise EngineDied

    with monkeypatch.context() as patch:
        patch.setattr("tinsmith.training.trainer.TorchTrainer.optim_step", die)
        deadly = bench.step(model)
        assert run_to_the_end(bench) == 2
    assert "died 2 times" in failure(bench, deadly)
    np.testing.assert_array_equal(bench.logprobs(model), before)
    assert json.loads(bench.result(bench.step(model)))["metrics"]["grad_norm"] == 0.0


@pytest.mark.usefixtures("curse")
def test_a_death_is_forgotten_once_its_request_was_answered(bench: Bench) -> None:
    model = bench.create("a")
    bench.run()
    request = bench.train(model, [5, CURSED, 7])
    with pytest.raises(EngineDied):
        bench.run()
    bench.new_engine()
    assert list(bench.engine._trials.suspects.values()) == [1]
    with without_curse():
        bench.result(request)
    assert bench.engine._trials.suspects == {}
    bench.new_engine()
    assert bench.engine._trials.suspects == {}


def with_a_cursed_past(bench: Bench) -> str:
    """A model with a recovery point and, behind that, an operation that kills who executes it again."""
    model = bench.create("haunted")
    bench.train(model, [5, 6, 7])
    bench.result(bench.step(model))
    bench.engine.write_points()
    bench.train(model, [5, CURSED, 7])
    bench.result(bench.step(model))
    return model


def recovery_points(bench: Bench) -> list[Path]:
    return sorted((bench.folder / "recovery").glob("*/[0-9]*"))


def test_a_model_whose_past_kills_the_engine_is_left_alone_and_others_go_on(
    bench: Bench, request: pytest.FixtureRequest
) -> None:
    model, other = with_a_cursed_past(bench), bench.create("other")
    bench.run()
    request.getfixturevalue("curse")
    bench.new_engine()
    asked, fine = bench.train(model, [5, 6, 7]), bench.train(other, [5, 6, 7])
    assert run_to_the_end(bench) == 2
    why = failure(bench, asked)
    assert f"died 2 times while bringing it back, the last time while running {model}:3 (forward_backward) again" in why
    assert bench.find(fine).state == "done"
    bench.new_engine()
    assert "is broken" in failure(bench, run(bench, bench.train(model, [5, 6, 7])))
    assert len(recovery_points(bench)) == 1
    bench.database.write(records.finish_session, SESSION, "me", "success")
    bench.engine.close_models()
    bench.new_engine()
    bench.engine._trials.check_model(model)


def run(bench: Bench, request_id: str) -> str:
    bench.run()
    return request_id


def test_one_death_while_a_model_comes_back_is_forgotten_once_it_has(
    bench: Bench, request: pytest.FixtureRequest
) -> None:
    model = with_a_cursed_past(bench)
    expected = bench.logprobs(model)
    request.getfixturevalue("curse")
    for _ in range(3):
        bench.new_engine()
        with pytest.raises(EngineDied):
            bench.logprobs(model)
        with without_curse():
            bench.new_engine()
            np.testing.assert_allclose(bench.logprobs(model), expected, atol=2e-6)


def test_a_model_that_kills_engines_at_one_place_after_another_is_left_alone_in_the_end(tmp_path: Path) -> None:
    for number in range(MOST_RESTORING):
        trials = Trials(tmp_path)
        trials.take_over(never)
        trials.check_model("a")
        with trials.restoring("a", f"running a:{number} again"):
            pass
        trials._write(PULSE, b"r")
    last = Trials(tmp_path)
    last.take_over(never)
    with pytest.raises(BrokenModelError, match=f"died {MOST_RESTORING} times"):
        last.check_model("a")
    last.check_model("b")
    last.release_model("a")
    after = Trials(tmp_path)
    after.take_over(never)
    after.check_model("a")


def never(_: object) -> list[int]:
    return []


@pytest.mark.parametrize("note", [lambda trials: trials.training([3, 4]), lambda trials: trials.sampling([3, 4])])
def test_what_was_going_on_is_read_by_the_next_engine(tmp_path: Path, note: Callable[[Trials], Any]) -> None:
    with note(Trials(tmp_path)):
        later = Trials(tmp_path)
        later.take_over(never)
    assert later.suspects == {3: 1, 4: 1}
    later.check(3)
    with later.training([3]):
        last = Trials(tmp_path)
        last.take_over(never)
    assert last.suspects == {3: 2, 4: 1}
    with pytest.raises(DeadlyRequestError, match="died 2 times"):
        last.check(3)
    last.check(4)


def test_a_step_of_the_sampler_between_two_micro_batches_is_told_from_training(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    with trials.training([1]):
        with trials.sampling([2]):
            during = Trials(tmp_path)
            during.take_over(never)
        after = Trials(tmp_path)
        after.take_over(never)
    assert during.suspects == {2: 1}
    assert after.suspects == {1: 1, 2: 1}


def test_an_engine_that_ends_in_order_leaves_no_suspects(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    with trials.training([1]):
        trials.close()
    later = Trials(tmp_path)
    later.take_over(never)
    assert later.suspects == {}


@pytest.mark.parametrize("name", ["training", "deaths.json"])
def test_damaged_notes_accuse_nobody(tmp_path: Path, name: str) -> None:
    trials = Trials(tmp_path)
    with trials.training([1, 2]):
        (pulse_file(tmp_path).parent / name).write_text("[1, ")
        later = Trials(tmp_path)
    pulse_file(tmp_path).write_bytes(b"t")
    later.take_over(never)
    assert later.suspects == ({} if name == "training" else {1: 1, 2: 1})


def test_every_pulse_changes_the_time_of_its_file(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    os.utime(pulse_file(tmp_path), (0, 0))
    trials.pulse()
    assert pulse_file(tmp_path).stat().st_mtime > 0
