"""Triton kernels of sampling on a GPU: keys and values into the paged cache, attention over it, and the next tokens.

Every number that changes from step to step is taken from device memory, so that a captured graph can be replayed.
Knows tensors only. Needs Triton.

Shapes: `T` rows of a pass, `N` those of a decoding step (one of each sequence), `O` outputs of the product of queries,
keys and values, `H` query heads, `G` key/value heads, J = H / G, `d` head dimension, `S` slots of the cache, `W` blocks
of the longest sequence, `P` parts into which a sequence is cut, `V` vocabulary, `C` chunks of it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.models.kernels import head_halves, rotated_head
from tinsmith.models.launch import Kernel, blocks, power_of_two
from tinsmith.sampling.decoding import SAMPLE_STREAM

_TOKENS = 64  # of a sequence that a program looks at in one round
_MOST_PARTS = 32
_PROGRAMS = 1024  # of attention, that fill a large GPU
_CHUNK = 4096  # of the vocabulary, in one program
_HEADS = 8  # that one program turns and stores
_LEAST_ROWS = 16  # and columns, of a matrix product in Triton


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of one layer's attention. `window`: how many rows a row sees, its own included; None means all."""

    heads: int
    kv_heads: int
    width: int
    scaling: float
    window: int | None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of queries and keys; weights [d]."""

    query_d: Tensor
    key_d: Tensor
    eps: float


@triton.jit
def _store_heads(
    qkv_ptr,
    share_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    qkv_stride,
    share_stride,
    eps,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norms and rotates queries and keys in place; writes keys and values to their slots. Some heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    position = tl.load(positions_ptr + row).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    inside = (head < HEADS + 2 * KV_HEADS) & (column < HALF)
    turns = inside & (head < HEADS + KV_HEADS)
    is_key = turns & (head >= HEADS)
    is_value = inside & (head >= HEADS + KV_HEADS)
    first = row * qkv_stride + head * (2 * HALF)
    low, high = head_halves(qkv_ptr, first, HALF, COLUMNS, inside)
    if SHARE:
        place = row * share_stride + head * (2 * HALF)
        low_share, high_share = head_halves(share_ptr, place, HALF, COLUMNS, inside)
        low += low_share
        high += high_share
    angle = position * (2 * HALF) + column
    cos = tl.load(cos_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
    low_weight, high_weight = low, high
    if NORMED:
        nothing = tl.zeros_like(head)
        low_query, high_query = head_halves(q_weight_ptr, nothing, HALF, COLUMNS, inside)
        low_key, high_key = head_halves(k_weight_ptr, nothing, HALF, COLUMNS, inside)
        low_weight = tl.where(is_key, low_key, low_query)
        high_weight = tl.where(is_key, high_key, high_query)
    low_turned, high_turned = rotated_head(low, high, cos, sin, low_weight, high_weight, eps, NORMED, HALF)
    tl.store(qkv_ptr + first + column, low_turned, mask=turns)
    tl.store(qkv_ptr + first + HALF + column, high_turned, mask=turns)
    key_place = keys_ptr + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + column
    tl.store(key_place, low_turned, mask=is_key)
    tl.store(key_place + HALF, high_turned, mask=is_key)
    value_place = values_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + column
    tl.store(value_place, low, mask=is_value)
    tl.store(value_place + HALF, high, mask=is_value)


_STORE_HEADS = Kernel(_store_heads, warps=2)


def store_heads(
    qkv_TO: Tensor,
    share_TO: Tensor | None,
    slots: tuple[Tensor, Tensor],
    slots_T: Tensor,
    positions_T: Tensor,
    rotation: tuple[Tensor, Tensor],
    shape: HeadShape,
    norms: HeadNorms | None,
) -> None:
    """Norms and rotates the queries and keys of `qkv_TO` in place; keys and values go to `slots` [S, G, d].

    `share_TO`, if any, is added to all of them first; only the values in `qkv_TO` stay without it.
    `rotation`: cosines and sines by position, [positions, d].
    """
    share = qkv_TO if share_TO is None else share_TO
    normed, half = norms is not None, shape.width // 2
    weights = (norms.query_d, norms.key_d) if norms else (qkv_TO, qkv_TO)
    _STORE_HEADS(
        (len(qkv_TO), blocks(shape.heads + 2 * shape.kv_heads, _HEADS)),
        (qkv_TO, share, *slots, slots_T, positions_T, *rotation, *weights),
        (qkv_TO.stride(0), share.stride(0)),
        (norms.eps if norms else 0.0,),
        (share_TO is not None, shape.heads, shape.kv_heads, half, power_of_two(half), normed, _HEADS),
    )


@triton.jit
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    positions_ptr,
    output_ptr,
    sums_ptr,
    q_stride,
    table_stride,
    scaling,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The query heads that share one key/value head, of one sequence, over a part of its tokens.

    With one part the output is final; otherwise it is fp32, with each head's maximum and sum of weights beside it.
    """
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(positions_ptr + sequence).to(tl.int32) + 1
    start = 0
    if window > 0:
        start = tl.maximum(0, length - window)
    rounds = tl.cdiv(tl.cdiv(length - start, TOKENS), PARTS)
    begin = start + part * rounds * TOKENS
    end = tl.minimum(length, begin + rounds * TOKENS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    token = tl.arange(0, TOKENS)
    head = group * SHARING + row
    wide = column < WIDTH
    q = tl.load(
        q_ptr + sequence * q_stride + head[:, None] * WIDTH + column[None, :],
        mask=(row < SHARING)[:, None] & wide[None, :],
        other=0.0,
    )
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    factor = scaling * 1.4426950408889634
    for first in range(begin, end, TOKENS):
        place = first + token
        seen = place < end
        block = tl.load(tables_ptr + sequence * table_stride + place // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        cell = ((block * BLOCK_SIZE + place % BLOCK_SIZE) * KV_HEADS + group) * WIDTH
        loaded = seen[:, None] & wide[None, :]
        k = tl.load(keys_ptr + cell[:, None] + column[None, :], mask=loaded, other=0.0)
        v = tl.load(values_ptr + cell[:, None] + column[None, :], mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * factor
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None])
        most = higher
    wanted = (row < SHARING)[:, None] & wide[None, :]
    if PARTS == 1:
        result = result / total[:, None]
        target = output_ptr + (sequence * HEADS + head)[:, None] * WIDTH + column[None, :]
        tl.store(target, result.to(output_ptr.dtype.element_ty), mask=wanted)
    else:
        cell = (sequence * HEADS + head) * PARTS + part
        tl.store(output_ptr + cell[:, None] * WIDTH + column[None, :], result, mask=wanted)
        tl.store(sums_ptr + cell * 2, most, mask=row < SHARING)
        tl.store(sums_ptr + cell * 2 + 1, total, mask=row < SHARING)


@triton.jit
def _join(
    parts_ptr,
    sums_ptr,
    output_ptr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One head of one sequence from its parts."""
    cell = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, COLUMNS)
    most = tl.load(sums_ptr + (cell * PARTS + part) * 2)
    total = tl.load(sums_ptr + (cell * PARTS + part) * 2 + 1)
    factor = tl.exp2(most - tl.max(most, 0))
    values = tl.load(
        parts_ptr + (cell * PARTS + part)[:, None] * WIDTH + column[None, :], mask=(column < WIDTH)[None, :], other=0.0
    )
    result = tl.sum(values * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(output_ptr + cell * WIDTH + column, result.to(output_ptr.dtype.element_ty), mask=column < WIDTH)


def parts_of(rows: int, kv_heads: int) -> int:
    """Into how many parts sequences are cut, so that few of them fill the device, too."""
    parts = 1
    while parts < _MOST_PARTS and rows * kv_heads * parts < _PROGRAMS:
        parts *= 2
    return parts


def attend_rows(
    q_NO: Tensor,
    slots: tuple[Tensor, Tensor],
    tables_NW: Tensor,
    positions_N: Tensor,
    shape: HeadShape,
    block_size: int,
) -> Tensor:
    """[N, H · d]: every row over its own sequence, whose newest token it is; the queries come first in `q_NO`.

    `slots` are the cache's keys and values [S, G, d].
    """
    rows, parts = len(q_NO), parts_of(len(q_NO), shape.kv_heads)
    output = q_NO.new_empty(rows, shape.heads * shape.width)
    split = (
        output
        if parts == 1
        else torch.empty(rows, shape.heads, parts, shape.width, dtype=torch.float32, device=q_NO.device)
    )
    sums = output if parts == 1 else torch.empty(rows, shape.heads, parts, 2, dtype=torch.float32, device=q_NO.device)
    sharing = shape.heads // shape.kv_heads
    columns = max(_LEAST_ROWS, triton.next_power_of_2(shape.width))
    kernel: Any = _attend[(rows, shape.kv_heads, parts)]
    kernel(
        q_NO,
        *slots,
        tables_NW,
        positions_N,
        split,
        sums,
        q_NO.stride(0),
        tables_NW.stride(0),
        shape.scaling,
        shape.window or 0,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        SHARING=sharing,
        ROWS=max(_LEAST_ROWS, triton.next_power_of_2(sharing)),
        WIDTH=shape.width,
        COLUMNS=columns,
        BLOCK_SIZE=block_size,
        TOKENS=_TOKENS,
        PARTS=parts,
        num_warps=4,
        num_stages=3,
    )
    if parts > 1:
        join: Any = _join[(rows * shape.heads,)]
        join(split, sums, output, WIDTH=shape.width, COLUMNS=columns, PARTS=parts, num_warps=2)
    return output


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    value = (value ^ (value >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return value ^ (value >> 31)


@triton.jit
def _uniform(seed, major, minor, STREAM: tl.constexpr):
    """`decoding.uniforms` of one row."""
    step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    state = _mix(seed.to(tl.uint64) + step * (STREAM + 1))
    state = _mix(state + major.to(tl.uint64) * step + 1)
    state = _mix(state + minor.to(tl.uint64) * step + 2)
    return (state >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _summarize(logits_ptr, most_ptr, sums_ptr, best_ptr, inverse_ptr, stride, vocabulary, chunks, CHUNK: tl.constexpr):
    """Of one chunk of one row: the largest logit, where it is, and the sum of the weights relative to it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    most = tl.max(logits, 0)
    inverse = tl.load(inverse_ptr + row)
    weights = tl.where(token < vocabulary, tl.exp((logits - most) * inverse), 0.0)
    tl.store(most_ptr + row * chunks + chunk, most)
    tl.store(sums_ptr + row * chunks + chunk, tl.sum(weights, 0))
    tl.store(best_ptr + row * chunks + chunk, chunk * CHUNK + tl.argmax(logits, 0))


@triton.jit
def _choose(
    logits_ptr,
    most_ptr,
    sums_ptr,
    best_ptr,
    inverse_ptr,
    greedy_ptr,
    seeds_ptr,
    samples_ptr,
    counts_ptr,
    tokens_ptr,
    positions_ptr,
    steps_ptr,
    chosen_ptr,
    logprobs_ptr,
    stride,
    room,
    vocabulary,
    chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Draws one row's token by inverting its cumulative distribution, and makes everything ready for its next row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, CHUNKS)
    known = index < chunks
    mosts = tl.load(most_ptr + row * chunks + index, mask=known, other=float("-inf"))
    most = tl.max(mosts, 0)
    inverse = tl.load(inverse_ptr + row)
    sums = tl.load(sums_ptr + row * chunks + index, mask=known, other=0.0)
    sums = tl.where(known, sums * tl.exp((mosts - most) * inverse), 0.0).to(tl.float64)
    total = tl.sum(sums, 0)
    count = tl.load(counts_ptr + row)
    uniform = _uniform(tl.load(seeds_ptr + row), tl.load(samples_ptr + row), count, STREAM)
    target = uniform * total
    before = tl.cumsum(sums, 0)
    chunk = tl.minimum(tl.sum((before <= target).to(tl.int32), 0), chunks - 1)
    inner = target - tl.sum(tl.where(index < chunk, sums, 0.0), 0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocabulary
    logits = tl.load(logits_ptr + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    weights = tl.where(inside, tl.exp((logits - most) * inverse), 0.0)
    passed = tl.cumsum(weights.to(tl.float64), 0) <= inner
    possible = (weights > 0) & (passed == 0)
    drawn = tl.min(tl.where(possible, token, vocabulary), 0)
    # Rounding can put the target behind the chunk's last weight.
    last = tl.max(tl.where(weights > 0, token, chunk * CHUNK), 0)
    drawn = tl.where(drawn < vocabulary, drawn, tl.minimum(last, vocabulary - 1))
    best_chunk = tl.argmax(mosts, 0)
    best = tl.load(best_ptr + row * chunks + best_chunk)
    chosen = tl.where(tl.load(greedy_ptr + row) != 0, best, drawn)
    chosen = tl.minimum(chosen, vocabulary - 1)  # whatever not finite logits led to
    logit = tl.load(logits_ptr + row * stride + chosen).to(tl.float32)
    logprob = (logit - most) * inverse - tl.log(total).to(tl.float32)
    step = tl.load(steps_ptr + row)
    tl.store(chosen_ptr + row * room + step, chosen)
    tl.store(logprobs_ptr + row * room + step, logprob)
    tl.store(tokens_ptr + row, chosen.to(tl.int64))
    tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)
    tl.store(counts_ptr + row, count + 1)
    tl.store(steps_ptr + row, step + 1)


@dataclass(frozen=True, slots=True)
class RowState:
    """What each row of a decoding step goes by; advanced by `choose_tokens`, read and written by the host between.

    `inverse_N` is 1 / temperature (1 for a greedy row). Row n's results of step s go to [n, s] of `chosen_Ns` and
    `logprobs_Ns`; `steps_N` says how many are there. int64 unless said otherwise.
    """

    tokens_N: Tensor  # the newest token, to be run next
    positions_N: Tensor  # its position
    counts_N: Tensor  # tokens sampled so far
    samples_N: Tensor  # the sample's index in its request
    seeds_N: Tensor  # the bits of an unsigned number
    greedy_N: Tensor  # whether the most likely token is taken
    steps_N: Tensor
    inverse_N: Tensor  # fp32
    chosen_Ns: Tensor  # int32
    logprobs_Ns: Tensor  # fp32; not finite if the row's logits are not

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device) -> "RowState":
        integers_7N = torch.zeros(7, rows, dtype=torch.int64, device=device)
        return cls(
            tokens_N=integers_7N[0],
            positions_N=integers_7N[1],
            counts_N=integers_7N[2],
            samples_N=integers_7N[3],
            seeds_N=integers_7N[4],
            greedy_N=integers_7N[5],
            steps_N=integers_7N[6],
            inverse_N=torch.ones(rows, dtype=torch.float32, device=device),
            chosen_Ns=torch.zeros(rows, steps, dtype=torch.int32, device=device),
            logprobs_Ns=torch.zeros(rows, steps, dtype=torch.float32, device=device),
        )

    def first(self, rows: int) -> "RowState":
        """Views of the first rows."""
        return replace(self, **{field.name: getattr(self, field.name)[:rows] for field in fields(self)})


def choose_tokens(logits_NV: Tensor, state: RowState) -> None:
    """Draws a token for every row as `decoding.TokenDistributions` does, without top-k and top-p; advances `state`."""
    rows, vocabulary = logits_NV.shape
    chunks = -(-vocabulary // _CHUNK)
    device = logits_NV.device
    most, sums = (torch.empty(rows, chunks, dtype=torch.float32, device=device) for _ in range(2))
    best = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    summarize: Any = _summarize[(rows, chunks)]
    summarize(
        logits_NV, most, sums, best, state.inverse_N, logits_NV.stride(0), vocabulary, chunks, CHUNK=_CHUNK, num_warps=8
    )
    choose: Any = _choose[(rows,)]
    choose(
        logits_NV,
        most,
        sums,
        best,
        state.inverse_N,
        state.greedy_N,
        state.seeds_N,
        state.samples_N,
        state.counts_N,
        state.tokens_N,
        state.positions_N,
        state.steps_N,
        state.chosen_Ns,
        state.logprobs_Ns,
        logits_NV.stride(0),
        state.chosen_Ns.stride(0),
        vocabulary,
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        CHUNK=_CHUNK,
        STREAM=SAMPLE_STREAM,
        num_warps=8,
    )
