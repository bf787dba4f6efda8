"""The schedule of recovery points: how often each model gets one, and what all of them may cost."""

from itertools import pairwise

import pytest

from tinsmith.engine.points import POINT_SECONDS, SHARE, PointSchedule


def simulate(models: int, write_seconds: float, hours: float = 1.0) -> dict[str, list[float]]:
    """When each of some models that never rest got its points."""
    schedule, now = PointSchedule(), 0.0
    written: dict[str, list[float]] = {f"m{number}": [] for number in range(models)}
    while now < 3600 * hours:
        model_id = schedule.due(written, now)
        if model_id is not None:
            schedule.wrote(model_id, now, now + write_seconds)
            now += write_seconds
            written[model_id].append(now)
        now += 0.25  # a turn of the loop
    return written


def test_light_models_get_a_point_every_minute() -> None:
    for times in simulate(4, 0.01).values():
        gaps = [after - before for before, after in pairwise(times)]
        assert min(gaps) >= POINT_SECONDS
        assert max(gaps) < POINT_SECONDS + 5


@pytest.mark.parametrize(("models", "write_seconds"), [(1, 5.0), (64, 0.5), (8, 3.0)])
def test_heavy_or_many_models_take_no_more_than_their_share_of_the_time_and_take_turns(
    models: int, write_seconds: float
) -> None:
    written = simulate(models, write_seconds, hours=4.0)
    counts = [len(times) for times in written.values()]
    assert sum(counts) * write_seconds / (4 * 3600) <= SHARE
    assert min(counts) >= max(counts) - 1
    assert min(counts) >= 2


def test_a_model_that_has_not_moved_gets_none_and_one_that_is_gone_is_forgotten() -> None:
    schedule = PointSchedule()
    assert schedule.due(["a"], 0.0) is None
    assert schedule.due([], 100.0) is None
    schedule.forget("a")
    assert schedule.due(["a"], 200.0) is None
    assert schedule.due(["a"], 200.0 + POINT_SECONDS) == "a"
