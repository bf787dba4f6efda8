"""When models get recovery points: each now and then, and all together in a small share of the engine's time.

A pure schedule, told of the time by the loop that writes the points. The more a model's state weighs, and the more
models train, the longer the logs behind the points grow, instead of training getting slower.
"""

from collections.abc import Iterable

POINT_SECONDS = 60.0  # between two points of a model, at least
SHARE = 0.025  # of the time, for writing points
_LOOK_SECONDS = 1.0  # how often to look for a model whose point is due


class PointSchedule:
    """Picks the models to be written one by one, the longest waiting first. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # model → its last point, or when it was first seen without one
        self._free_at = 0.0

    def due(self, moved: Iterable[str], now: float) -> str | None:
        """Which of the models that have moved since their last point to write now, if any."""
        if now < self._free_at:
            return None
        self._free_at = now + _LOOK_SECONDS
        waiting = {model_id: self._since.setdefault(model_id, now) for model_id in moved}
        model_id = min(waiting, key=waiting.__getitem__, default=None)
        return model_id if model_id is not None and now - waiting[model_id] >= POINT_SECONDS else None

    def wrote(self, model_id: str, began: float, now: float) -> None:
        """A point was written (or could not be) from `began` to `now`: what it took is earned back by waiting."""
        self._since[model_id] = now
        self._free_at = now + (now - began) * (1 / SHARE - 1)

    def forget(self, model_id: str) -> None:
        """A model that is gone."""
        self._since.pop(model_id, None)
