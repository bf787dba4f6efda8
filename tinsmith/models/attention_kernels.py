"""The kernel that makes one attention of two: of the same queries over different keys.

Shapes: `T` rows of a packed batch, `S` some of them, `H` query heads, `d` head dimension.
"""

import triton
import triton.language as tl
from torch import Tensor

from tinsmith.models.launch import Kernel, power_of_two


def merge_attention(
    out_THd: Tensor, logsumexp_HT: Tensor, more_SHd: Tensor, more_logsumexp_HS: Tensor, rows_S: Tensor
) -> None:
    """Rows `rows_S` of the output, and of the fp32 logsumexps, become those of attention to both sets of keys.

    Each part is weighted by its share of the scores' exponentials. All tensors are contiguous; `rows_S` is int64.
    """
    rows, heads, width = out_THd.shape
    tensors = (out_THd, logsumexp_HT, more_SHd, more_logsumexp_HS, rows_S)
    constants = (power_of_two(heads), power_of_two(width))
    _MERGE((len(rows_S),), tensors, (heads, width), (rows, len(rows_S)), constants)


@triton.jit(do_not_specialize=["rows", "more_rows"])
def _merge(
    out_ptr,
    logsumexp_ptr,
    more_ptr,
    more_logsumexp_ptr,
    rows_ptr,
    heads,
    width,
    rows,
    more_rows,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    more_row = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + more_row)
    head, column = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    logsumexp_ptrs = logsumexp_ptr + head * rows + row
    one = tl.load(logsumexp_ptrs, head < heads, 0.0)
    other = tl.load(more_logsumexp_ptr + head * more_rows + more_row, head < heads, 0.0)
    largest = tl.maximum(one, other)
    both = largest + tl.log(tl.exp(one - largest) + tl.exp(other - largest))
    tl.store(logsumexp_ptrs, both, head < heads)
    places = head[:, None] * width + column[None, :]
    inside = (head < heads)[:, None] & (column < width)[None, :]
    out_ptrs = out_ptr + row * heads * width + places
    mine = tl.load(out_ptrs, inside, 0.0).to(tl.float32) * tl.exp(one - both)[:, None]
    more = tl.load(more_ptr + more_row * heads * width + places, inside, 0.0).to(tl.float32)
    tl.store(out_ptrs, (mine + more * tl.exp(other - both)[:, None]).to(out_ptr.dtype.element_ty), inside)


_MERGE = Kernel(_merge)
