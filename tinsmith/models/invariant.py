"""Arithmetic in which a row's bits do not depend on the other rows: for the CPU of a deterministic server.

A library picks its kernel, and with it the order of a sum, by the shape of the whole problem. Here every product has
one shape, of so many rows, whatever the number of rows asked for; attention runs over tiles of one shape, from a
sequence's first key on; and functions whose vector and scalar code differ are put together from those that do not. So
a token has the same bits whether it is trained, prefilled in a chunk or decoded beside strangers. Knows no models and
no requests.

Shapes: `B` batch, `H` query heads, `G` key/value heads, `X` = B · G, `L` query rows, `K` keys, `d` dimension of queries
and keys, `e` dimension of values, `n` tiles of `R` query rows.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST_ROWS = 16
"""From so many rows on, plain fp32 products give a row the same bits whatever the batch; fewer take another kernel.

Measured with MKL on one thread. Smaller batches are padded.
"""

TILE_ROWS = 32
"""Rows of one product: fewer waste the processor on training, more on decoding."""

QUERY_ROWS, KEYS = 16, 64
"""Of a tile of attention."""


class RowInvariance(TorchFunctionMode):
    """While active, torch's functions that a forward pass is made of are replaced as the module says.

    Differentiable; what backward itself computes is as usual, and so is what it runs forward again, unless `same` is
    asked before.
    """

    _active: ContextVar[bool] = ContextVar("active", default=False)

    def __init__(self) -> None:
        super().__init__()
        self._before: list[Token[bool]] = []

    def __enter__(self) -> "RowInvariance":
        self._before.append(self._active.set(True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._active.reset(self._before.pop())

    @classmethod
    def same(cls) -> AbstractContextManager[object]:
        """The arithmetic that is in force now, to be entered later."""
        return cls() if cls._active.get() else nullcontext()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(*args, **(kwargs or {}))


def _linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I] → [..., O]."""
    y_NO = _product(x.reshape(-1, x.shape[-1]), weight_OI.t())
    return (y_NO if bias_O is None else y_NO + bias_O).view(*x.shape[:-1], -1)


def _product(x_NI: Tensor, weight_IO: Tensor) -> Tensor:
    """x W, as products of `TILE_ROWS` rows each; the last is filled up."""
    rows = len(x_NI)
    missing = -rows % TILE_ROWS
    tiles = (F.pad(x_NI, (0, 0, 0, missing)) if missing else x_NI).contiguous().split(TILE_ROWS)
    y_NO = torch.cat([tile @ weight_IO for tile in tiles]) if rows else x_NI @ weight_IO
    return y_NO[:rows] if missing else y_NO


