"""What training does before the first request comes, on models without kernels, where it changes nothing."""

import logging
from collections.abc import Callable

import pytest

from tests.parity.conftest import NewTrainer
from tinsmith.protocols import ModelSpec
from tinsmith.training.batching import cut
from tinsmith.training.trainer import TorchTrainer
from tinsmith.training.warming import warm_up


def shapes_of_passes(trainer: TorchTrainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Filled with (rank, rows) of every call that the trainer runs from now on."""
    seen: list[tuple[int, int]] = []
    run: Callable[..., object] = trainer.forward_backward

    def noting(calls: list, *rest: object) -> object:  # type: ignore[type-arg]
        for each in calls:
            rows = sum(piece.rows for piece in cut(0, each.call, 10**6, share=True))
            seen.append((trainer._find(each.model_id).weights.spec.rank, rows))
        return run(calls, *rest)

    monkeypatch.setattr(trainer, "forward_backward", noting)
    return seen


def test_every_rank_trains_on_every_number_of_rows_and_nothing_stays(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(max_adapters=1)
    seen = shapes_of_passes(trainer, monkeypatch)
    with caplog.at_level(logging.WARNING):
        warm_up(trainer, [4, 32], [100, 300])  # longer than the model's context, and than a pass
    assert seen == [(rank, rows) for rank in (4, 32) for rows in (100, 300, 51)]
    assert not caplog.records
    trainer.add("first", ModelSpec(8, 0))  # there is room for the only one


def test_a_pass_that_fails_is_told_and_does_not_end_the_start(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer()

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(trainer, "_pass", out_of_memory)
    with caplog.at_level(logging.WARNING):
        warm_up(trainer, [8], [20])
    assert "a pass of 20 tokens with an adapter of rank 8 failed" in caplog.text


def test_without_kernels_nothing_is_warmed_up(new_trainer: NewTrainer) -> None:
    said: list[str] = []
    new_trainer().warm_up(said.append)
    assert said == []
