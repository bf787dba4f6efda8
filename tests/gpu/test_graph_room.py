"""Captured decoding steps where memory has no room for all of them: those of the largest batches are given up."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.device import DEVICE, DTYPE
from tests.parity.conftest import load
from tinsmith.sampling.graphs import DecodeGraphs, Kind
from tinsmith.sampling.kv_cache import KVCache

pytestmark = pytest.mark.gpu


class Cramped(DecodeGraphs):
    """With room for steps of so many rows in all, as long as nothing is given up; captures nothing."""

    room = 0

    def _captured(self, kind: Kind) -> Callable[[], object]:
        if sum(other.rows for other in self._steps) + kind.rows > self.room:
            raise torch.OutOfMemoryError(f"no room for {kind.rows}")
        return lambda: None


@pytest.fixture
def cramped(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Cramped:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = load(folders("qwen3-tied"), DTYPE, DEVICE)
    cache = KVCache(model.cache_shape, num_blocks=64, block_size=16, dtype=DTYPE, device=model.device)
    layers: Any = None  # which only steps would need
    graphs = Cramped(model, layers, cache, max_rows=16, max_context=128, max_rank=8, capture=False)
    graphs._captures = True
    return graphs


@pytest.mark.parametrize(
    ("room", "left"), [(1000, [1, 2, 4, 8, 12, 16]), (84, [1, 2, 4, 8, 12]), (11, [1, 2]), (2, [1])]
)
def test_the_largest_batches_go_without_captured_steps(
    room: int, left: list[int], cramped: Cramped, caplog: pytest.LogCaptureFixture
) -> None:
    cramped.room = room
    with caplog.at_level(logging.WARNING):
        cramped.warm_up(lambda _: None)
    assert cramped._sizes == left
    assert {kind.rows for kind in cramped._steps} == set(left)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 6 - len(left)
    assert not told or f"more than {left[-1]} are decoded step by step" in told[-1]


def test_no_room_for_a_single_row_is_an_error(cramped: Cramped) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        cramped.warm_up(lambda _: None)
