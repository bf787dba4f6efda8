"""One packed forward pass: rows of many samples in, hidden states out, and from those scores and next tokens.

Knows samples and the model; not who is admitted, nor what becomes of a token. Rows of the same adapter lie side by
side, decoding rows and prefill chunks alike.

Legend: T rows of the batch, D hidden size, R rows that get a token, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tinsmith.models import head
from tinsmith.models.invariant import LEAST_ROWS
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Segment
from tinsmith.models.quick import QuickLayers
from tinsmith.models.transfer import on_device
from tinsmith.sampling.attention import PagedAttention
from tinsmith.sampling.decoding import SAMPLE_STREAM, TokenDistributions, uniforms
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.lanes import Lanes, Span
from tinsmith.sampling.paged_rows import PagedRows
from tinsmith.sampling.recurrent import StateStore
from tinsmith.sampling.requests import NextToken, Sample
from tinsmith.sampling.scoring import ScoringJob, score, segments_of

Ready = Sequence[tuple["Work", Sequence[Sample]]]
"""Works that have no rows left, and the samples that go on from the last row of each."""

NextTokens = Callable[[BaseModel, Ready, Tensor], Iterator[NextToken]]


class PassLayers(Protocol):
    """Stands in for a base model between its embedding and its head."""

    def pass_of(self, spans: Sequence[Span], tokens_T: Tensor, segments: Sequence[Segment]) -> Tensor:
        """[T, D], of the rows of these spans, which follow each other without gaps; fills the cache."""


@dataclass(slots=True, eq=False)
class Work:
    """What one sample runs in this step: its next `rows` tokens, which are batch rows `start` to `start + rows`."""

    sample: Sample
    rows: int
    start: int = 0


def forward(
    model: BaseModel,
    cache: KVCache,
    lanes: Lanes | PagedRows,
    states: StateStore,
    works: Sequence[Work],
    layers: PassLayers | None = None,
) -> Tensor:
    """Hidden states [T, D] of all works' rows, sorted by snapshot, with the same base weights; fills the cache.

    `layers` compute faster what the base model would.
    """
    tokens: list[int] = []
    positions: list[int] = []
    spans = []
    for work in works:
        sample, past = work.sample, work.sample.computed
        work.start = len(tokens)
        tokens += sample.slice(past, past + work.rows)
        positions += range(past, past + work.rows)
        spans.append(Span(sample.key, work.start, work.rows, past, sample.blocks))
    module = works[0].sample.request.snapshot.module
    if layers is not None and module is None:
        tokens_T = on_device(np.array(tokens), model.device)
        return layers.pass_of(spans, tokens_T, segments_of((work.sample.adapter, work.rows) for work in works))
    quick = model.quick if module is None and isinstance(lanes, Lanes) else None
    same_bits = quick.is_packed if quick else model.dtype == torch.bfloat16
    padding = 0 if same_bits else max(0, LEAST_ROWS - len(tokens))  # the logits need it in any case
    segments = segments_of((work.sample.adapter, work.rows) for work in works)
    segments[-1].end += padding
    attention = PagedAttention(cache, lanes, states, spans, len(tokens) + padding)
    tokens_T = torch.tensor(tokens + [0] * padding, device=model.device)
    positions_T = torch.tensor(positions + [0] * padding, device=model.device)
    if quick is not None:
        return quick.hidden(tokens_T, positions_T, segments, attention, model.stacks.of(segments))
    return model.hidden(tokens_T, positions_T, segments, attention, module)


def score_prompts(model: BaseModel, works: Sequence[Work], hidden_TD: Tensor) -> None:
    """Scores those rows whose requests asked for it. Call before the works' samples advance."""
    jobs = []
    for work in works:
        sample = work.sample
        scores, past = sample.request.scores, sample.computed
        rows = scores.wanted(past, past + work.rows)
        if rows:
            jobs.append(ScoringJob(scores, sample.adapter, work.start + rows.start - past, rows))
    if jobs:
        score(model, hidden_TD, jobs, works[0].sample.request.snapshot.module)


