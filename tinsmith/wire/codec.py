"""forward and forward_backward between protobuf and the flat arrays of `packing`, with every check that needs no GPU.

What passes `train_call` can be batched with strangers' requests: names, shapes, element types and token ranges are
right, and all numbers are finite. Errors name the datum, the key, the offending value and what is allowed. Work per
token is vectorised; only work per datum is Python. Suffixes as in `packing`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from tinsmith.errors import TooLargeError, UserError
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.losses import LOSSES, LossSignature
from tinsmith.wire.packing import Float32, Int32, Int64, TrainCall, TrainOutput
from tinsmith.wire.tensors import FLOAT32, INT32, INT64, WIRE_TYPES, flat_values, shape_of

TARGETS = "target_tokens"
_CHUNK_NAMES = {"image": "an image", "dmel": "audio", None: "nothing"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model and the server take. `max_bytes` bounds a request also after sparse tensors are filled."""

    vocab_size: int
    max_context: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Address:
    """Where a training request belongs: the model, and the place in its order of operations."""

    model_id: str
    seq: int


def decompress(data: bytes, limit: int) -> bytes:
    """The content of one zstd frame. Raises TooLargeError beyond `limit` bytes, UserError if it is no such frame."""
    too_large = TooLargeError(f"the body decompresses to more than {limit} bytes, the most that this server takes")
    try:
        size = zstandard.frame_content_size(data)
        if size > limit:
            raise too_large
        if size >= 0:
            return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            content = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise UserError(f"the body is not the zstd frame that its Content-Encoding announces: {error}") from error
    if len(content) > limit:
        raise too_large
    return content


def decompress_beginning(data: bytes, size: int) -> bytes:
    """Up to `size` bytes of a zstd frame of which perhaps only the beginning is there; empty if it is no zstd."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            return reader.read(size)
    except zstandard.ZstdError:
        return b""


def peek_address(beginning: bytes) -> Address | None:
    """Model and seq of a ForwardBackwardRequest of which perhaps only the beginning can be read.

    They are its first two fields, and writers of protobuf put them first. None when they are not there.
    """
    try:
        if beginning[0] != 0x0A:  # field 1, length-delimited
            return None
        length, start = _varint(beginning, 1)
        end = start + length
        model_id = beginning[start:end].decode()
        if len(beginning) <= end or beginning[end] != 0x10:  # field 2, varint
            return None
        seq, _ = _varint(beginning, end + 1)
    except (IndexError, UnicodeDecodeError):
        return None
    return Address(model_id, seq) if 1 <= seq < 2**31 else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if shift > 63:
            raise IndexError
    return value | data[position] << shift, position + 1


def parse_forward_backward(data: bytes) -> pb.ForwardBackwardRequest:
    """The protobuf message. Raises UserError if the bytes are none."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(data)
    except (DecodeError, RecursionError) as error:
        raise UserError(f"the body is not a ForwardBackwardRequest in protobuf: {error}") from error
    return message


def train_call(message: pb.ForwardBackwardRequest, limits: Limits, signature: LossSignature | None = None) -> TrainCall:
    """The request as flat arrays, fully checked. Raises UserError, TooLargeError.

    `signature` is of a loss that is not among LOSSES.
    """
    signature = signature or LOSSES.get(message.loss_fn)
    if signature is None:
        raise UserError(f"unknown loss_fn {message.loss_fn!r}; known: {', '.join(LOSSES)}")
    if not message.data:
        raise UserError("the request holds no datum; at least one is needed")
    config = _config(message, signature)
    tokens_T, token_offsets = _tokens(message.data, limits)
    names = _input_names(message.data, message.loss_fn, signature)
    shapes = _target_shapes(message, np.diff(token_offsets), signature, limits.vocab_size)
    target_offsets = _offsets([math.prod(shape) for shape in shapes])
    if (filled := int(target_offsets[-1]) * (8 + 4 * len(names))) > limits.max_bytes:
        raise TooLargeError(
            f"loss_fn_inputs fill {filled} bytes; the most that this server takes is {limits.max_bytes}"
        )
    targets_M = _column(message.data, TARGETS, INT64, shapes)
    _check_tokens(targets_M, target_offsets, limits.vocab_size, TARGETS)
    inputs = {}
    for name in names:
        inputs[name] = _column(message.data, name, FLOAT32, shapes)
        _check_finite(inputs[name], target_offsets, name)
    widths_N = np.array([shape[1] if len(shape) == 2 else 0 for shape in shapes], INT32)
    return TrainCall(
        message.loss_fn,
        config,
        message.forward_only,
        tokens_T,
        token_offsets,
        targets_M.astype(INT32),
        target_offsets,
        widths_N,
        inputs,
    )


