"""Launches Triton kernels at a fraction of the usual cost on the CPU.

Triton's own way takes so long that a layer's launches outlast what the device does for a few thousand rows. Here what a
kernel was compiled for is looked up by the values it depends on, and its launcher called directly. Knows no kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

_ALIGNMENT = 16  # bytes; kernels are compiled for pointers that are multiples of it
_DIRECT = triton.__version__.startswith("3.6.")
"""Whether the launcher's parameters are known, which are no public interface; else Triton's own way is taken."""


class Kernel:
    """A kernel whose parameters are pointers, sizes, values and constants, in this order.

    It is compiled for each combination of the sizes and constants; values must not be specialised
    (`do_not_specialize`).
    """

    def __init__(self, function: Any, *, warps: int = 4, stages: int = 3) -> None:
        self._function = function
        self._options = {"num_warps": warps, "num_stages": stages}
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor],
        sizes: tuple[int, ...],
        values: tuple[int | float, ...],
        constants: tuple[int, ...],
        warps: int = 0,
    ) -> None:
        """`grid` has one to three dimensions; `warps` other than 0 replaces the kernel's own number."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        device = tensors[0].device.index
        key = (device, sizes, constants, warps, *[tensor.dtype for tensor in tensors])
        compiled = self._compiled.get(key)
        unaligned = any(map((_ALIGNMENT - 1).__and__, pointers))
        if compiled is None or unaligned:
            options = self._options | ({"num_warps": warps} if warps else {})
            kernel = self._function[grid](*tensors, *sizes, *values, *constants, **options)
            if _DIRECT and kernel is not None and not unaligned:
                self._compiled[key] = (kernel.run, kernel.function, kernel.packed_metadata)
            return
        run, function, metadata = compiled
        columns, layers = (*grid, 1, 1)[1:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(
            grid[0],
            columns,
            layers,
            stream,
            function,
            metadata,
            None,
            None,
            None,
            *pointers,
            *sizes,
            *values,
            *constants,
        )


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(1 << (number - 1).bit_length(), least)


def blocks(number: int, size: int) -> int:
    """How many blocks of `size` cover so many. (Triton's own function costs microseconds.)"""
    return -(-number // size)
