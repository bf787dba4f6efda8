"""forward_backward with a custom loss: its own inputs, of any declared rank, beside what every call has."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.errors import TooLargeError, UserError
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.codec import TARGETS, Limits, train_call
from tinsmith.wire.losses import LossSignature
from tinsmith.wire.packing import CustomLoss, TrainCall
from tinsmith.wire.tensors import FLOAT32, INT64, WIRE_TYPES, flat_values, shape_of

CUSTOM = "custom"
_SIGNATURE = LossSignature((), matrix=True)
_TYPES: dict[int, np.dtype[Any]] = {int(WIRE_TYPES[dtype]): dtype for dtype in (FLOAT32, INT64)}


def loss_id(message: pb.ForwardBackwardRequest) -> str | None:
    """Which custom loss a request asks for; None if it asks for another kind. Raises UserError."""
    if message.loss_fn != CUSTOM:
        return None
    given = message.loss_fn_config_v2
    if list(given) != ["loss_id"] or given["loss_id"].WhichOneof("value") != "text":
        raise UserError("loss_fn 'custom' takes loss_fn_config {'loss_id': …}, which create_custom_loss gives")
    return str(given["loss_id"].text)


def custom_call(message: pb.ForwardBackwardRequest, limits: Limits, program: dict[str, Any]) -> TrainCall:
    """The request as flat arrays, fully checked; takes the loss's inputs out of the message. Raises UserError."""
    declared = {each["name"]: int(each["rank"]) for each in program["inputs"]}
    rank = declared.pop("logprobs")
    taken = {name: [_taken(datum, index, name) for index, datum in enumerate(message.data)] for name in declared}
    message.loss_fn_config_v2.clear()
    call = train_call(message, limits, _SIGNATURE)
    if (call.widths_N > 0).any() if rank == 1 else (call.widths_N == 0).any():
        raise UserError(
            f"the custom loss takes logprobs of {rank} dimensions, so every target_tokens must have as many"
        )
    room = limits.max_bytes
    values, shapes = {}, {}
    for name, tensors in taken.items():
        values[name], shapes[name] = _column(name, tensors, declared[name], room)
        room -= values[name].nbytes
    return replace(call, custom=CustomLoss(program, values, shapes))


def _taken(datum: pb.Datum, index: int, name: str) -> pb.Tensor:
    """A copy of a datum's input, which is removed, unless every loss needs it."""
    if name not in datum.loss_fn_inputs:
        raise UserError(f"datum {index}: the custom loss reads loss_fn_inputs[{name!r}], which is missing")
    tensor = pb.Tensor()
    tensor.CopyFrom(datum.loss_fn_inputs[name])
    if name != TARGETS:
        del datum.loss_fn_inputs[name]
    return tensor


def _column(name: str, tensors: list[pb.Tensor], rank: int, room: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """One input of all datums: its values, one datum after the other, and its shapes [N, rank]."""
    dtype = _TYPES.get(int(tensors[0].dtype), FLOAT32)
    parts, shapes = [], np.zeros((len(tensors), rank), INT64)
    for index, tensor in enumerate(tensors):
        where = f"datum {index}: loss_fn_inputs[{name!r}]"
        shape = shape_of(tensor, dtype, where)
        if rank == 0 and shape == (1,) and not tensor.shape:
            shape = ()
        if len(shape) != rank:
            raise UserError(f"{where} has shape {list(shape)}; the custom loss declares {rank} dimensions")
        room -= int(np.prod(shape, dtype=object)) * dtype.itemsize
        if room < 0:
            raise TooLargeError(f"{where} fills more bytes than this server takes")
        parts.append(flat_values(tensor, dtype, shape, where))
        shapes[index] = shape
    values: NDArray[Any] = np.concatenate(parts)
    if dtype == FLOAT32 and not np.isfinite(values).all():
        raise UserError(f"loss_fn_inputs[{name!r}] holds numbers that are not finite")
    return values, shapes
