"""Elementwise work of decoder layers as few kernels, for CUDA devices: norms, rotary positions, gated activations.

Written in Triton, which CPU installations of torch lack: only CUDA code imports this module. Numbers are read and
written in the dtype of the tensors and computed in fp32. Knows no adapters and no attention.

Shapes: `T` rows of a packed batch, `D` hidden size, `P` width of the feed-forward network, `d` head dimension, `O` all
heads of queries, keys and values side by side; queries have `heads` of them, keys and values `kv_heads` each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.models.launch import Kernel, blocks, power_of_two

_TILE = 16  # heads that one program turns at once, of one or several rows
_SUMMED_TILES = 8  # of which one program sums the gradients in the weights
_COLUMNS = 1024  # of the feed-forward network that one program computes
VOCABULARY_BLOCK = 4096
"""Logits of a row that are read at once."""


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, share_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the normalised sum, the sum) of x, the residual, and a share if any, in the dtype of x.

    Without a residual there is no share, and the sum is x.
    """
    rows, width = x_TD.shape
    normed_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    added = residual_TD is not None
    residual_TD = x_TD if residual_TD is None else residual_TD
    shared = share_TD is not None
    share_TD = x_TD if share_TD is None else share_TD
    sum_TD = torch.empty_like(normed_TD) if added else x_TD
    block = power_of_two(width)
    _ADD_RMS_NORM(
        (rows,),
        (x_TD, residual_TD, share_TD, weight_D, normed_TD, sum_TD),
        (x_TD.stride(0), residual_TD.stride(0), share_TD.stride(0), width),
        (eps,),
        (added, shared, block),
        warps_for(block),
    )
    return normed_TD, sum_TD


def swiglu(gate_up_TP: Tensor, share_TP: Tensor | None = None) -> Tensor:
    """silu(gate) · up [T, P], of [T, 2 P] with the gates first, and a share to be added to both."""
    rows, width = gate_up_TP.shape[0], gate_up_TP.shape[1] // 2
    out_TP = gate_up_TP.new_empty(rows, width)
    grid = (rows, blocks(width, _COLUMNS))
    share = gate_up_TP if share_TP is None else share_TP
    sizes = (gate_up_TP.stride(0), share.stride(0), width)
    _SWIGLU(grid, (gate_up_TP, share, out_TP), sizes, (), (share_TP is not None, _COLUMNS))
    return out_TP


