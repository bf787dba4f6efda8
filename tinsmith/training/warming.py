"""Has training's kernels compiled before the first request comes, by training passing adapters on nothing.

Knows the trainer's public face only; not which kernels there are.
"""

import logging
from collections.abc import Collection, Iterable

import numpy as np

from tinsmith.protocols import ModelCall, ModelSpec, Trainer
from tinsmith.wire.packing import TrainCall, TrainOutput

log = logging.getLogger(__name__)

_PASSING = "warm-up"
_LENGTH = 1024  # tokens of a sequence, at most


def warm_up(trainer: Trainer, ranks: Iterable[int], rows: Collection[int]) -> None:
    """One pass for each rank and number of rows. One that fails says so in the log: requests would tell the same."""
    longest = min(_LENGTH, trainer.capabilities().max_context)
    for rank in ranks:
        trainer.add(_PASSING, ModelSpec(rank, 0, train_unembed=False))
        for count in rows:
            (outcome,) = trainer.forward_backward([ModelCall(_PASSING, _nothing(count, longest))])
            if not isinstance(outcome, TrainOutput):
                log.warning("a pass of %d tokens with an adapter of rank %d failed: %s", count, rank, outcome)
        trainer.drop(_PASSING)


def _nothing(rows: int, longest: int) -> TrainCall:
    """Cross entropy of so many tokens, none of which counts."""
    offsets = np.append(np.arange(0, rows, longest, dtype=np.int64), rows)
    tokens, widths = np.zeros(rows, np.int32), np.zeros(len(offsets) - 1, np.int32)
    return TrainCall(
        "cross_entropy", {}, False, tokens, offsets, tokens, offsets, widths, {"weights": np.zeros(rows, np.float32)}
    )
