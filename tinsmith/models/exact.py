"""The plainest decoder layers with one forward arithmetic for training, prompts and decoding on a CUDA device.

A row's hidden states have the same bits in all of them and in any company: that is what `--deterministic` is on a GPU
(on a CPU it is `invariant`). Every product, norm and attention row is computed by kernels whose sums have one order.
Backward is of one call at a time, by the library's products and the kernels of `fused`: its bits depend on the call
alone. Which families have such layers is a list, and checked by comparing results; that the device keeps what the
kernels rely on is tried, too. Knows no requests.

Shapes: `T` rows of a pass, `D` hidden size, `O` outputs of a group of linear layers, `R` ranks of all its layers,
`P` width of a feed-forward network, `H` query heads, `G` key/value heads, `d` head dimension, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tinsmith.errors import ConfigError
from tinsmith.models.adapter_table import AdapterPlaces, AdapterTable
from tinsmith.models.attention import PackedAttention
from tinsmith.models.exact_attention import (
    HeadCounts,
    Paging,
    RowTiles,
    SingleRows,
    attend,
    attend_backward,
    key_tiles,
    row_tiles,
)
from tinsmith.models.exact_products import (
    CacheRows,
    ExactAdapters,
    Turning,
    adapters_of,
    norm,
    normalizers,
    product,
    turned,
)
from tinsmith.models.kernels import norm_rope_backward, rms_norm_backward
from tinsmith.models.layer_function import through
from tinsmith.models.lora import LinearGroup, Segment
from tinsmith.models.norms import FrozenRMSNorm
from tinsmith.models.plain_layers import FAMILIES, LayerParts, Probe, gates_are_silu, parts_of, weight_of

_TOLERANCE = 0.05  # of the final hidden states, as a share of their norm, in bfloat16
_LEAST_CAPABILITY = (9, 0)  # of the device: whose matrix instructions have been tried
_TRIED_ROWS = (1, 70, 300, 2000)  # products of which are cut in different ways


class ExactAttention(Protocol):
    """The attention of one pass: where a row's keys and values are kept, and the tiles of its rows."""

    def cache(self, layer: int) -> tuple[CacheRows, Paging] | None:
        """Where keys and values go and everything that the rows may see is; None if that is all in the pass."""

    def tiles(self, sharing: int) -> RowTiles | SingleRows:
        """Of rows that share a key/value head with so many query heads."""


