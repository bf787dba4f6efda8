"""Bursts of tokens that are on their way from a GPU while the host goes on with its books.

Knows which samples they are for, and not how they are computed. Legend: N rows, s steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.sampling.requests import NextToken, Sample


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A burst under way: row n continues `samples[n]` from position `starts[n]` on, by so many steps.

    `tables[n]` is the very list of the sample's blocks, which grows with it: a sample that begins again has another.
    """

    samples: Sequence[Sample]
    tables: Sequence[list[int]]
    starts: list[int]
    steps: int
    rows: int
    step: Callable[[], object]
    chosen_Ns: Tensor
    logprobs_Ns: Tensor
    landed: "torch.cuda.Event | None"

    def aboard(self) -> dict[int, Sample]:
        """The samples, by row, that still run where they ran then, and have got no token from elsewhere since."""
        rows = enumerate(zip(self.samples, self.tables, self.starts, strict=True))
        return {
            row: sample for row, (sample, table, start) in rows if sample.blocks is table and sample.computed == start
        }

    def tokens(self) -> Iterator[NextToken]:
        """A token of every sample, then of every sample again, and so on. Waits for the burst to end."""
        if self.landed is not None:
            self.landed.synchronize()
        finite_Ns = self.logprobs_Ns.isfinite()
        for step in zip(
            *(part_Ns.T.tolist() for part_Ns in (self.chosen_Ns, self.logprobs_Ns, finite_Ns)), strict=True
        ):
            for sample, *new in zip(self.samples, *step, strict=True):
                yield NextToken(sample, *new)
