"""The decoder layers of the plainest families as few kernels, for sampling on a GPU.

What `models.quick` is for CPUs: norms, rotation and the writing of the cache are fused, and all adapters of a pass take
two kernels. A pass either decodes (one row of each sequence; `adapter_tiles`) or prefills (several rows of each, with
adapters as in training, `models.adapter_table`). Knows no requests;
which models it may stand in for is a list, and checked by comparing results. Needs Triton.

Shapes: `T` rows of a pass, `N` rows of a decoding one, `D` hidden size, `O` outputs of the product of queries, keys and
values, `H` query heads, `d` head dimension, `W` blocks of the longest sequence, `K` cached tokens of all sequences.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.models.adapter_table import MOST_RANKS, AdapterPlaces, AdapterTable
from tinsmith.models.fused import adapted_product
from tinsmith.models.kernels import add_rms_norm, swiglu
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import AdaptersInTurn, LinearGroup, Segment
from tinsmith.models.plain_layers import FAMILIES, LayerParts, Probe, gates_are_silu, parts_of, weight_of
from tinsmith.models.transfer import on_device
from tinsmith.protocols import ModelSpec
from tinsmith.sampling.adapter_tiles import AdapterTiles, TileSizes, tiles_needed
from tinsmith.sampling.cuda_kernels import HeadNorms, HeadShape, attend_rows, store_heads
from tinsmith.sampling.kv_cache import KVCache
from tinsmith.sampling.lanes import Span, block_tables

_PROBE_LENGTH = 9
_WARM_ROWS = (16, 512, 8192)  # for which adapters are applied in different ways
_BEHIND = 256  # positions: more than a burst and a block of the cache
_PROBE_TOLERANCE = 0.1  # of the hidden states' norm; rounding in bfloat16 makes 0.02 in deep models
_WIDEST_HEAD = 256

PassAdapters = AdapterTiles | AdapterTable | AdaptersInTurn
"""What applies the adapters of a decoding step, of a prompts' pass, and what is left where neither can."""

Product = tuple[Tensor, Tensor | None]
"""What a group of layers makes, and the adapters' share that is still to be added to it, if any; [T, O] both."""


class RowAttention(Protocol):
    """Where the rows of a pass belong, and how they look at what is cached."""

    slots_T: Tensor
    positions_T: Tensor

    def attend(self, place: int, qkv_TO: Tensor, shape: HeadShape) -> Tensor:
        """[T, H · d], of queries that are normed and rotated; their own keys and values are cached already."""