class PackedRows:
    """Attention within packed sequences of these lengths, for training."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths, self._device = lengths, device
        self._tiles: dict[int, RowTiles] = {}
        self._blocks: Tensor | None = None

    def cache(self, layer: int) -> None:
        return None

    def tiles(self, sharing: int) -> RowTiles:
        if sharing not in self._tiles:
            spans, row = [], 0
            for length in self._lengths:
                spans.append((row, length, 0))
                row += length
            self._tiles[sharing] = row_tiles(spans, sharing, self._device)
        return self._tiles[sharing]

    @property
    def blocks(self) -> Tensor:
        """`key_tiles` of the sequences."""
        if self._blocks is None:
            self._blocks = key_tiles(self._lengths, self._device)
        return self._blocks


@dataclass(frozen=True, slots=True)
class ExactPass:
    """What all layers of one pass share."""

    adapters: ExactAdapters
    attention: ExactAttention
    cos_Td: Tensor
    sin_Td: Tensor


@dataclass(frozen=True, slots=True)
class TrainingPass:
    """The same of a pass with gradients; `table` has its adapters once more, for backward."""

    forward: ExactPass
    attention: PackedRows
    table: AdapterTable
    recomputes: bool  # whether a layer keeps its input only


class ExactLayers:
    """Stands in for a base model between its embedding and its head; as `fused.FusedLayers` for training.

    `recomputes` says whether backward computes each layer again, in passes that begin from now on.
    """

    def __init__(self, module: Any, parts: Sequence[LayerParts], head_linear: int, max_context: int) -> None:
        self._embedding = module.get_input_embeddings()
        self._norm: FrozenRMSNorm = module.model.norm
        self._layers = [_Layer(index, each) for index, each in enumerate(parts)]
        self.places = AdapterPlaces([*(group.linears for each in parts for group in each.groups), (head_linear,)])
        self._head_linear = head_linear
        weight: Tensor = self._embedding.weight
        positions = torch.arange(max_context, device=weight.device)
        cos, sin = module.model.rotary_emb(weight[:0], positions[None])
        self._rotation = (cos[0].contiguous(), sin[0].contiguous())
        self.device = weight.device
        self.recomputes = False

    @property
    def weight_OI(self) -> Tensor:
        """Of the first product."""
        return self._layers[0].weight_OI

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, segments: Sequence[Segment], attention: PackedAttention
    ) -> Tensor:
        """[T, D] after the final norm, of packed sequences; with gradients if autograd is on."""
        rows = PackedRows(attention.lengths, self.device)
        this = self._pass(positions_T, rows, adapters_of(self.places, segments, self.device))
        x_TD: Tensor = self._embedding(tokens_T)
        if not torch.is_grad_enabled():
            return self._through(x_TD, this)
        x_TD.requires_grad_()
        training = TrainingPass(this, rows, AdapterTable(segments, self.places, self.device), self.recomputes)
        for layer in self._layers:
            x_TD = through(layer, x_TD, training)
        normed_TD: Tensor = _NormFunction.apply(x_TD, self._norm)
        return normed_TD

    def rows_through(
        self, tokens_T: Tensor, positions_T: Tensor, attention: ExactAttention, adapters: ExactAdapters
    ) -> Tensor:
        """[T, D] after the final norm, of rows that see what `attention` shows them; without gradients."""
        x_TD: Tensor = self._embedding(tokens_T)
        return self._through(x_TD, self._pass(positions_T, attention, adapters))

    def _pass(self, positions_T: Tensor, attention: ExactAttention, adapters: ExactAdapters) -> ExactPass:
        # Ended sequences run on behind the longest context, and warming up may reach there: any angles do.
        angles_T = positions_T.clamp(max=len(self._rotation[0]) - 1)
        cos_Td, sin_Td = (part.index_select(0, angles_T) for part in self._rotation)
        return ExactPass(adapters, attention, cos_Td, sin_Td)

    def _through(self, x_TD: Tensor, this: ExactPass) -> Tensor:
        for layer in self._layers:
            x_TD, _ = layer.compute(x_TD, this, keeps=False)
        return norm(x_TD, weight_of(self._norm), self._norm.eps)

    def logits(self, weight_VD: Tensor, hidden_TD: Tensor, adapters: ExactAdapters) -> Tensor:
        """fp32 [T, V]."""
        logits_TV = product(hidden_TD, weight_VD, dtype=torch.float32)
        linears = (self._head_linear,)
        adapters.add(linears, (weight_VD.shape[0],), adapters.inner(linears, hidden_TD), logits_TV)
        return logits_TV

    def logits_of(self, weight_VD: Tensor, hidden_TD: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The same of rows whose adapters are those of the segments."""
        return self.logits(weight_VD, hidden_TD, adapters_of(self.places, segments, self.device))

    @staticmethod
    def log_softmax(logits_RV: Tensor) -> Tensor:
        """fp32 [R, V]."""
        most_R, log_total_R = normalizers(logits_RV, logits_RV.new_ones(len(logits_RV)))
        return (logits_RV - most_R[:, None]).sub_(log_total_R[:, None])

    @staticmethod
    def logprobs(logits_RV: Tensor, rows_M: Tensor, tokens_M: Tensor) -> Tensor:
        """[M]: those of some tokens of some rows."""
        most_R, log_total_R = normalizers(logits_RV, logits_RV.new_ones(len(logits_RV)))
        return logits_RV[rows_M, tokens_M] - most_R[rows_M] - log_total_R[rows_M]

    @staticmethod
    def logprobs_at(logits_RV: Tensor, tokens_R: Tensor, inverse_R: Tensor) -> Tensor:
        """[R]: that of one token per row, at the temperature of which `inverse_R` is the inverse."""
        most_R, log_total_R = normalizers(logits_RV, inverse_R)
        return (logits_RV.gather(1, tokens_R[:, None])[:, 0] - most_R) * inverse_R - log_total_R


class _NormFunction(torch.autograd.Function):
    """The final norm."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, frozen: FrozenRMSNorm) -> Tensor:
        ctx.save_for_backward(x_TD)
        ctx.frozen = frozen
        return norm(x_TD, weight_of(frozen), frozen.eps)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = ctx.saved_tensors
        nothing_TD = torch.zeros_like(x_TD)
        return _norm_backward(ctx.frozen, dy_TD.contiguous(), x_TD, nothing_TD)[0], None


def _norm_backward(frozen: FrozenRMSNorm, dy_TD: Tensor, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(the gradient in x, plus the residual's; the normalised x once more)."""
    return rms_norm_backward(dy_TD, x_TD, weight_of(frozen), frozen.eps, residual_TD)


