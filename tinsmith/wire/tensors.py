"""Tensors as clients send them, dense or CSR-sparse, to numpy and back. Knows nothing of what they mean.

Errors name the tensor by the `where` that the caller gives.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.errors import UserError
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.packing import Int64

INT64 = np.dtype("<i8")
INT32 = np.dtype("<i4")
FLOAT32 = np.dtype("<f4")

WIRE_TYPES = {FLOAT32: pb.DTYPE_FLOAT32, INT64: pb.DTYPE_INT64}


def shape_of(tensor: pb.Tensor, dtype: np.dtype[Any], where: str) -> tuple[int, ...]:
    """The declared shape; a dense tensor without one is a vector. Checks the element type. Raises UserError."""
    if tensor.dtype != WIRE_TYPES[dtype]:
        raise UserError(f"{where} has dtype {_dtype_name(tensor.dtype)}; it must be {dtype.name}")
    if tensor.shape:
        return tuple(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        raise UserError(f"{where} is sparse and has no shape; give [rows, columns]")
    return (len(tensor.dense) // dtype.itemsize,)


def flat_values(tensor: pb.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """The elements of a tensor of that shape, row-major; of a sparse one, 0 where nothing is listed."""
    encoding = tensor.WhichOneof("encoding")
    if encoding == "sparse_csr":
        sparse = tensor.sparse_csr
        values = from_buffer(sparse.values, dtype, where)
        rows = from_buffer(sparse.crow_indices, INT64, f"{where}.crow_indices")
        columns = from_buffer(sparse.col_indices, INT64, f"{where}.col_indices")
        return densify(values, rows, columns, shape, where)
    values = from_buffer(tensor.dense, dtype, where)
    if len(values) != _product(shape):
        raise UserError(f"{where} holds {len(values)} values; its shape {list(shape)} needs {_product(shape)}")
    return values


def from_buffer(data: bytes, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """A read-only view of raw little-endian values. Raises UserError for a part of a value at the end."""
    if len(data) % dtype.itemsize:
        raise UserError(f"{where} holds {len(data)} bytes, which is no multiple of {dtype.itemsize} ({dtype.name})")
    return np.frombuffer(data, dtype)


def densify(
    values: NDArray[Any], crow: Int64, columns: Int64, shape: Sequence[int], where: str, pad: int = 0
) -> NDArray[Any]:
    """The dense elements, row-major, of a CSR tensor of `shape` [rows, columns]; `pad` where nothing is listed.

    The caller has bounded the shape. Raises UserError for indices that are no valid CSR of that shape.
    """
    if len(shape) != 2:
        raise UserError(f"{where} is sparse with shape {list(shape)}; a sparse tensor has two dimensions")
    height, width = shape
    counts = crow[1:] - crow[:-1]
    if len(crow) != height + 1 or crow[0] != 0 or crow[-1] != len(values) or (height and counts.min() < 0):
        raise UserError(f"{where}: crow_indices must be {height + 1} ascending offsets from 0 to {len(values)}")
    if len(columns) != len(values) or (len(columns) and not 0 <= columns.min() <= columns.max() < width):
        raise UserError(f"{where}: col_indices must be {len(values)} indices from 0 to {width - 1}")
    cells = np.repeat(np.arange(height) * width, counts) + columns
    if (cells[1:] <= cells[:-1]).any():
        raise UserError(f"{where}: col_indices must ascend within each row, without repeats")
    flat = np.full(height * width, pad, values.dtype)
    flat[cells] = values
    return flat


def dense_tensor(values: NDArray[Any], dtype: np.dtype[Any]) -> pb.Tensor:
    """A protobuf tensor of `values`, converted to float32 or int64."""
    dense = np.ascontiguousarray(values, dtype)
    return pb.Tensor(dense=dense.tobytes(), dtype=WIRE_TYPES[dtype], shape=dense.shape)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _dtype_name(value: int) -> str:
    known = pb.DType.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("DTYPE_").lower() if known else str(value)
