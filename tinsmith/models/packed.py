"""Matrix products on a CPU with the weights kept once more, in the library's own order.

They are faster so, and a row has the same bits beside any number of others. The copy is in half precision, with
products in fp32, wherever that holds the very numbers of the weights: it does those of nearly every model published in
bfloat16. One row then takes a third of the time, for weights pass through memory half as wide. Knows no layers.

Shapes: `T` rows, `I` inputs, `O` outputs.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""[T, I] → [T, O], both in the dtype that the weights were packed for."""

_PACKED_FOR_ROWS = 64
_HALVES = ("fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation")
_LEAST_STEP = 2.0**-25  # half of the distance between the smallest numbers in half precision
_LOST_OF_FP32, _LOST_OF_BF16 = 2.0**-20, 2.0**-14  # of an output's weights, at most: what products' rounding hides
_COMPARED = 2**22  # numbers at a time


def best_dtype(dtype: torch.dtype) -> torch.dtype:
    """That in which a CPU multiplies matrices of this dtype best: bfloat16 only with instructions for it."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if native else torch.float32


def packed_itemsize(weights: torch.dtype, products: torch.dtype) -> int:
    """Bytes that a packed number takes, as far as can be said before the numbers are seen."""
    halves = products == torch.float32 and weights == torch.bfloat16 and _packs_halves()
    return 2 if halves else products.itemsize


def packed_product(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Product:
    """x Wᵀ + b of inputs in `dtype`."""
    bias = None if bias_O is None else bias_O.to(dtype)
    if dtype == torch.float32 and _packs_halves() and _fits_half(weight_OI):
        return _in_halves(weight_OI, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.to(dtype).contiguous(), _PACKED_FOR_ROWS)
    operation = torch.ops.mkldnn._linear_pointwise.default
    nothing_fused: list[Any] = []

    def product(x_TI: Tensor) -> Tensor:
        y_TO: Tensor = operation(x_TI, packed, bias, "none", nothing_fused, "")
        return y_TO

    return product


def _in_halves(weight_OI: Tensor, bias: Tensor | None) -> Product:
    added = weight_OI.new_zeros(weight_OI.shape[0], dtype=torch.float32) if bias is None else bias
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fbgemm_", UserWarning)
        packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_OI.float().contiguous())
        operation = torch.fbgemm_linear_fp16_weight_fp32_activation
        operation(added.new_zeros(1, weight_OI.shape[1]), packed, added)  # warns once, here

    def product(x_TI: Tensor) -> Tensor:
        return operation(x_TI, packed, added)

    return product


def _packs_halves() -> bool:
    """Whether this torch and this processor multiply with weights in half precision. Torch means to drop it one day."""
    return "fbgemm" in torch.backends.quantized.supported_engines and all(hasattr(torch, name) for name in _HALVES)


def _fits_half(weight_OI: Tensor) -> bool:
    """Whether half precision holds these numbers, but for what no output would show.

    Numbers next to nothing lose some of their digits: too many where all weights of an output are as small. Outputs
    that are nothing beside the others, such as the logits of tokens that were never trained, may lose all.
    """
    lost: list[Tensor] = []
    norms: list[Tensor] = []
    for part_OI in weight_OI.split(max(1, _COMPARED // weight_OI.shape[1])):
        wide_OI = part_OI.float()
        lost_OI = wide_OI.half().float().sub_(wide_OI)
        if not lost_OI.abs().max() <= _LEAST_STEP:  # nor if there is NaN
            return False
        for each, of_OI in ((lost, lost_OI), (norms, wide_OI)):
            each.append(torch.linalg.vector_norm(of_OI, dim=1, dtype=torch.float64))
    lost_O, norm_O = torch.cat(lost), torch.cat(norms)
    most = _LOST_OF_FP32 if weight_OI.dtype == torch.float32 else _LOST_OF_BF16
    nothing_O = norm_O <= most * norm_O.square().mean().sqrt()
    return bool(((lost_O <= most * norm_O) | nothing_O).all())