class _Layer:
    """One decoder layer."""

    few = 0

    def __init__(self, index: int, parts: LayerParts) -> None:
        self._index, self._parts = index, parts
        heads, kv_heads, _ = parts.counts
        self._counts = HeadCounts(heads, kv_heads, parts.width, parts.scaling, parts.window or 0)
        norms = parts.head_norms
        self._head_weights = None if norms is None else (weight_of(norms[0]), weight_of(norms[1]))
        self._head_eps = 0.0 if norms is None else norms[0].eps

    @property
    def weight_OI(self) -> Tensor:
        return self._parts.heads.weight_OI

    def forward(self, x_TD: Tensor, this: TrainingPass) -> tuple[Tensor, list[Tensor]]:
        """(what comes out [T, D], what `backward` needs beside what came in)."""
        return self.compute(x_TD, this.forward, keeps=True)

    def again(self, x_TD: Tensor, few: Sequence[Tensor], this: TrainingPass) -> list[Tensor]:
        """All that `backward` needs, from what came in; nothing else is kept."""
        return self.compute(x_TD, this.forward, keeps=True)[1]

    def compute(self, x_TD: Tensor, this: ExactPass, *, keeps: bool) -> tuple[Tensor, list[Tensor]]:
        """(what comes out [T, D], what `backward` needs beside what came in, if it `keeps` that)."""
        parts, adapters = self._parts, this.adapters
        heads_TO, heads_z = _adapted(parts.heads, _normed(parts.before, x_TD), adapters)
        sums_HT = x_TD.new_empty(self._counts.heads, len(x_TD), dtype=torch.float32) if keeps else None
        attended_TO = self._attended(heads_TO, this, sums_HT)
        middle_TD, out_z = _adapted(parts.out, attended_TO, adapters, x_TD)
        normed_TD = _normed(parts.between, middle_TD)
        gate_up_TO, gate_up_z = adapters.product(parts.gate_up, normed_TD)
        active_TP = adapters.swiglu(parts.gate_up.linears, gate_up_TO, gate_up_z)
        y_TD, down_z = _adapted(parts.down, active_TP, adapters, middle_TD)
        if sums_HT is None:
            return y_TD, []
        return y_TD, [heads_z, out_z, gate_up_z, down_z, heads_TO, attended_TO, sums_HT, middle_TD, gate_up_TO]

    def _attended(self, heads_TO: Tensor, this: ExactPass, sums_HT: Tensor | None) -> Tensor:
        """[T, H · d]; fills the cache, if there is one."""
        cached = this.attention.cache(self._index)
        tiles = this.attention.tiles(self._counts.sharing)
        if cached is None:
            turned_TO = self._turned(heads_TO, this)
            return attend(turned_TO, *self._keys_and_values(turned_TO, heads_TO), tiles, self._counts, None, sums_HT)
        cache, paging = cached
        queries_TO = self._turned(heads_TO, this, cache)
        return attend(queries_TO, cache.keys, cache.values, tiles, self._counts, paging, sums_HT)

    def _turned(self, heads_TO: Tensor, this: ExactPass, cache: CacheRows | None = None) -> Tensor:
        """Queries and keys [T, (H + G) · d], normalised and rotated; queries alone if a cache takes the keys."""
        turning = Turning(this.cos_Td, this.sin_Td, self._head_weights, self._head_eps)
        return turned(heads_TO, self._parts.counts[:2], self._parts.width, turning, cache)

    def _keys_and_values(self, turned_TO: Tensor, heads_TO: Tensor) -> tuple[Tensor, Tensor]:
        query, key, _ = self._parts.counts
        width = self._parts.width
        return turned_TO[:, query * width :], heads_TO[:, (query + key) * width :]

    def backward(self, dy_TD: Tensor, x_TD: Tensor, saved: Sequence[Tensor], this: TrainingPass) -> Tensor:
        """The gradient in what came in; what was saved is overwritten."""
        heads_z, out_z, gate_up_z, down_z, heads_TO, attended_TO, sums_HT, middle_TD, gate_up_TO = saved
        parts, table = self._parts, this.table
        dmiddle_TD = self._feed_forward_backward(dy_TD, middle_TD, gate_up_TO, (gate_up_z, down_z), this)
        dout_z = table.inner_of_gradient(parts.out, dmiddle_TD)
        dattended_TO = _product_backward(parts.out, dmiddle_TD, dout_z, table)
        table.add_gradients(parts.out, attended_TO, out_z, dmiddle_TD, dout_z)
        turned_TO = self._turned(heads_TO, this.forward)
        dinputs = attend_backward(
            turned_TO,
            *self._keys_and_values(turned_TO, heads_TO),
            attended_TO,
            dattended_TO,
            sums_HT,
            this.attention.tiles(self._counts.sharing),
            this.attention.blocks,
            self._counts,
        )
        rotation = (this.forward.cos_Td, this.forward.sin_Td)
        query_d, key_d = self._head_weights or (None, None)
        dheads_TO = norm_rope_backward(dinputs, heads_TO, *rotation, query_d, key_d, self._head_eps)
        del dinputs, turned_TO, dattended_TO
        dheads_z = table.inner_of_gradient(parts.heads, dheads_TO)
        dnormed_TD = _product_backward(parts.heads, dheads_TO, dheads_z, table)
        dx_TD, normed_TD = _norm_backward(parts.before, dnormed_TD, x_TD, dmiddle_TD)
        table.add_gradients(parts.heads, normed_TD, heads_z, dheads_TO, dheads_z)
        return dx_TD

    def _feed_forward_backward(
        self, dy_TD: Tensor, middle_TD: Tensor, gate_up_TO: Tensor, inner: tuple[Tensor, Tensor], this: TrainingPass
    ) -> Tensor:
        """The gradient [T, D] in what goes into the feed-forward network's norm, and past it."""
        table, parts, (gate_up_z, down_z) = this.table, self._parts, inner
        ddown_z = table.inner_of_gradient(parts.down, dy_TD)
        dactive_TP = dy_TD @ parts.down.weight_OI
        groups = (parts.gate_up, parts.down)
        active_TP, dgate_up_z = table.swiglu_backward(groups, gate_up_TO, gate_up_z, dactive_TP, ddown_z)
        dgate_up_TO = gate_up_TO
        table.add_gradients(parts.down, active_TP, down_z, dy_TD, ddown_z)
        del active_TP, dactive_TP
        dnormed_TD = _product_backward(parts.gate_up, dgate_up_TO, dgate_up_z, table)
        dmiddle_TD, normed_TD = _norm_backward(parts.between, dnormed_TD, middle_TD, dy_TD)
        table.add_gradients(parts.gate_up, normed_TD, gate_up_z, dgate_up_TO, dgate_up_z)
        return dmiddle_TD