def next_tokens(
    model: BaseModel, ready: Ready, hidden_TD: Tensor, quick: QuickLayers | None = None
) -> Iterator[NextToken]:
    """A token for each sample that goes on from the last row of a work.

    `quick` computes the logits of the base model and its adapters faster than the shared head.
    """
    samples = [sample for _, group in ready for sample in group]
    logits_RV = None if quick is None else _quick_logits(model, ready, hidden_TD, quick)
    if logits_RV is None:
        logits_RV = last_logits(model, ready, hidden_TD)
    if len(samples) > len(ready):
        index = [row for row, (_, group) in enumerate(ready) for _ in group]
        logits_RV = logits_RV[torch.tensor(index, device=logits_RV.device)]
    calls = [sample.request.call.call for sample in samples]
    distributions = TokenDistributions(logits_RV, np.array([call.temperature for call in calls]))
    uniform_R = uniforms(
        [call.seed for call in calls],
        SAMPLE_STREAM,
        [sample.index for sample in samples],
        [len(sample.tokens) for sample in samples],
    )
    tokens_R = distributions.choose(
        uniform_R, np.array([call.top_k for call in calls]), np.array([call.top_p for call in calls])
    )
    tokens, logprobs = tokens_R.tolist(), distributions.logprobs(tokens_R).tolist()
    tops = top_tokens(distributions, [call.topk_sample_logprobs for call in calls])
    for row, sample in enumerate(samples):
        yield NextToken(sample, tokens[row], logprobs[row], bool(distributions.finite_R[row]), *tops.get(row, ()))


def _quick_logits(model: BaseModel, ready: Ready, hidden_TD: Tensor, quick: QuickLayers) -> Tensor | None:
    """fp32 [R, V] of the works' last rows; None where only the shared head will do."""
    if ready[0][0].sample.request.snapshot.module is not None:
        return None
    rows = [work.start + work.rows - 1 for work, _ in ready]
    in_order = rows == list(range(len(hidden_TD)))
    adapters = model.stacks.of(segments_of((work.sample.adapter, 1) for work, _ in ready))
    return quick.logits(hidden_TD if in_order else hidden_TD[torch.tensor(rows)], adapters)


def last_logits(model: BaseModel, ready: Ready, hidden_TD: Tensor) -> Tensor:
    """fp32 [R, V] of the works' last rows."""
    rows = [work.start + work.rows - 1 for work, _ in ready]
    padding = max(0, LEAST_ROWS - len(rows))
    segments = segments_of((work.sample.adapter, 1) for work, _ in ready)
    segments[-1].end += padding
    index = torch.tensor(rows + rows[-1:] * padding, device=hidden_TD.device)
    module = ready[0][0].sample.request.snapshot.module
    return head.logits(model, hidden_TD[index], segments, module)[: len(rows)]


def top_tokens(distributions: TokenDistributions, widths: Sequence[int]) -> dict[int, tuple[list[int], list[float]]]:
    """The most likely ids and their logprobs of the rows that want any, as many as each wants."""
    rows = [row for row, width in enumerate(widths) if width]
    if not rows:
        return {}
    ids, logprobs = (part.tolist() for part in distributions.top(rows, max(widths)))
    return {row: (ids[position][: widths[row]], logprobs[position][: widths[row]]) for position, row in enumerate(rows)}


def attention_reach(model: BaseModel) -> int | None:
    """How many tokens of past cost a row as much as its own products; None on a GPU, where a chunk is short anyway."""
    if model.device.type != "cpu":
        return None
    shape = model.cache_shape
    products = sum(parameter.numel() for parameter in model.module.get_decoder().layers.parameters())
    attended = len(shape.layers) * model.config.num_attention_heads * (shape.key_dim + shape.value_dim)
    return max(1, products // attended)
