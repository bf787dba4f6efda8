"""What a request asks about its prompt: logprobs of its tokens, of named targets, the top k, and alternatives.

All are of the model's own distribution (temperature 1); only the drawing of alternatives uses the request's
temperature. Knows hidden states and the head, not the cache or the batch. Hidden row i predicts prompt position i + 1.

Legend: P prompt tokens, D hidden size, R rows, V vocabulary, k asked-for width, M (row, target) pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinsmith.models import head
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, Segment
from tinsmith.sampling.decoding import ALTERNATIVE_STREAM, MASK_LOGPROB, TokenDistributions, uniforms
from tinsmith.wire.packing import SampleCall

LogSoftmax = Callable[[Tensor], Tensor]


def segments_of(parts: Iterable[tuple[Adapter | None, int]]) -> list[Segment]:
    """Segments of consecutive (adapter, rows); neighbours with the same adapter become one."""
    segments: list[Segment] = []
    row = 0
    for adapter, rows in parts:
        if segments and segments[-1].adapter is adapter:
            segments[-1].end += rows
        else:
            segments.append(Segment(adapter, row, row + rows))
        row += rows
    return segments


class PromptScores:
    """A request's prompt scores, collected chunk by chunk while the prompt runs through the model.

    `next_row` is the first hidden row that is still needed; a prefix-cache hit must not skip it.
    """

    def __init__(self, call: SampleCall) -> None:
        self._call = call
        self._end = len(call.prompt_P) - 1
        self._values = np.full(len(call.prompt_P), np.nan, np.float32)
        self._rows_M, self._targets_M, self._places_M = self._pairs()
        self.top_ids = np.zeros((len(call.prompt_P), call.topk_prompt_logprobs), np.int32)
        self.top_logprobs = np.full(self.top_ids.shape, MASK_LOGPROB, np.float32)
        self.alt_tokens = np.zeros((self._end, call.prompt_alt_tokens_k), np.int64)
        self.alt_logprobs = np.zeros(self.alt_tokens.shape, np.float32)
        first = self._rows_M[:1].tolist()
        if call.topk_prompt_logprobs:
            first.append(self._first_row)
        if call.prompt_alt_tokens_k:
            first.append(0)
        self.next_row: int = min(first, default=self._end)

    @property
    def _first_row(self) -> int:
        """Where prompt logprobs begin."""
        return self._end - (self._call.prompt_logprobs_last_n or self._end)

    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Hidden rows (ascending), targets and places in `_values` of everything that needs one logprob."""
        prompt, targets = self._call.prompt_P, self._call.target_prompt_tokens
        rows = np.arange(self._first_row if self._call.prompt_logprobs else self._end, self._end)
        if targets is None:
            return rows, prompt[rows + 1].astype(np.int64), rows + 1
        flat = targets.reshape(-1)
        cells = np.flatnonzero(flat >= 0)  # never in row 0, which belongs to prompt position 0
        self._values = np.concatenate([self._values, np.zeros(targets.size, np.float32)])
        all_rows = np.concatenate([rows, cells // targets[0].size - 1])
        all_targets = np.concatenate([prompt[rows + 1], flat[cells]]).astype(np.int64)
        places = np.concatenate([rows + 1, len(prompt) + cells])
        order = np.argsort(all_rows, kind="stable")
        return all_rows[order], all_targets[order], places[order]

    def wanted(self, start: int, end: int) -> range:
        """Those of hidden rows `start` to `end` that are still to be scored."""
        return range(max(start, self.next_row), max(start, self.next_row, min(end, self._end)))

    def targets(self, rows: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hidden rows (counted from the first of `rows`, ascending) and tokens whose logprobs are wanted."""
        first, last = np.searchsorted(self._rows_M, [rows.start, rows.stop])
        return self._rows_M[first:last] - rows.start, self._targets_M[first:last]

    def put(self, rows: range, logprobs_M: NDArray[np.float32]) -> None:
        """Takes the logprobs that `targets(rows)` asked for."""
        first, last = np.searchsorted(self._rows_M, [rows.start, rows.stop])
        self._values[self._places_M[first:last]] = logprobs_M
        self.next_row = rows.stop

    @property
    def needs_logits(self) -> bool:
        return bool(self._call.topk_prompt_logprobs or self._call.prompt_alt_tokens_k)

    @property
    def draws(self) -> bool:
        return bool(self._call.prompt_alt_tokens_k)

    def put_logits(self, start: int, logits_RV: Tensor, log_softmax: LogSoftmax | None = None) -> None:
        """Takes top-k and alternatives from the logits of hidden rows `start` to `start + R`.

        `log_softmax` is what the distributions use instead of torch's.
        """
        own = TokenDistributions(logits_RV, np.ones(len(logits_RV)), log_softmax)
        rows = slice(max(start, self._first_row) + 1, start + len(logits_RV) + 1)
        k = self._call.topk_prompt_logprobs
        if k and rows.start < rows.stop:
            ids, logprobs = own.top(range(rows.start - 1 - start, len(logits_RV)), k)
            self.top_ids[rows], self.top_logprobs[rows] = ids.cpu().numpy(), logprobs.cpu().numpy()
        if self._call.prompt_alt_tokens_k:
            self._draw_alternatives(start, logits_RV, own, log_softmax)

    def _draw_alternatives(
        self, start: int, logits_RV: Tensor, own: TokenDistributions, log_softmax: LogSoftmax | None
    ) -> None:
        call, count, asked = self._call, len(logits_RV), own
        if call.temperature != 1:
            asked = TokenDistributions(logits_RV, np.full(count, call.temperature), log_softmax)
        positions = range(start, start + count)
        for draw in range(call.prompt_alt_tokens_k):
            uniform_R = uniforms([call.seed] * count, ALTERNATIVE_STREAM, positions, [draw] * count)
            tokens_R = asked.choose(uniform_R, np.full(count, -1), np.ones(count))
            self.alt_tokens[start : start + count, draw] = tokens_R.cpu().numpy()
            self.alt_logprobs[start : start + count, draw] = own.logprobs(tokens_R).cpu().numpy()

    def extras(self) -> dict[str, NDArray[Any]]:
        """The arrays of `SampleOutput.extras` that were asked for."""
        call, length = self._call, len(self._call.prompt_P)
        extras: dict[str, NDArray[Any]] = {}
        if call.prompt_logprobs:
            extras["prompt_logprobs"] = self._values[:length]
        if call.topk_prompt_logprobs:
            extras |= {"topk_prompt_ids": self.top_ids, "topk_prompt_logprobs": self.top_logprobs}
        if call.target_prompt_tokens is not None:
            extras["target_prompt_logprobs"] = self._values[length:].reshape(call.target_prompt_tokens.shape)
        if call.prompt_alt_tokens_k:
            extras |= {"alt_tokens": self.alt_tokens, "alt_logprobs": self.alt_logprobs}
        return extras


@dataclass(frozen=True, slots=True)
class ScoringJob:
    """Hidden rows `rows` of one request, found from row `row` of the batch on."""

    scores: PromptScores
    adapter: Adapter | None
    row: int
    rows: range


def score(model: BaseModel, hidden_TD: Tensor, jobs: Sequence[ScoringJob], module: nn.Module | None) -> None:
    """Fills in the scores of all jobs, whose rows ascend and are sorted by adapter as the batch is."""
    batch_rows, rows_M, targets_M = [], [], []
    offset = 0
    for job in jobs:
        rows, targets = job.scores.targets(job.rows)
        batch_rows.append(np.arange(job.row, job.row + len(job.rows)))
        rows_M.append(rows + offset)
        targets_M.append(targets)
        offset += len(job.rows)
    device = hidden_TD.device
    index = torch.from_numpy(np.concatenate(batch_rows)).to(device)
    segments = segments_of((job.adapter, len(job.rows)) for job in jobs)
    logprobs_M = head.target_logprobs(
        model,
        hidden_TD[index],
        segments,
        torch.from_numpy(np.concatenate(rows_M)).to(device),
        torch.from_numpy(np.concatenate(targets_M)).to(device),
        module,
    )
    parts = np.split(logprobs_M.cpu().numpy(), np.cumsum([len(targets) for targets in targets_M])[:-1])
    for job, logprobs in zip(jobs, parts, strict=True):
        if job.scores.needs_logits:
            _score_logits(model, hidden_TD, job, module)
        job.scores.put(job.rows, logprobs)


def _score_logits(model: BaseModel, hidden_TD: Tensor, job: ScoringJob, module: nn.Module | None) -> None:
    exact = model.exact if module is None else None
    # Torch cuts its sums over some rows' weights by how many rows there are.
    chunk = 1 if exact and job.scores.draws else max(8, head.CHUNK_ELEMENTS // model.vocab_size)
    for start in range(0, len(job.rows), chunk):
        count = min(chunk, len(job.rows) - start)
        hidden_RD = hidden_TD[job.row + start : job.row + start + count]
        logits_RV = head.logits(model, hidden_RD, [Segment(job.adapter, 0, count)], module)
        job.scores.put_logits(job.rows.start + start, logits_RV, exact.log_softmax if exact else None)