def _normed(frozen: FrozenRMSNorm, x_TD: Tensor) -> Tensor:
    return norm(x_TD, weight_of(frozen), frozen.eps)


def _adapted(
    group: LinearGroup, x_TI: Tensor, adapters: ExactAdapters, residual_TO: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x Wᵀ + b + the residual, then + z Bᵀ [T, O]; z [T, R])."""
    y_TO, z_TR = adapters.product(group, x_TI, residual_TO)
    adapters.add(group.linears, group.outputs, z_TR, y_TO)
    return y_TO, z_TR


def _product_backward(group: LinearGroup, dy_TO: Tensor, dz_TR: Tensor, table: AdapterTable) -> Tensor:
    """The gradient [T, I] in what went in."""
    return table.gradient_of_inputs(group, dz_TR).addmm_(dy_TO, group.weight_OI)


@torch.no_grad()
def make_exact(model: Any, on_progress: Callable[[str], None]) -> None:
    """Has a loaded base model on a GPU compute adapters' passes, and its own, exactly from now on.

    Raises ConfigError, with the reason, where that cannot be: there is nothing less exact to fall back to.
    """
    on_progress("preparing exact arithmetic")
    what = "--deterministic on a GPU"
    if model.architecture not in FAMILIES:
        raise ConfigError(
            f"{what} serves {', '.join(sorted(FAMILIES))}, not {model.architecture}; use --device cpu, or leave it out"
        )
    if model.dtype != torch.bfloat16:
        raise ConfigError(f"{what} computes in bfloat16, not in {str(model.dtype).removeprefix('torch.')}")
    if not gates_are_silu(model):
        raise ConfigError(f"{what} serves models whose gates are SiLU, not {model.config.hidden_act}")
    capability = torch.cuda.get_device_capability(model.device)
    if capability < _LEAST_CAPABILITY:
        raise ConfigError(f"{what} needs a device of capability {_LEAST_CAPABILITY} or more; this one has {capability}")
    probe = Probe(model)
    layers = layers_of(model, probe)
    if not keeps_bits(layers.weight_OI):
        raise ConfigError(f"{what}: products of this device depend on how many rows they have; leave it out")
    hidden_TD = layers.hidden(probe.tokens_T, probe.positions_T, probe.segments, probe.attention)
    difference = probe.difference(hidden_TD)
    if not difference <= _TOLERANCE:
        raise ConfigError(f"{what}: the exact layers differ from the model's own by {100 * difference:.3g} %")
    model.exact = layers


def layers_of(model: Any, probe: Probe) -> ExactLayers:
    """The exact layers of a base model of one of `FAMILIES`."""
    parts = [parts_of(layer, *probe.calls[index]) for index, layer in enumerate(model.module.model.layers)]
    return ExactLayers(model.module, parts, model.head_linear, model.max_context)


def keeps_bits(weight_OI: Tensor) -> bool:
    """Whether rows have the same bits in products of any number of rows, on this device."""
    most = max(_TRIED_ROWS)
    generator = torch.Generator(weight_OI.device).manual_seed(0)
    x_TI = torch.randn(most, weight_OI.shape[1], generator=generator, device=weight_OI.device).to(weight_OI.dtype)
    whole_TO = product(x_TI, weight_OI, dtype=torch.float32)
    return all(
        torch.equal(product(x_TI[-rows:], weight_OI, dtype=torch.float32), whole_TO[-rows:]) for rows in _TRIED_ROWS
    )