def _add_product_(total_NO: Tensor, x_NI: Tensor, weight_IO: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1:
        total_NO.mul_(beta)
    return total_NO.add_(_product(x_NI, weight_IO), alpha=alpha)


def _grouped_product(x: Tensor, weight: Tensor, *, offs: Tensor, **others: Any) -> Tensor:
    """Rows by group [N, I] and a matrix for each [E, I, O] → [N, O]; other forms, which only backward has, as usual."""
    if weight.dim() != 3:
        return torch._grouped_mm(x, weight, offs=offs, **others)
    if any(other is not None for other in others.values()):
        raise TypeError(f"grouped products with {sorted(others)} are not row-invariant")
    ends = offs.tolist()
    parts = x[: ends[-1]].split([end - start for start, end in zip([0, *ends], ends, strict=False)])
    products = [_product(part, matrix) for part, matrix in zip(parts, weight, strict=True) if len(part)]
    return torch.cat([*products, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


def _sigmoid(x: Tensor) -> Tensor:
    return (1 / (1 + torch.exp(-x.float()))).to(x.dtype)


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return (x.float() / (1 + torch.exp(-x.float()))).to(x.dtype)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return F.gelu(x)
    wide = x.float()
    return (0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)))).to(x.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` without dropout: [B, H, L, e] of a query [B, H, L, d] and G heads of keys."""
    given = (query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if torch.is_grad_enabled() and any(part.requires_grad for part in given[:3]):
        attended: Tensor = _TiledAttention.apply(*given)
        return attended
    return _tiled_attention(*given)


class _TiledAttention(torch.autograd.Function):
    """Attention by tiles, whose gradient is that of torch's own."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        tensors, ctx.rest = given[:4], given[4:]
        ctx.save_for_backward(*tensors)
        return _tiled_attention(*given)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        causal, scale, gqa = ctx.rest
        leaves = [part.detach().requires_grad_() for part in inputs]
        with torch.enable_grad():
            query, key, value = leaves
            y = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
            )
        return (*torch.autograd.grad(y, leaves, dy), None, None, None, None)


@torch.no_grad()
def _tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """Keys go by in tiles; a query row keeps the maximum, the sum and the weighted values of what it has seen.

    What a mask hides adds exactly zero, so neither tiles of nothing else nor what fills up a tile changes a bit.
    """
    batch, heads, rows, dim = query.shape
    sharing = heads // key.shape[1]
    scaling = 1 / math.sqrt(dim) if scale is None else scale
    query_XnRd = _query_tiles(query, sharing)
    state = _Seen(query_XnRd, value.shape[-1])
    rows_nR = torch.arange(query_XnRd.shape[1] * QUERY_ROWS).view(-1, QUERY_ROWS).div(sharing, rounding_mode="floor")
    for start in range(0, key.shape[2], KEYS):
        first = start * sharing // QUERY_ROWS if causal else 0
        key_XKd, value_XKe = (_key_tile(part, start) for part in (key, value))
        hidden = start + torch.arange(KEYS) >= key.shape[2]
        if causal:
            hidden = hidden | (start + torch.arange(KEYS) > rows_nR[first:, :, None])
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        if mask is not None:
            bias = bias + _mask_tile(mask, start, query, sharing)
        state.see(first, key_XKd, value_XKe, bias, scaling)
    return _untiled(state.result(), batch, heads, rows).to(query.dtype)


def _query_tiles(query: Tensor, sharing: int) -> Tensor:
    """fp32 [B · G, n, R, d]: the rows of the heads that share keys, position by position, in tiles."""
    batch, heads, rows, dim = query.shape
    query_BGLJd = query.float().unflatten(1, (-1, sharing)).transpose(2, 3)
    flat = query_BGLJd.reshape(batch * heads // sharing, rows * sharing, dim)
    return F.pad(flat, (0, 0, 0, -flat.shape[1] % QUERY_ROWS)).unflatten(1, (-1, QUERY_ROWS))


def _untiled(tiles_XnRe: Tensor, batch: int, heads: int, rows: int) -> Tensor:
    """[B, H, L, e]: the opposite of `_query_tiles`."""
    sharing = batch * heads // len(tiles_XnRe)
    flat = tiles_XnRe.flatten(1, 2)[:, : rows * sharing]
    return flat.view(batch, heads // sharing, rows, sharing, -1).transpose(2, 3).reshape(batch, heads, rows, -1)


def _key_tile(part: Tensor, start: int) -> Tensor:
    """fp32 [B · G, KEYS, d] of keys or values from `start` on, filled up with zeros."""
    tile = part[:, :, start : start + KEYS].float()
    return F.pad(tile, (0, 0, 0, KEYS - tile.shape[2])).flatten(0, 1)


def _mask_tile(mask: Tensor, start: int, query: Tensor, sharing: int) -> Tensor:
    """What to add to the scores of a tile of keys, [X, n, R, KEYS], from a mask that broadcasts to [B, H, L, K]."""
    tile = mask[..., start : start + KEYS]
    if tile.dtype == torch.bool:
        tile = torch.zeros(tile.shape).masked_fill_(~tile, -torch.inf)
    tile = F.pad(tile.float(), (0, KEYS - tile.shape[-1]))
    return _query_tiles(tile.expand(*query.shape[:3], KEYS), sharing)


class _Seen:
    """The running softmax of every query row: maximum, sum of weights, weighted sum of values."""

    def __init__(self, query_XnRd: Tensor, value_dim: int) -> None:
        self._query = query_XnRd
        self._maximum = query_XnRd.new_full((*query_XnRd.shape[:3], 1), -torch.inf)
        self._total = torch.zeros_like(self._maximum)
        self._values = query_XnRd.new_zeros(*query_XnRd.shape[:3], value_dim)

    def see(self, first: int, key_XKd: Tensor, value_XKe: Tensor, bias: Tensor, scaling: float) -> None:
        """One tile of keys, by the query tiles from number `first` on."""
        query = self._query[:, first:]
        scores = _tile_products(query, key_XKd.transpose(1, 2)).mul_(scaling).add_(bias)
        before = self._maximum[:, first:]
        maximum = torch.maximum(before, scores.amax(-1, keepdim=True))
        finite = maximum.masked_fill(maximum == -torch.inf, 0)
        weights, fading = scores.sub_(finite).exp_(), (before - finite).exp_()
        self._total[:, first:] = self._total[:, first:] * fading + weights.sum(-1, keepdim=True)
        self._values[:, first:] = self._values[:, first:] * fading + _tile_products(weights, value_XKe)
        self._maximum[:, first:] = maximum

    def result(self) -> Tensor:
        """[X, n, R, e]."""
        return self._values / self._total


def _tile_products(left_XnRi: Tensor, right_Xio: Tensor) -> Tensor:
    """[X, n, R, o]: every tile of the left by the matrix of its X."""
    tiles = left_XnRi.shape[1]
    right = right_Xio[:, None].expand(-1, tiles, -1, -1).reshape(-1, *right_Xio.shape[1:])
    return torch.bmm(left_XnRi.reshape(-1, *left_XnRi.shape[2:]), right).unflatten(0, (-1, tiles))


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.Tensor.addmm_: _add_product_,
    torch._grouped_mm: _grouped_product,  # what F.grouped_mm calls
    torch.sigmoid: _sigmoid,
    torch.Tensor.sigmoid: _sigmoid,
    F.silu: _silu,
    F.gelu: _gelu,
    F.scaled_dot_product_attention: _attention,
}
