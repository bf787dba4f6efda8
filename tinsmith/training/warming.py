"""Has training's kernels compiled before the first request comes, by training passing adapters on nothing.

Knows the trainer's public face only; not which kernels there are.
"""

import logging
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from tinsmith.protocols import ModelCall, ModelSpec, Trainer
from tinsmith.wire.packing import TrainCall, TrainOutput

log = logging.getLogger(__name__)

_PASSING = "warm-up"
_LENGTH = 1024  # tokens of a sequence, at most


def warm_up(trainer: Trainer, ranks: Iterable[int], rows: Collection[int]) -> None:
    """One pass for each rank and number of rows, and one whose sequences begin alike.

    One that fails says so in the log: requests would tell the same.
    """
    capabilities = trainer.capabilities()
    longest, vocabulary = min(_LENGTH, capabilities.max_context), capabilities.vocab_size
    for rank in ranks:
        trainer.add(_PASSING, ModelSpec(rank, 0, train_unembed=False))
        calls = [_nothing(_bounds(count, longest), vocabulary) for count in rows]
        fewest = min(min(rows), 2 * longest)
        for call in (*calls, _nothing([0, fewest // 2, fewest], 1)):
            (outcome,) = trainer.forward_backward([ModelCall(_PASSING, call)])
            if not isinstance(outcome, TrainOutput):
                log.warning("a pass of %d tokens with an adapter of rank %d failed: %s", call.num_tokens, rank, outcome)
        trainer.drop(_PASSING)


def _bounds(rows: int, longest: int) -> list[int]:
    return [*range(0, rows, longest), rows]


def _nothing(bounds: Sequence[int], tokens: int) -> TrainCall:
    """Cross entropy of sequences with these boundaries, of so many different tokens, none of which counts.

    With several tokens no two sequences begin alike.
    """
    offsets, rows = np.array(bounds, np.int64), bounds[-1]
    widths = np.zeros(len(bounds) - 1, np.int32)
    tokens_T = np.repeat(np.arange(len(widths)) % tokens, np.diff(offsets)).astype(np.int32)
    weights = {"weights": np.zeros(rows, np.float32)}
    return TrainCall("cross_entropy", {}, False, tokens_T, offsets, tokens_T, offsets, widths, weights)