class DecodingRows:
    """One row of each sequence, its newest; sequence n's blocks are `tables_NW[n]`."""

    def __init__(self, cache: KVCache, tables_NW: Tensor, positions_N: Tensor) -> None:
        size = cache.block_size
        blocks_N = tables_NW.gather(1, (positions_N // size)[:, None])[:, 0].long()
        self.slots_T = blocks_N * size + positions_N % size
        self.positions_T = positions_N
        self._cache, self._tables_NW = cache, tables_NW

    def attend(self, place: int, qkv_TO: Tensor, shape: HeadShape) -> Tensor:
        slots, size = self._cache.slots(place), self._cache.block_size
        return attend_rows(qkv_TO, slots, self._tables_NW, self.positions_T, shape, size)


class PrefillingRows:
    """Several rows of each sequence, the newest of it; what was cached before is gathered."""

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        device = cache.keys_LBSGd.device
        positions = [np.arange(span.past, span.past + span.count) for span in spans]
        self.positions_T = on_device(np.concatenate(positions), device)
        slots = [_slots(span, cache.block_size) for span in spans]
        own = [part[span.past :] for span, part in zip(spans, slots, strict=True)]
        self.slots_T = on_device(np.concatenate(own), device)
        self._cache = cache
        self._begins = _bounds([span.count for span in spans], device)
        self._most = max(span.count for span in spans)
        self._slots_K = None
        if any(span.past for span in spans):
            self._slots_K = on_device(np.concatenate(slots), device)
            self._key_begins = _bounds([span.past + span.count for span in spans], device)
            self._most_keys = max(span.past + span.count for span in spans)
        else:
            self._key_begins, self._most_keys = self._begins, self._most

    def attend(self, place: int, qkv_TO: Tensor, shape: HeadShape) -> Tensor:
        heads_THd = qkv_TO.unflatten(1, (-1, shape.width))
        query, key, value = heads_THd.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        if self._slots_K is not None:
            key, value = (part.index_select(0, self._slots_K) for part in self._cache.slots(place))
        bounds = (self._begins, self._key_begins, self._most, self._most_keys)
        window = {} if shape.window is None else {"window_size_left": shape.window - 1, "window_size_right": 0}
        flash: Any = torch.ops.aten._flash_attention_forward
        return flash(query, key, value, *bounds, 0.0, True, False, scale=shape.scaling, **window)[0].flatten(1)


def _slots(span: Span, size: int) -> np.ndarray[Any, Any]:
    """Of all of a sequence's tokens up to the last of the span."""
    blocks = np.array(span.blocks)
    return (blocks[:, None] * size + np.arange(size)).ravel()[: span.past + span.count]


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return on_device(np.array([0, *itertools.accumulate(lengths)], np.int32), device)


class CudaLayers:
    """Stands in for a whole base model between its embedding and its head."""

    def __init__(
        self, model: BaseModel, cache: KVCache, calls: dict[int, tuple[float, int | None]], max_context: int
    ) -> None:
        """`calls` has, by layer, the scaling and the window that its attention asks for."""
        inner = model.module.model
        self._embed = inner.embed_tokens
        parts = [parts_of(layer, *calls[index]) for index, layer in enumerate(inner.layers)]
        self._layers = [_Layer(part, cache.places[index]) for index, part in enumerate(parts)]
        self._norm = inner.norm
        positions = torch.arange(max_context, device=model.device)
        cos, sin = inner.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), positions[None])
        # Ended sequences run on behind the longest context, and warming up may begin there: any angles do.
        reach = max(max_context + _BEHIND, _WARM_ROWS[-1])
        angles = torch.arange(reach, device=model.device).clamp(max=max_context - 1)
        self._rotation = (cos[0][angles], sin[0][angles])
        self._cache = cache
        self._model = model
        groups = [group.linears for layer in self._layers for group in layer.groups]
        self.places = AdapterPlaces([*groups, (model.head_linear,)])
        shapes = [group.weight_OI.shape for layer in self._layers for group in layer.groups]
        self._most_outputs, self._most_inputs = (max(sizes) for sizes in zip(*shapes, strict=True))
        self._share = torch.zeros(0, dtype=model.dtype, device=model.device)

    def hidden(self, tokens_T: Tensor, rows: RowAttention, adapters: PassAdapters) -> Tensor:
        """[T, D] after the final norm; fills the cache."""
        last: Product = (self._embed(tokens_T), None)
        sum_TD = None
        for layer in self._layers:
            slots = self._cache.slots(layer.place)
            last, sum_TD = layer(last, sum_TD, rows, slots, self._rotation, adapters)
        return _normed(self._norm, last, sum_TD)[0]

    def tiles(self, sizes: TileSizes) -> AdapterTiles:
        """Room for the adapters of decoding steps of these sizes; the largest is best asked for first."""
        room = sizes.rows * self._most_outputs
        if self._share.numel() < room:
            self._share = self._share.new_zeros(room)
        return AdapterTiles(self.places, sizes, self._most_inputs, self._share)

    def pass_of(self, spans: Sequence[Span], tokens_T: Tensor, segments: Sequence[Segment]) -> Tensor:
        """[T, D], of the rows of these spans, which follow each other without gaps."""
        if any(span.count > 1 for span in spans):
            return self.hidden(tokens_T, PrefillingRows(self._cache, spans), self._of_prompts(segments))
        tables_NW = on_device(np.array(block_tables(spans), np.int32), tokens_T.device)
        positions_N = on_device(np.array([span.past for span in spans]), tokens_T.device)
        rows = DecodingRows(self._cache, tables_NW, positions_N)
        return self.hidden(tokens_T, rows, self._of_single_rows(segments))

    def warm_up(self, rank: int) -> None:
        """Compiles the kernels of prompts, with adapters and without; writes to the cache's scratch block."""
        device, block = self._rotation[0].device, self._cache.scratch_slot // self._cache.block_size
        spec = ModelSpec(rank, 0)
        adapter = self._model.new_adapter(spec)
        for rows in _WARM_ROWS:
            blocks = [block] * -(-rows // self._cache.block_size)
            tokens_T = torch.zeros(rows, dtype=torch.int64, device=device)
            for count, past in ((rows, 0), (rows - 1, 1), (1, rows - 1)):
                self.pass_of([Span(0, 0, count, past, blocks)], tokens_T[:count], [Segment(adapter, 0, count)])

    def _of_prompts(self, segments: Sequence[Segment]) -> PassAdapters:
        adapters = {segment.adapter for segment in segments if segment.adapter}
        if not adapters or any(adapter.spec.rank > MOST_RANKS for adapter in adapters):
            return AdaptersInTurn(segments)
        return AdapterTable(segments, self.places, self._rotation[0].device)

    def _of_single_rows(self, segments: Sequence[Segment]) -> PassAdapters:
        adapters = {segment.adapter for segment in segments if segment.adapter}
        if not adapters or not all(self.places.are_aligned(adapter) for adapter in adapters):
            return AdaptersInTurn(segments)
        rank = max(adapter.spec.rank for adapter in adapters)
        tiles = self.tiles(TileSizes(tiles_needed(segments), segments[-1].end, rank))
        tiles.set(segments)
        return tiles


class _Layer:
    """One decoder layer: attention and a gated feed-forward network, each behind a norm and added to what came in."""

    def __init__(self, parts: LayerParts, place: int) -> None:
        self.place = place
        self.groups = parts.groups
        self._attention_norm, self._mlp_norm = parts.before, parts.between
        self._qkv, self._out, self._gate_up, self._down = parts.groups
        heads, kv_heads, _ = parts.counts
        self._shape = HeadShape(heads, kv_heads, parts.width, parts.scaling, parts.window)
        self._norms = None
        if parts.head_norms is not None:
            query, key = parts.head_norms
            self._norms = HeadNorms(weight_of(query), weight_of(key), query.eps)

    def __call__(
        self,
        last: Product,
        sum_TD: Tensor | None,
        rows: RowAttention,
        slots: tuple[Tensor, Tensor],
        rotation: tuple[Tensor, Tensor],
        adapters: PassAdapters,
    ) -> tuple[Product, Tensor]:
        """What the layer adds, and the sum to which it is still to be added; both as in its input."""
        normed_TD, sum_TD = _normed(self._attention_norm, last, sum_TD)
        qkv_TO, share_TO = _product(self._qkv, normed_TD, adapters)
        store_heads(qkv_TO, share_TO, slots, rows.slots_T, rows.positions_T, rotation, self._shape, self._norms)
        attended_TO = rows.attend(self.place, qkv_TO, self._shape)
        normed_TD, sum_TD = _normed(self._mlp_norm, _product(self._out, attended_TO, adapters), sum_TD)
        return self._feed_forward(normed_TD, adapters), sum_TD

    def _feed_forward(self, normed_TD: Tensor, adapters: PassAdapters) -> Product:
        if not isinstance(adapters, AdapterTable):
            gate_up_TO, share_TO = _product(self._gate_up, normed_TD, adapters)
            return _product(self._down, swiglu(gate_up_TO, share_TO), adapters)
        z_TR = adapters.inner_of_inputs(self._gate_up, normed_TD)
        gate_up_TO = F.linear(normed_TD, self._gate_up.weight_OI, self._gate_up.bias_O)
        active_TP, down_z_TR = adapters.swiglu((self._gate_up, self._down), gate_up_TO, z_TR)
        return adapted_product(self._down, active_TP, down_z_TR, adapters), None


def _normed(norm: Any, last: Product, sum_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of the sum with what the last group of layers made; the sum."""
    return add_rms_norm(last[0], sum_TD, weight_of(norm), norm.eps, last[1])


def _product(group: LinearGroup, x_TI: Tensor, adapters: PassAdapters) -> Product:
    if isinstance(adapters, AdapterTiles):
        return adapters.product(group, x_TI)
    if isinstance(adapters, AdapterTable):
        return adapted_product(group, x_TI, adapters.inner_of_inputs(group, x_TI), adapters), None
    y_TO = F.linear(x_TI, group.weight_OI, group.bias_O)
    adapters.add(group, x_TI, y_TO)
    return y_TO, None


@torch.no_grad()
def cuda_layers(model: BaseModel, cache: KVCache, max_context: int) -> CudaLayers | None:
    """The layers of a loaded base model; None where they would not compute the same.

    Uses the cache's first blocks, whose content nobody may need yet.
    """
    shape = model.cache_shape
    if model.architecture not in FAMILIES or model.device.type != "cuda" or model.dtype == torch.float32:
        return None
    if shape.key_dim != shape.value_dim or shape.key_dim % 8 or shape.key_dim > _WIDEST_HEAD:
        return None
    if not gates_are_silu(model):
        return None
    probe = Probe(model, [_PROBE_LENGTH])
    layers = CudaLayers(model, cache, probe.calls, max_context)
    return layers if probe.difference(_probe(layers, cache, probe.tokens_T)) <= _PROBE_TOLERANCE else None


def _probe(layers: CudaLayers, cache: KVCache, tokens_T: Tensor) -> Tensor:
    """Hidden states of some tokens: of the first half all together, then one by one."""
    half, blocks = len(tokens_T) // 2, range(-(-len(tokens_T) // cache.block_size))
    nothing = AdaptersInTurn([])
    parts = [layers.hidden(tokens_T[:half], PrefillingRows(cache, [Span(0, 0, half, 0, blocks)]), nothing)]
    tables_NW = torch.tensor([list(blocks)], dtype=torch.int32, device=tokens_T.device)
    for position in range(half, len(tokens_T)):
        rows = DecodingRows(cache, tables_NW, torch.tensor([position], device=tokens_T.device))
        parts.append(layers.hidden(tokens_T[position : position + 1], rows, nothing))
    return torch.cat(parts)