def _config(message: pb.ForwardBackwardRequest, signature: LossSignature) -> dict[str, float]:
    """The given loss_fn_config; defaults are the trainer's to fill in."""
    given: dict[str, float] = {}
    if message.loss_fn_config_v2:
        for key, value in message.loss_fn_config_v2.items():
            if key in signature.config and value.WhichOneof("value") != "number":
                raise UserError(f"loss_fn_config[{key!r}] is {value.text!r}; it must be a number")
            given[key] = value.number
    else:
        given |= message.loss_fn_config
    for key, number in given.items():
        if key not in signature.config:
            allowed = ", ".join(signature.config) or "none"
            raise UserError(f"loss_fn_config[{key!r}] is unknown to loss_fn {message.loss_fn!r}; allowed: {allowed}")
        if not (math.isfinite(number) and number >= 0):
            raise UserError(f"loss_fn_config[{key!r}] is {number}; it must be a finite number of at least 0")
    effective = signature.config | given
    low, high = effective.get("clip_low_threshold", 0.0), effective.get("clip_high_threshold", math.inf)
    if low > high:
        raise UserError(f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}")
    return given


def _tokens(data: Sequence[pb.Datum], limits: Limits) -> tuple[Int32, Int64]:
    """All tokens, and where each datum's begin: tokens_T, token_offsets [N + 1]."""
    parts: list[bytes] = []
    lengths = []
    for index, datum in enumerate(data):
        size = 0
        for number, chunk in enumerate(datum.model_input):
            kind = chunk.WhichOneof("chunk")
            if kind != "encoded_text":
                holds = _CHUNK_NAMES[kind]
                raise UserError(
                    f"datum {index}, chunk {number} of model_input holds {holds}; this server takes text only"
                )
            parts.append(chunk.encoded_text.tokens)
            size += len(parts[-1])
            if len(parts[-1]) % 4:
                raise UserError(
                    f"datum {index}, chunk {number} of model_input: {len(parts[-1])} bytes are not int32 tokens"
                )
        if not 0 < size // 4 <= limits.max_context:
            raise UserError(f"datum {index} has {size // 4} tokens; 1 to {limits.max_context} are allowed")
        lengths.append(size // 4)
    tokens_T = np.frombuffer(b"".join(parts), INT32)
    offsets = _offsets(lengths)
    _check_tokens(tokens_T, offsets, limits.vocab_size, "model_input")
    return tokens_T, offsets


def _input_names(data: Sequence[pb.Datum], loss: str, signature: LossSignature) -> list[str]:
    """The names of the float inputs, which all datums share."""
    required = {TARGETS, *signature.inputs}
    allowed = required | set(signature.optional)
    first = set(data[0].loss_fn_inputs)
    for index, datum in enumerate(data):
        names = set(datum.loss_fn_inputs)
        if names == first and index:
            continue
        if missing := sorted(required - names):
            raise UserError(f"datum {index}: loss_fn {loss!r} needs loss_fn_inputs[{missing[0]!r}], which is missing")
        if unknown := sorted(names - allowed):
            raise UserError(
                f"datum {index}: loss_fn_inputs[{unknown[0]!r}] is unknown to loss_fn {loss!r}; "
                f"allowed: {', '.join(sorted(allowed))}"
            )
        if names != first:
            odd = sorted(names ^ first)[0]
            raise UserError(
                f"loss_fn_inputs[{odd!r}] is given for some datums only (0 and {index} differ); give all or none"
            )
    return sorted(first - {TARGETS})


def _target_shapes(
    message: pb.ForwardBackwardRequest, lengths_N: Int64, signature: LossSignature, vocab_size: int
) -> list[tuple[int, ...]]:
    """The shape of each datum's targets: (tokens,) or (tokens, K)."""
    shapes = []
    for index, length in enumerate(lengths_N.tolist()):
        where = _where(index, TARGETS)
        shape = shape_of(message.data[index].loss_fn_inputs[TARGETS], INT64, where)
        matrix = len(shape) == 2 and signature.matrix and 1 <= shape[1] <= vocab_size
        if shape[:1] != (length,) or not (len(shape) == 1 or matrix):
            allowed = f"[{length}] or [{length}, K], K from 1 to {vocab_size}" if signature.matrix else f"[{length}]"
            raise UserError(
                f"{where} has shape {list(shape)}; with {length} tokens in model_input, "
                f"loss_fn {message.loss_fn!r} takes {allowed}"
            )
        shapes.append(shape)
    return shapes


def _column(
    data: Sequence[pb.Datum], name: str, dtype: np.dtype[Any], shapes: Sequence[tuple[int, ...]]
) -> NDArray[Any]:
    """One input of all datums, in the layout of the targets."""
    tensors = [datum.loss_fn_inputs[name] for datum in data]
    if _all_dense(tensors, dtype, shapes):
        return np.frombuffer(b"".join([tensor.dense for tensor in tensors]), dtype)
    parts = []
    for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        where = _where(index, name)
        if (given := shape_of(tensor, dtype, where)) != shape:
            raise UserError(f"{where} has shape {list(given)}; it must have that of {TARGETS}, {list(shape)}")
        parts.append(flat_values(tensor, dtype, shape, where))
    return np.concatenate(parts)


def _all_dense(tensors: list[pb.Tensor], dtype: np.dtype[Any], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether every tensor is dense and exactly as it should be: nearly always so, and then one copy takes them all."""
    sizes = [dtype.itemsize * math.prod(shape) for shape in shapes]
    return (
        {tensor.dtype for tensor in tensors} == {WIRE_TYPES[dtype]}
        and [len(tensor.dense) for tensor in tensors] == sizes
        and all(tuple(tensor.shape) == shape for tensor, shape in zip(tensors, shapes, strict=True))
    )


def _check_tokens(tokens: Int32 | Int64, offsets: Int64, vocab_size: int, name: str) -> None:
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        raise UserError(f"{_place(offsets, wrong[0], name)} is {tokens[wrong[0]]}; tokens are 0 to {vocab_size - 1}")


def _check_finite(values: Float32, offsets: Int64, name: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise UserError(f"{_place(offsets, wrong[0], name)} is {values[wrong[0]]}; only finite numbers are allowed")


def _place(offsets: Int64, position: np.intp, name: str) -> str:
    datum = int(np.searchsorted(offsets, position, "right")) - 1
    return f"datum {datum}: {name}[{position - offsets[datum]}]"


def _where(index: int, name: str) -> str:
    return f"datum {index}: loss_fn_inputs[{name!r}]"


def _offsets(lengths: Sequence[int]) -> Int64:
    offsets = np.zeros(len(lengths) + 1, INT64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def encode_train_output(output: TrainOutput) -> bytes:
    """A protobuf ForwardBackwardOutput: one record per run of datums with the same number of targets per token."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=output.metrics)
    widths_N = output.widths_N
    borders = [0, *(np.flatnonzero(np.diff(widths_N)) + 1).tolist(), len(widths_N)]
    for start, end in pairwise(borders):
        offsets = output.target_offsets[start : end + 1]
        width = int(widths_N[start])
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=end - start)
        column = record.fields["logprobs"]
        column.data = output.logprobs_M[offsets[0] : offsets[-1]].astype(FLOAT32, copy=False).tobytes()
        column.offsets = ((offsets - offsets[0]) * FLOAT32.itemsize).astype(INT64, copy=False).tobytes()
        column.dtype = pb.DTYPE_FLOAT32
        column.trailing_shape.extend([width] if width else [])
    return message.SerializeToString()
