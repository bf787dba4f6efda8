"""What a deterministic sampler uses on a GPU: the layers of `models.exact` over the paged cache, also as graphs.

Tokens are chosen by one rule for each request, whatever pass its rows are in: plain ones by the kernel of the graphs,
those with top-k, top-p or a list of the top one row at a time. Implements what `cuda_decoding` has for other samplers.
Needs Triton.

Shapes: `T` rows of a pass, `N` rows of a graph, `R` rows that get a token, `V` vocabulary, `W` blocks of the longest
sequence.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmith.models.adapter_table import MOST_RANKS
from tinsmith.models.exact import ExactLayers
from tinsmith.models.exact_attention import Paging, RowTiles, SingleRows, row_tiles
from tinsmith.models.exact_products import TILE_ROWS, CacheRows, ExactAdapters, adapters_of
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Segment
from tinsmith.models.transfer import on_device
from tinsmith.protocols import ModelSpec
from tinsmith.sampling.batch import Ready, last_logits, top_tokens
from tinsmith.sampling.cuda_kernels import RowState, choose_tokens
from tinsmith.sampling.decoding import LARGEST_INVERSE, SAMPLE_STREAM, TokenDistributions, uniforms
from tinsmith.sampling.graphs import DecodeGraphs, Kind
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.lanes import Span, block_tables
from tinsmith.sampling.requests import NextToken, Sample

_WARM_ROWS = (1, 70, 300, 2048)  # of which products are cut differently


class CachedRows:
    """Rows of a pass over the paged cache, which takes their keys and values; implements `exact.ExactAttention`."""

    def __init__(self, cache: KVCache, slots_T: Tensor, paging: Paging, spans: "_Spans | SingleRows") -> None:
        self._cache, self._slots_T, self._paging, self._spans = cache, slots_T, paging, spans

    def cache(self, layer: int) -> tuple[CacheRows, Paging]:
        keys, values = (part.flatten(1) for part in self._cache.slots(self._cache.places[layer]))
        return CacheRows(keys, values, self._slots_T), self._paging

    def tiles(self, sharing: int) -> RowTiles | SingleRows:
        return self._spans if isinstance(self._spans, SingleRows) else self._spans.tiles(sharing)


class _Spans:
    """Several rows of each sequence, as tiles."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self._rows = [(span.start, span.count, span.past) for span in spans]
        self._device = device
        self._tiles: dict[int, RowTiles] = {}

    def tiles(self, sharing: int) -> RowTiles:
        if sharing not in self._tiles:
            self._tiles[sharing] = row_tiles(self._rows, sharing, self._device)
        return self._tiles[sharing]