def norm_rope(
    qkv_TO: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    q_weight_d: Tensor | None,
    k_weight_d: Tensor | None,
    eps: float,
    heads: int,
    kv_heads: int,
    d: int,
    out_TO: Tensor | None = None,
) -> Tensor:
    """Normalises (if there are weights) and rotates the queries and keys of `qkv_TO`; values stay as they are.

    In place, or into the columns of `out_TO` that belong to queries and keys.
    """
    out_TO = qkv_TO if out_TO is None else out_TO
    rows, share = qkv_TO.shape[0], _heads_at_once(heads, kv_heads)
    weights = (qkv_TO if q_weight_d is None else q_weight_d, qkv_TO if k_weight_d is None else k_weight_d)
    _NORM_ROPE(
        (blocks(rows, _TILE // share), (heads + kv_heads) // share),
        (qkv_TO, out_TO, cos_Td, sin_Td, *weights),
        (qkv_TO.stride(0), out_TO.stride(0), cos_Td.stride(0), sin_Td.stride(0), heads),
        (rows, eps),
        (q_weight_d is not None, share, _TILE, d // 2, power_of_two(d // 2)),
    )
    return out_TO


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """(the gradient in x, plus the residual's; the normalised x once more), from that in the normalised x.

    All are contiguous.
    """
    rows, width = x_TD.shape
    dx_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    block = power_of_two(width)
    tensors = (dy_TD, x_TD, weight_D, residual_TD, dx_TD, normed_TD)
    _RMS_NORM_BACKWARD((rows,), tensors, (width,), (eps,), (block,), warps_for(block))
    return dx_TD, normed_TD


def norm_rope_backward(
    dqkv_THd: tuple[Tensor, Tensor, Tensor],
    qkv_TO: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    q_weight_d: Tensor | None,
    k_weight_d: Tensor | None,
    eps: float,
    gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient [T, O] in what `norm_rope` was given, from those in queries [T, heads, d], keys and values.

    Their last dimension is contiguous; `qkv_TO` holds what `norm_rope` was given. Those of the weights are added to
    `gradients`, in fp32, if given.
    """
    dq, dk, dv = dqkv_THd
    rows, heads, d = dq.shape
    kv_heads = dk.shape[1]
    dqkv_TO = qkv_TO.new_empty(rows, (heads + 2 * kv_heads) * d)
    share = _heads_at_once(heads, kv_heads)
    weights = (qkv_TO if q_weight_d is None else q_weight_d, qkv_TO if k_weight_d is None else k_weight_d)
    strides = (dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1))
    tiles = 1 if gradients is None else _SUMMED_TILES
    row_blocks, parts = blocks(rows, tiles * (_TILE // share)), dqkv_TO
    if gradients is not None:
        parts = gradients[0].new_empty((heads + kv_heads) // share, row_blocks, d)
    _NORM_ROPE_BACKWARD(
        (row_blocks, (heads + 2 * kv_heads) // share),
        (dq, dk, dv, qkv_TO, dqkv_TO, cos_Td, sin_Td, *weights, parts),
        (*strides, qkv_TO.stride(0), dqkv_TO.stride(0), cos_Td.stride(0), sin_Td.stride(0), heads, kv_heads),
        (rows, eps),
        (q_weight_d is not None, gradients is not None, tiles, share, _TILE, d // 2, power_of_two(d // 2)),
    )
    if gradients is not None:
        for gradient_d, part in zip(gradients, parts.tensor_split([heads // share]), strict=True):
            gradient_d.add_(part.sum((0, 1)))
    return dqkv_TO


def softmax_less_one(
    logits_CV: Tensor, tokens_C: Tensor, dtype: torch.dtype, out_CV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the probabilities [C, V] in `dtype`, less one at each row's token; the logsumexp [C, 1] of each row).

    `logits_CV` is fp32; the difference is rounded only once. `out_CV` (contiguous), if given, is the first result.
    """
    rows, width = logits_CV.shape
    less_CV = torch.empty_like(logits_CV, dtype=dtype) if out_CV is None else out_CV
    logsumexp_C1 = logits_CV.new_empty(rows, 1)
    tensors = (logits_CV, less_CV, logsumexp_C1, tokens_C)
    _SOFTMAX_LESS_ONE((rows,), tensors, (logits_CV.stride(0), width), (), (VOCABULARY_BLOCK,))
    return less_CV, logsumexp_C1


def warps_for(block: int) -> int:
    """How many warps share so many numbers of a row."""
    return min(max(block // 256, 1), 16)


def _heads_at_once(heads: int, kv_heads: int) -> int:
    """The largest power of two of heads, up to a tile, that are of one kind wherever they begin at a multiple."""
    both = heads | kv_heads | _TILE
    return both & -both


@triton.jit
def _add_rms_norm(
    x_ptr,
    residual_ptr,
    share_ptr,
    weight_ptr,
    normed_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    share_stride,
    width,
    eps,
    ADD: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + columns, inside, other=0.0)
        total = x.to(tl.float32) + residual.to(tl.float32)
        if SHARE:
            total += tl.load(share_ptr + row * share_stride + columns, inside, other=0.0).to(tl.float32)
        x = total.to(x.dtype)
        tl.store(sum_ptr + row * width + columns, x, inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * width + columns, x * scale * weight, inside)


@triton.jit
def _swiglu(gate_up_ptr, share_ptr, out_ptr, stride, share_stride, width, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * stride + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + columns, inside, other=0.0).to(tl.float32)
    if SHARE:
        gate += tl.load(share_ptr + row * share_stride + columns, inside, other=0.0).to(tl.float32)
        up += tl.load(share_ptr + row * share_stride + width + columns, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def gated_gradients(gate, up, dout):
    """(silu(gate) · up, the gradient in gate, that in up), from the gradient in the first; all fp32."""
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    return active * up, dout * up * (sigmoid + active * (1 - sigmoid)), dout * active


@triton.jit
def head_halves(ptr, first, HALF: tl.constexpr, BLOCK: tl.constexpr, inside):
    """fp32 [N, BLOCK] twice: both halves of the heads that begin at the offsets `first` [N, 1] from `ptr`."""
    columns = tl.arange(0, BLOCK)[None, :]
    mask = inside & (columns < HALF)
    low = tl.load(ptr + first + columns, mask, other=0.0).to(tl.float32)
    return low, tl.load(ptr + first + HALF + columns, mask, other=0.0).to(tl.float32)


@triton.jit
def _halves_of_kind(
    is_query, query_ptr, key_ptr, query_first, key_first, HALF: tl.constexpr, BLOCK: tl.constexpr, inside
):
    """`head_halves` of queries or of keys, each from offsets of its own."""
    if is_query:
        low, high = head_halves(query_ptr, query_first, HALF, BLOCK, inside)
    else:
        low, high = head_halves(key_ptr, key_first, HALF, BLOCK, inside)
    return low, high


@triton.jit
def _angles(cos_ptr, sin_ptr, row, cos_stride, sin_stride, columns, mask):
    """fp32 cosines and sines [N, BLOCK] of these rows' positions."""
    cos = tl.load(cos_ptr + row * cos_stride + columns, mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + row * sin_stride + columns, mask, other=0.0).to(tl.float32)


@triton.jit
def rotated_head(low, high, cos, sin, low_weight, high_weight, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    """Both halves [N, BLOCK] of N heads in fp32, normalised if `NORM`, and turned by `cos` and `sin` of their rows."""
    if NORM:
        squares = tl.sum(low * low + high * high, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        low = low * scale * low_weight
        high = high * scale * high_weight
    return low * cos - high * sin, high * cos + low * sin


@triton.jit(do_not_specialize=["rows"])
def _norm_rope(
    in_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    in_stride,
    out_stride,
    cos_stride,
    sin_stride,
    heads,
    rows,
    eps,
    NORM: tl.constexpr,
    SHARE: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, TILE)
    row = (tl.program_id(0) * (TILE // SHARE) + index // SHARE).to(tl.int64)[:, None]
    head = tl.program_id(1) * SHARE
    first = (head + index % SHARE)[:, None] * (2 * HALF)
    inside = row < rows
    low, high = head_halves(in_ptr + row * in_stride, first, HALF, BLOCK, inside)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = inside & (columns < HALF)
    cos, sin = _angles(cos_ptr, sin_ptr, row, cos_stride, sin_stride, columns, mask)
    low_weight, high_weight = low, high
    if NORM:
        zero = tl.zeros_like(first)
        low_weight, high_weight = _halves_of_kind(
            head < heads, q_weight_ptr, k_weight_ptr, zero, zero, HALF, BLOCK, inside
        )
    low, high = rotated_head(low, high, cos, sin, low_weight, high_weight, eps, NORM, HALF)
    tl.store(out_ptr + row * out_stride + first + columns, low, mask)
    tl.store(out_ptr + row * out_stride + first + HALF + columns, high, mask)


@triton.jit
def _rms_norm_backward(dy_ptr, x_ptr, weight_ptr, residual_ptr, dx_ptr, normed_ptr, width, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + start + columns, inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + start + columns, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + start + columns, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / width + eps)
    normal = x * scale
    inner = dy * weight
    dx = scale * (inner - normal * (tl.sum(inner * normal) / width)) + residual
    tl.store(dx_ptr + start + columns, dx, inside)
    tl.store(normed_ptr + start + columns, normal * weight, inside)


@triton.jit
def _norm_backward(dlow, dhigh, low, high, low_weight, high_weight, eps, HALF: tl.constexpr):
    """The gradient in both halves of heads, and in their weights, from that in the normalised ones."""
    scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
    low = low * scale
    high = high * scale
    low_part = dlow * low
    high_part = dhigh * high
    dlow = dlow * low_weight
    dhigh = dhigh * high_weight
    overlap = (tl.sum(dlow * low + dhigh * high, 1) / (2 * HALF))[:, None]
    return scale * (dlow - low * overlap), scale * (dhigh - high * overlap), low_part, high_part


@triton.jit
def _store_part(parts_ptr, low_total, high_total, is_normed, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The program's part [d] of the gradient in a norm's weight, from what each of its heads adds."""
    half = tl.arange(0, BLOCK)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    ptrs = parts_ptr + block * (2 * HALF) + half
    mask = (half < HALF) & is_normed
    tl.store(ptrs, tl.sum(low_total, 0), mask)
    tl.store(ptrs + HALF, tl.sum(high_total, 0), mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_rope_backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    in_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    parts_ptr,
    dq_stride,
    dq_head_stride,
    dk_stride,
    dk_head_stride,
    dv_stride,
    dv_head_stride,
    in_stride,
    out_stride,
    cos_stride,
    sin_stride,
    heads,
    kv_heads,
    rows,
    eps,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    SHARE: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, TILE)
    head = tl.program_id(1) * SHARE
    within = (index % SHARE)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    low_total = tl.zeros((TILE, BLOCK), tl.float32)
    high_total = tl.zeros((TILE, BLOCK), tl.float32)
    for tile in range(TILES):
        row = ((tl.program_id(0) * TILES + tile) * (TILE // SHARE) + index // SHARE).to(tl.int64)[:, None]
        inside = row < rows
        mask = inside & (columns < HALF)
        low_out = out_ptr + row * out_stride + (head + within) * (2 * HALF) + columns
        if head >= heads + kv_heads:
            first = row * dv_stride + (head - heads - kv_heads + within) * dv_head_stride
            dlow, dhigh = head_halves(dv_ptr, first, HALF, BLOCK, inside)
            tl.store(low_out, dlow, mask)
            tl.store(low_out + HALF, dhigh, mask)
        else:
            query_first = row * dq_stride + (head + within) * dq_head_stride
            key_first = row * dk_stride + (head - heads + within) * dk_head_stride
            dlow, dhigh = _halves_of_kind(head < heads, dq_ptr, dk_ptr, query_first, key_first, HALF, BLOCK, inside)
            cos, sin = _angles(cos_ptr, sin_ptr, row, cos_stride, sin_stride, columns, mask)
            back_low = dlow * cos + dhigh * sin
            back_high = dhigh * cos - dlow * sin
            if NORM:
                first = row * in_stride + (head + within) * (2 * HALF)
                low, high = head_halves(in_ptr, first, HALF, BLOCK, inside)
                low_weight, high_weight = _halves_of_kind(
                    head < heads, q_weight_ptr, k_weight_ptr, within * 0, within * 0, HALF, BLOCK, inside
                )
                back_low, back_high, low_part, high_part = _norm_backward(
                    back_low, back_high, low, high, low_weight, high_weight, eps, HALF
                )
                low_total += low_part
                high_total += high_part
            tl.store(low_out, back_low, mask)
            tl.store(low_out + HALF, back_high, mask)
    if PARTS:
        _store_part(parts_ptr, low_total, high_total, head < heads + kv_heads, HALF, BLOCK)


@triton.jit
def logsumexp(logits_ptr, width, BLOCK: tl.constexpr):
    """Of `width` fp32 logits."""
    columns = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        logits = tl.load(logits_ptr + start + columns, start + columns < width, other=-float("inf"))
        larger = tl.maximum(most, logits)
        base = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(most - base) + tl.exp(logits - base)
        most = larger
    peak = tl.max(most)
    return peak + tl.log(tl.sum(total * tl.exp(most - peak)))


@triton.jit
def _softmax_less_one(logits_ptr, less_ptr, logsumexp_ptr, tokens_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    less_ptr += row * width
    columns = tl.arange(0, BLOCK)
    normalizer = logsumexp(logits_ptr, width, BLOCK)
    tl.store(logsumexp_ptr + row, normalizer)
    token = tl.load(tokens_ptr + row)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        logits = tl.load(logits_ptr + start + columns, inside, other=0.0)
        less = tl.exp(logits - normalizer) - tl.where(start + columns == token, 1.0, 0.0)
        tl.store(less_ptr + start + columns, less, inside)


_ADD_RMS_NORM = Kernel(_add_rms_norm)
_SWIGLU = Kernel(_swiglu)
_NORM_ROPE = Kernel(_norm_rope)
_RMS_NORM_BACKWARD = Kernel(_rms_norm_backward)
_NORM_ROPE_BACKWARD = Kernel(_norm_rope_backward)
_SOFTMAX_LESS_ONE = Kernel(_softmax_less_one, warps=8)
