"""What one datum of a custom loss may take of the machine: memory for its tensors, and work to compute them.

Both are bounded by what the datum has itself, so that many small datums together cannot take much either. Knows shapes
only, and which of torch's functions take more than their results show.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.errors import UserError

MAX_ELEMENTS = 2**25  # of all nodes' tensors together, for one datum
MAX_WORK = 2**31  # numbers read and written, likewise
MAX_PARTS = 2**16  # tensors that one operation makes
MAX_DIFFERENCES = 8  # of differences

_TENSOR = 32  # elements that count for a tensor itself, whose memory is mostly not its numbers
_FLOPS = 8  # multiplications of a matrix product that take as long as a number read or written
_SORTING = 16  # as long as so many
_PARTING = {"unbind": 1, "split": 2, "chunk": 2}  # the place of `dim` in their arguments
_PRODUCTS = frozenset({"matmul", "mm", "mv", "dot"})
_SORTS = frozenset({"sort", "argsort", "topk", "median"})
_PAIRED = frozenset({"huber_loss", "smooth_l1_loss", "mse_loss", "l1_loss"})
_OTHERS = ("input", "self", "other", "mat2", "vec2", "tensor", "target")


class CustomLossError(UserError):
    """The loss cannot be computed of this datum."""


class Bounds:
    """What is left for one datum, whose inputs have so many elements."""

    def __init__(self, elements: int) -> None:
        self._most = min(MAX_ELEMENTS, 2**16 + 2**10 * elements + 8 * elements**2)
        self._room = self._most
        self._work = min(MAX_WORK, 2**20 + 2**11 * elements + 2**8 * elements**2)

    def check(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before even the shape of a result is asked for. Raises CustomLossError."""
        if name == "diff":
            times = kwargs.get("n", args[1] if len(args) > 1 else 1)
            if times > MAX_DIFFERENCES:
                raise CustomLossError(f"the custom loss takes differences {times} times, {MAX_DIFFERENCES} are allowed")
        if name in _PARTING:
            place = _PARTING[name]
            subject = _operands(args, kwargs)[0]
            size = subject.shape[kwargs.get("dim", args[place] if len(args) > place else 0)]
            if size > MAX_PARTS:
                raise CustomLossError(f"the custom loss takes {size} rows apart, {MAX_PARTS} are allowed")

    def take(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> None:
        """Counts an operation by the shapes of what goes into it and of what it makes. Raises CustomLossError."""
        operands, size = _operands(args, kwargs), _size(made)
        work, room = size + _size([*args, *kwargs.values()]), size
        if name in _PRODUCTS:
            inner = max(1, operands[0].shape[-1])
            work += made.numel() * inner // _FLOPS
            room += _widened(operands, made, inner)
        elif name in _PAIRED:
            room += math.prod(torch.broadcast_shapes(*(operand.shape for operand in operands[:2])))
        elif name in _SORTS:
            work *= _SORTING
        self._room -= room
        self._work -= work + room
        if self._room < 0:
            raise CustomLossError(
                f"the custom loss makes tensors of more than {self._most} elements for one datum of this length"
            )
        if self._work < 0:
            raise CustomLossError("the custom loss takes too much work for one datum of this length")


def _operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    given = [*args, *(kwargs[name] for name in _OTHERS if name in kwargs)]
    return [value for value in given if isinstance(value, Tensor)]


def _widened(operands: Sequence[Tensor], made: Tensor, inner: int) -> int:
    """Elements of the copies that a product of stacked matrices makes of both, each as often as it is used."""
    if all(operand.ndim <= 2 for operand in operands):
        return 0
    left, right = operands
    rows = left.shape[-2] if left.ndim > 1 else 1
    columns = right.shape[-1] if right.ndim > 1 else 1
    return made.numel() // max(1, rows * columns) * inner * (rows + columns)


def _size(value: Any) -> int:
    """Elements, no less than the longest side: what takes that apart takes as long, however empty it is."""
    if isinstance(value, Tensor):
        return max(value.numel(), *value.shape, 0) + _TENSOR
    return sum(map(_size, value)) if isinstance(value, list | tuple) and not isinstance(value, torch.Size) else 0