def single_rows(cache: KVCache, tables_NW: Tensor, positions_N: Tensor, end: int) -> CachedRows:
    """One row of each sequence, its newest; sequence n's blocks are `tables_NW[n]`, and no row is at `end`."""
    size = cache.block_size
    blocks_N = tables_NW.gather(1, (positions_N // size)[:, None])[:, 0].long()
    slots_N = blocks_N * size + positions_N % size
    return CachedRows(cache, slots_N, Paging(tables_NW, size), SingleRows(positions_N, end))


class ExactSampling:
    """The exact layers of a base model over one cache; as `cuda_layers.CudaLayers`."""

    def __init__(self, model: BaseModel, layers: ExactLayers, cache: KVCache) -> None:
        self.layers, self.places = layers, layers.places
        self._model, self._cache = model, cache

    def pass_of(self, spans: Sequence[Span], tokens_T: Tensor, segments: Sequence[Segment]) -> Tensor:
        """[T, D], of the rows of these spans, which follow each other without gaps."""
        device, size = self._model.device, self._cache.block_size
        tables = np.array(block_tables(spans), np.int32)
        positions = np.concatenate([np.arange(span.past, span.past + span.count) for span in spans])
        sequences = np.repeat(np.arange(len(spans)), [span.count for span in spans])
        slots = tables.astype(np.int64)[sequences, positions // size] * size + positions % size
        tables_NW, slots_T, positions_T = (on_device(each, device) for each in (tables, slots, positions))
        rows = CachedRows(self._cache, slots_T, Paging(tables_NW, size), _Spans(spans, device))
        return self.layers.rows_through(tokens_T, positions_T, rows, adapters_of(self.layers.places, segments, device))

    def warm_up(self, rank: int) -> None:
        """Compiles the kernels of prompts; writes to the cache's scratch block."""
        device, block = self._model.device, self._cache.scratch_slot // self._cache.block_size
        adapter = self._model.new_adapter(ModelSpec(min(rank, MOST_RANKS), 0))
        weight_VD = self._model.module.get_output_embeddings().weight
        for rows in _WARM_ROWS:
            blocks = [block] * -(-rows // self._cache.block_size)
            tokens_T = torch.zeros(rows, dtype=torch.int64, device=device)
            segments = [Segment(adapter, 0, rows)]
            hidden_TD = self.pass_of([Span(0, 0, rows, 0, blocks)], tokens_T, segments)
            self.layers.log_softmax(self.layers.logits_of(weight_VD, hidden_TD, segments))


class ExactGraphs(DecodeGraphs):
    """Captured steps of the exact layers."""

    def __init__(self, model: BaseModel, sampling: ExactSampling, cache: KVCache, **limits: Any) -> None:
        # What the base class does with the layers is done otherwise here, but for asking whom their kernels serve.
        super().__init__(model, sampling, cache, **limits)  # type: ignore[arg-type]
        self._exact: dict[Kind, ExactAdapters] = {}
        self._sampling = sampling

    def _tiles(self, kind: Kind) -> ExactAdapters:  # type: ignore[override]
        if kind not in self._exact:
            tiles = min(kind.rows, -(-kind.rows // TILE_ROWS) + kind.adapters + 1)  # one more for rows without any
            places, device = self._sampling.layers.places, self._model.device
            self._exact[kind] = ExactAdapters(places, tiles=tiles, rank=kind.rank, device=device)
            self._exact[kind].set([Segment(None, 0, kind.rows)])
        return self._exact[kind]

    def _compute(self, kind: Kind) -> None:
        state, layers = self._state.first(kind.rows), self._sampling.layers
        rows = single_rows(self._cache, self._tables_NW[: kind.rows], state.positions_N, self._room)
        hidden_ND = layers.rows_through(state.tokens_N, state.positions_N, rows, self._tiles(kind))
        logits_NV = layers.logits(self._model.module.get_output_embeddings().weight, hidden_ND, self._tiles(kind))
        steps_N1 = state.steps_N.clone()[:, None]
        choose_tokens(logits_NV, state)
        logprobs_N1 = layers.logprobs_at(logits_NV, state.tokens_N, state.inverse_N)[:, None]
        state.logprobs_Ns.scatter_(1, steps_N1, logprobs_N1)


def exact_next_tokens(model: BaseModel, ready: Ready, hidden_TD: Tensor) -> Iterator[NextToken]:
    """A token for each sample that goes on from the last row of a work."""
    logits_RV = last_logits(model, ready, hidden_TD)
    pairs = [(row, sample) for row, (_, group) in enumerate(ready) for sample in group]
    plain = [(row, sample) for row, sample in pairs if DecodeGraphs.is_plain(sample)]
    if plain:
        index = torch.tensor([row for row, _ in plain], device=logits_RV.device)
        yield from _drawn(logits_RV[index], [sample for _, sample in plain])
    for row, sample in pairs:
        if not DecodeGraphs.is_plain(sample):
            yield _drawn_alone(logits_RV[row : row + 1], sample)


def _drawn(logits_RV: Tensor, samples: Sequence[Sample]) -> Iterator[NextToken]:
    """As a graph's step does it."""
    rows, device = len(samples), logits_RV.device
    state = RowState.empty(rows, 1, device)
    calls = [sample.request.call.call for sample in samples]
    temperature = np.array([call.temperature for call in calls])
    greedy = temperature == 0
    inverse = np.minimum(1 / np.where(greedy, 1.0, np.maximum(temperature, 1 / LARGEST_INVERSE)), LARGEST_INVERSE)
    seeds = np.array([call.seed & 0xFFFFFFFFFFFFFFFF for call in calls], np.uint64).view(np.int64)
    counts, indices = [len(sample.tokens) for sample in samples], [sample.index for sample in samples]
    integers = np.array([counts, indices, seeds.tolist(), greedy.tolist()], np.int64)
    targets = (state.counts_N, state.samples_N, state.seeds_N, state.greedy_N)
    for target, source in zip(targets, torch.from_numpy(integers).to(device), strict=True):
        target.copy_(source)
    state.inverse_N.copy_(torch.from_numpy(inverse.astype(np.float32)))
    choose_tokens(logits_RV, state)
    logprobs = ExactLayers.logprobs_at(logits_RV, state.tokens_N, state.inverse_N).tolist()
    for sample, token, logprob in zip(samples, state.tokens_N.tolist(), logprobs, strict=True):
        yield NextToken(sample, token, logprob, bool(np.isfinite(logprob)))


def _drawn_alone(logits_1V: Tensor, sample: Sample) -> NextToken:
    """A row whose distribution is cut, or whose likeliest tokens are asked for."""
    call = sample.request.call.call
    distribution = TokenDistributions(logits_1V, np.array([call.temperature]), ExactLayers.log_softmax)
    uniform_R = uniforms([call.seed], SAMPLE_STREAM, [sample.index], [len(sample.tokens)])
    token_R = distribution.choose(uniform_R, np.array([call.top_k]), np.array([call.top_p]))
    tops = top_tokens(distribution, [call.topk_sample_logprobs])
    logprob = distribution.logprobs(token_R).item()
    return NextToken(sample, int(token_R.item()), logprob, bool(distribution.finite_R[0]), *tops.get(0, ()))
