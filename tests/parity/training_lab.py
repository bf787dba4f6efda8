"""Running a trainer in tests: models whose weights show mistakes, their gradients, and what holds of any training."""

from collections.abc import Sequence

import numpy as np
import torch

from tests.parity.reference import Datum, random_datum, warm
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainOutput

FULL = ModelSpec(rank=0, seed=0)


def add(trainer: TorchTrainer, model_id: str, spec: ModelSpec) -> None:
    """A model; if it is an adapter, with a B that is not zero."""
    trainer.add(model_id, spec)
    if spec.is_lora:
        warm(trainer._models[model_id].weights, seed=spec.seed)


def gradient(trainer: TorchTrainer, model_id: str) -> torch.Tensor:
    return trainer._models[model_id].weights.require_grad().clone()


def outputs(trainer: TorchTrainer, *calls: ModelCall) -> list[TrainOutput]:
    """Of calls of which none fails."""
    results = trainer.forward_backward(calls)
    assert all(isinstance(result, TrainOutput) for result in results), results
    return results


def data_of(seed: int, lengths: Sequence[int] = (9, 1, 17)) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [random_datum(rng, length) for length in lengths]


def steps_of(seed: int, steps: int, lengths: Sequence[int] = (9, 1, 17, 4)) -> list[list[Datum]]:
    rng = np.random.default_rng(seed)
    return [[random_datum(rng, length) for length in lengths] for _ in range(steps)]
