"""Decoding on a GPU as captured graphs: several tokens of every running sequence without a word from the host.

A graph holds one step of so many rows: the layers, the head, the choice of a token, and the preparation of the next
step. Replaying it some times in a row is a burst. Graphs are captured beforehand, for a few sizes of batch and for
the adapters that may come; a batch that fits none of them runs the same kernels one by one.

Rows of ended sequences run on to the end of a burst; what they compute is dropped. A burst can begin before the tokens
of the one before it are known to the host, so that the device need not wait for the host's books. Knows samples and
their blocks; not who is admitted, nor what becomes of a token.

Legend: N rows of a graph, W blocks of the longest sequence.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tinsmith.models.head import full_product
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import AdaptersInTurn, Segment
from tinsmith.models.transfer import on_device
from tinsmith.sampling.adapter_tiles import TILE_ROWS, AdapterTiles, TileSizes
from tinsmith.sampling.cuda_kernels import RowState, choose_tokens
from tinsmith.sampling.cuda_layers import CudaLayers, DecodingRows, PassAdapters
from tinsmith.sampling.decoding import LARGEST_INVERSE
from tinsmith.sampling.flights import Flight
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.requests import Sample
from tinsmith.sampling.scoring import segments_of

log = logging.getLogger(__name__)

BURST = 8
"""Steps between two looks of the host, at most: what a new request may have to wait for."""

_SMALL_RANK = 32
_FEW_ADAPTERS, _MOST_ADAPTERS = 8, 64
_WARM_RUNS = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """What a graph is for: so many rows, and at most so many adapters (0: none) up to a rank."""

    rows: int
    adapters: int
    rank: int


class DecodeGraphs:
    """The graphs of one base model, and the memory that they read and write."""

    def __init__(
        self,
        model: BaseModel,
        layers: CudaLayers,
        cache: KVCache,
        *,
        max_rows: int,
        max_context: int,
        max_rank: int,
        capture: bool = True,
    ) -> None:
        """Without `capture` every step runs its kernels one by one."""
        self._model, self._layers, self._cache = model, layers, cache
        self._sizes = _sizes_up_to(max_rows)
        self._max_rank = -(-max_rank // 8) * 8
        self._captures = capture
        most, device = self._sizes[-1], model.device
        self._state = RowState.empty(most, BURST, device)
        self._scratch = cache.scratch_slot // cache.block_size
        width = -(-(max_context + BURST) // cache.block_size)  # also for what ended sequences run on
        self._room = width * cache.block_size
        self._tables_NW = torch.full((most, width), self._scratch, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host_tables = [torch.empty(most, width, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._adapters: dict[Kind, AdapterTiles] = {}
        self._steps: dict[Kind, Callable[[], object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    @property
    def most_steps(self) -> int:
        return BURST

    @property
    def ranks(self) -> list[int]:
        """For whose adapters, or smaller ones, graphs are captured."""
        return sorted({min(_SMALL_RANK, self._max_rank), self._max_rank})

    def warm_up(self, on_progress: Callable[[str], None]) -> None:
        """Captures every graph; seconds, with more of them for more rows.

        Where memory has no room for all, the largest batches are decoded without. Raises torch.OutOfMemoryError if it
        has no room for a single row's.
        """
        kinds = [Kind(rows, adapters, rank) for rows in self._sizes for adapters, rank in self._choices(rows)]
        for number, kind in enumerate(sorted(kinds, key=lambda kind: -kind.rows), 1):
            on_progress(f"preparing decoding steps, {number} of {len(kinds)}")
            while kind.rows <= self._sizes[-1] and not self._prepare(kind):
                self._give_up_largest()

    def _prepare(self, kind: Kind) -> bool:
        """Captures a graph; False if memory has no room for it beside those of other sizes."""
        try:
            self._step(kind)
        except torch.OutOfMemoryError:
            if len(self._sizes) == 1:
                raise
            return False
        return True

    def _give_up_largest(self) -> None:
        largest = self._sizes.pop()
        log.warning(
            "memory has no room for captured steps of %d sequences: more than %d are decoded step by step, more slowly",
            largest,
            self._sizes[-1],
        )
        self._steps = {kind: step for kind, step in self._steps.items() if kind.rows < largest}
        if self._captures:
            torch.cuda.empty_cache()

    @staticmethod
    def is_plain(sample: Sample) -> bool:
        """Whether a sample's distribution is used as it is, and nothing else of it is asked for."""
        call = sample.request.call.call
        return call.top_k == -1 and call.top_p == 1 and not call.topk_sample_logprobs

    def fits(self, sample: Sample) -> bool:
        """Whether a sample's next tokens can be decoded here: whatever is not top-k, top-p or a list of the top."""
        adapter = sample.adapter
        served = adapter is None or (adapter.spec.rank <= self._max_rank and self._layers.places.are_aligned(adapter))
        return self.is_plain(sample) and served and sample.computed + BURST <= self._room

    def fit_together(self, samples: Sequence[Sample]) -> bool:
        """Whether samples that fit are few enough, and of few enough adapters."""
        return len(samples) <= self._sizes[-1] and len({sample.adapter for sample in samples}) <= _MOST_ADAPTERS

    def launch(self, samples: Sequence[Sample], steps: int) -> Flight:
        """Starts a burst of samples that fit together, sorted by snapshot; all have blocks for so many more tokens."""
        rows = next(size for size in self._sizes if size >= len(samples))
        segments = segments_of((sample.adapter, 1) for sample in samples)
        kind = self._kind(rows, segments)
        step = self._step(kind)
        if kind.rank:
            self._tiles(kind).set(segments)
        self._load(samples, rows)
        starts = [sample.computed for sample in samples]
        self._load_tables([sample.blocks for sample in samples], rows, max(starts) + steps)
        return self._fly(samples, [sample.blocks for sample in samples], starts, steps, rows, step)

    def can_follow(self, flight: Flight, steps: int) -> bool:
        """Whether tables have room for a further burst, also of those of its samples that have ended."""
        return max(flight.starts) + flight.steps + steps <= self._room

    def follow(self, flight: Flight, alive: Collection[int], steps: int) -> Flight:
        """Starts the next burst of the same rows, before anybody has seen the tokens of this one.

        The samples in the rows `alive` have blocks for both; those in other rows run on in the scratch block.
        """
        starts = [start + flight.steps for start in flight.starts]
        blocks = [sample.blocks if row in alive else [] for row, sample in enumerate(flight.samples)]
        idle = np.array([row for row in range(flight.rows) if row not in alive], np.int64)
        self._state.positions_N.index_fill_(0, on_device(idle, self._model.device), 0)  # nothing is attended to there
        self._state.steps_N.zero_()
        self._load_tables(blocks, flight.rows, max(starts) + steps)
        return self._fly(flight.samples, flight.tables, starts, steps, flight.rows, flight.step)

    def _fly(
        self,
        samples: Sequence[Sample],
        tables: Sequence[list[int]],
        starts: list[int],
        steps: int,
        rows: int,
        step: Callable[[], object],
    ) -> Flight:
        for _ in range(steps):
            step()
        results = (self._state.chosen_Ns[: len(samples), :steps], self._state.logprobs_Ns[: len(samples), :steps])
        chosen_Ns, logprobs_Ns = (_on_host(part_Ns) for part_Ns in results)
        landed = None
        if self._model.device.type == "cuda":
            landed = torch.cuda.Event()
            landed.record()
        return Flight(samples, tables, starts, steps, rows, step, chosen_Ns, logprobs_Ns, landed)

    def _choices(self, rows: int) -> list[tuple[int, int]]:
        """Adapters and their rank for which graphs of so many rows are captured; the cheapest first."""
        small, large = self.ranks[0], self.ranks[-1]
        few, many = min(rows, _FEW_ADAPTERS), min(rows, _MOST_ADAPTERS)
        return list(dict.fromkeys([(0, 0), (few, small), (many, small), (many, large)]))

    def _kind(self, rows: int, segments: Sequence[Segment]) -> Kind:
        adapters = {segment.adapter for segment in segments if segment.adapter}
        rank = max((adapter.spec.rank for adapter in adapters), default=0)
        choices = self._choices(rows)
        return Kind(rows, *next(choice for choice in choices if choice[0] >= len(adapters) and choice[1] >= rank))

    def _tiles(self, kind: Kind) -> AdapterTiles:
        if kind not in self._adapters:
            tiles = min(kind.rows, -(-kind.rows // TILE_ROWS) + kind.adapters + 1)  # one more for rows without any
            sizes = TileSizes(tiles, kind.rows, kind.rank)
            self._adapters[kind] = self._layers.tiles(sizes)
        return self._adapters[kind]

    def _step(self, kind: Kind) -> Callable[[], object]:
        if kind not in self._steps:
            self._steps[kind] = self._captured(kind) if self._captures else partial(self._compute, kind)
        return self._steps[kind]

    @torch.inference_mode()
    def _captured(self, kind: Kind) -> Callable[[], object]:
        # Capturing begins with real steps. They must not write where sequences are cached.
        self._tables_NW.fill_(self._scratch)
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_RUNS):  # compiles kernels, and lets libraries take their memory
                self._state.positions_N.zero_()
                self._state.steps_N.zero_()
                self._compute(kind)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._compute(kind)
        return graph.replay

    def _compute(self, kind: Kind) -> None:
        """One step of the rows in `_state`."""
        state = self._state.first(kind.rows)
        adapters: PassAdapters = self._tiles(kind) if kind.rank else AdaptersInTurn([])
        rows = DecodingRows(self._cache, self._tables_NW[: kind.rows], state.positions_N)
        hidden_ND = self._layers.hidden(state.tokens_N, rows, adapters)
        weight_VD = self._model.module.get_output_embeddings().weight
        logits_NV = full_product(hidden_ND, weight_VD)
        if isinstance(adapters, AdapterTiles):
            adapters.add((self._model.head_linear,), (weight_VD.shape[0],), hidden_ND, logits_NV)
        choose_tokens(logits_NV, state)

    def _load(self, samples: Sequence[Sample], rows: int) -> None:
        """Gives the graphs what the samples go on from; further rows are padding, in the scratch block."""
        calls = [sample.request.call.call for sample in samples]
        padding = [0] * (rows - len(samples))
        temperature = np.array([call.temperature for call in calls] + padding)
        greedy = temperature == 0
        inverse = np.minimum(1 / np.where(greedy, 1.0, np.maximum(temperature, 1 / LARGEST_INVERSE)), LARGEST_INVERSE)
        seeds = np.array([call.seed & 0xFFFFFFFFFFFFFFFF for call in calls] + padding, np.uint64).view(np.int64)
        state = self._state.first(rows)
        integers = np.array(
            [
                [sample.slice(sample.computed, sample.computed + 1)[0] for sample in samples] + padding,
                [sample.computed for sample in samples] + padding,
                [len(sample.tokens) for sample in samples] + padding,
                [sample.index for sample in samples] + padding,
                seeds.tolist(),
                greedy.tolist(),
                [0] * rows,
            ],
            np.int64,
        )
        targets = (state.tokens_N, state.positions_N, state.counts_N, state.samples_N, state.seeds_N, state.greedy_N)
        sources = torch.from_numpy(integers).to(self._model.device, non_blocking=True)
        for target, source in zip((*targets, state.steps_N), sources, strict=True):
            target.copy_(source)
        state.inverse_N.copy_(torch.from_numpy(inverse.astype(np.float32)))

    def _load_tables(self, blocks: Sequence[Sequence[int]], rows: int, end: int) -> None:
        """Of each row, the blocks of its sequence; where there are none, and in padding, the scratch block.

        No row gets to position `end`, nor padding to the end of a burst.
        """
        size = self._cache.block_size
        width = max(-(-max(end, BURST) // size), max(map(len, blocks)))
        self._host_tables.reverse()  # the other one may still be on its way to the device
        host_NW = self._host_tables[0][:rows, :width]
        host_NW.fill_(self._scratch)
        table_NW = host_NW.numpy()
        for row, own in enumerate(blocks):
            table_NW[row, : len(own)] = own
        self._tables_NW[:rows, :width].copy_(host_NW, non_blocking=True)


def _on_host(part_Ns: Tensor) -> Tensor:
    """A copy on the host, complete when the device has got there."""
    if not part_Ns.is_cuda:
        return part_Ns.clone()
    host_Ns = torch.empty(part_Ns.shape, dtype=part_Ns.dtype, pin_memory=True)
    return host_Ns.copy_(part_Ns, non_blocking=True)


def _sizes_up_to(most: int) -> list[int]:
    """Rows for which graphs are captured: each at most a third more than the one before, from 8 on."""
    sizes = itertools.takewhile(
        lambda size: size < most,
        itertools.chain(
            (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224), range(256, 512, 64), itertools.count(512, 128)
        ),
    )
    return [*sizes, most]
