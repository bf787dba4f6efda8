"""Computes custom losses: follows a checked graph, node by node, with functions from a closed list and bounded memory.

Each tensor operation is tried without data first (torch's meta device), which tells its shape: an operation whose
result is too large never runs. Arithmetic on plain numbers is bounded likewise. Runs once per datum, on the CPU: an
index out of range ends a whole process's use of a GPU, and a full GPU is everybody's.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmith.training.loss_bounds import Bounds, CustomLossError
from tinsmith.wire.operators import ATTRIBUTES, METHODS, known_function
from tinsmith.wire.packing import TrainCall

_LARGEST = 2**63

Number = bool | int | float


def summed(call: TrainCall, first: int, last: int, lp_M: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of datums `first` to `last` of a call with a custom loss, given all their logprobs, and its metrics.

    A `:mean` metric is divided by the number of datums of the whole call. Raises CustomLossError.
    """
    custom = call.custom
    assert custom is not None
    names = [each["name"] for each in custom.program["inputs"][1:]]
    ends = {name: np.cumsum(custom.shapes[name].prod(axis=1)) for name in names}
    device, lp_M = lp_M.device, lp_M.cpu()
    losses: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for datum in range(first, last):
        begin, end = (int(call.target_offsets[n] - call.target_offsets[first]) for n in (datum, datum + 1))
        width = int(call.widths_N[datum])
        tensors = [lp_M[begin:end].view(-1, width) if width else lp_M[begin:end]]
        for name in names:
            shape, stop = custom.shapes[name][datum].tolist(), int(ends[name][datum])
            values = custom.values[name][stop - math.prod(shape) : stop]
            tensors.append(torch.tensor(values).view(shape))
        loss, metrics = evaluate(custom.program, tensors)
        losses.append(loss.float())
        for key, value in metrics.items():
            part = value.float() / (call.num_datums if key.endswith(":mean") else 1)
            sums[key] = sums[key] + part if key in sums else part
    total = torch.stack(losses).sum()
    if not total.requires_grad:
        raise CustomLossError("the custom loss does not depend on logprobs, so nothing can be learnt from it")
    return total.to(device), {key: value.to(device) for key, value in sums.items()}


def evaluate(program: Mapping[str, Any], tensors: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (a scalar) and metrics (scalars, by name) of one datum.

    `tensors` are the logprobs ([T] or [T, K]) and what else the loss reads, in the order of its inputs. Raises
    CustomLossError.
    """
    run = _Run(tensors)
    inputs = iter(tensors)
    for node in program["nodes"]:
        if node["op"] == "placeholder":
            run.values[node["name"]] = next(inputs)
        elif node["op"] == "output":
            returned = node["args"][0]
            loss, metrics = returned["tuple"] if isinstance(returned, dict) else returned
            found = {key: run.scalar(value["ref"], key) for key, value in metrics["dict"].items()}
            return run.scalar(loss["ref"], "its loss"), {key: value.detach() for key, value in found.items()}
        else:
            run.step(node)
    raise CustomLossError("the custom loss has no output")


class _Run:
    """The values of one datum's nodes."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.values: dict[str, Any] = {}
        self._device = tensors[0].device
        self._bounds = Bounds(sum(tensor.numel() for tensor in tensors))

    def scalar(self, name: str, what: str) -> Tensor:
        value = self.values[name]
        if not isinstance(value, Tensor) or value.ndim:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CustomLossError(f"a custom loss must return {what} as a scalar tensor, not {shape}")
        return value

    def step(self, node: Mapping[str, Any]) -> None:
        try:
            self.values[node["name"]] = self._result(node)
        except CustomLossError:
            raise
        except Exception as error:  # torch's own ways to say that shapes or types do not fit
            reason = str(error).partition("\n")[0]
            raise CustomLossError(f"the custom loss fails in {node['target']} ({node['name']}): {reason}") from None

    def _result(self, node: Mapping[str, Any]) -> Any:
        if node["target"] in ("getattr", "builtins.getattr") and node["op"] == "call_function":
            subject, attribute = self._decoded(node["args"][0]), node["args"][1]
            if attribute not in ATTRIBUTES:
                raise CustomLossError(f"a custom loss cannot read {attribute!r}")
            return getattr(subject, attribute)
        args = [self._decoded(value) for value in node["args"]]
        kwargs = {name: self._decoded(value) for name, value in node["kwargs"].items()}
        if node["op"] == "call_method":
            if node["target"] not in METHODS or not isinstance(args[0], Tensor):
                raise CustomLossError(f"the custom loss cannot call {node['target']} of {type(args[0]).__name__}")
            return self._run(getattr(torch.Tensor, node["target"]), args, kwargs)
        known = known_function(node["target"])
        if known is None:
            raise CustomLossError(f"the custom loss cannot call {node['target']!r}")
        kind, name = known
        if kind == "operator":
            return self._python(name, args)
        return self._run(getattr(torch if kind == "torch" else torch.nn.functional, name), args, kwargs)

    def _python(self, name: str, args: list[Any]) -> Any:
        function: Callable[..., Any] = getattr(operator, name)
        if name == "getitem":
            args = [args[0], _index(args[1])]
        if any(isinstance(value, Tensor) for value in args):
            return self._run(function, args, {})
        if name == "getitem":
            return function(*args)
        if not all(isinstance(value, Number) for value in args):
            raise CustomLossError(f"the custom loss applies {name} to what are neither tensors nor numbers")
        return _bounded(math.pow(*args) if name == "pow" else function(*args))

    def _run(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Applies a function of torch, if what it makes has room."""
        name = function.__name__
        self._bounds.check(name, args, kwargs)
        with torch.device("meta"), torch.no_grad():
            made = function(*_without_data(args), **_without_data(kwargs))
        self._bounds.take(name, args, kwargs, made)
        with torch.device(self._device):
            return function(*args, **kwargs)

    def _decoded(self, value: Any) -> Any:
        """An argument as torch takes it."""
        if isinstance(value, list):
            return [self._decoded(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        match tag:
            case "ref":
                return self.values[content]
            case "tuple":
                return tuple(self._decoded(each) for each in content)
            case "slice":
                return slice(*(self._decoded(each) for each in content))
            case "float":
                return float(content)
            case "dtype":
                return getattr(torch, content)
            case "ellipsis":
                return ...
            case "device":
                return self._device
        raise CustomLossError(f"the custom loss has an argument {value}")


def _index(value: Any) -> Any:
    """An index in which single numbers are no tensors, which would need their data to tell a shape."""
    if isinstance(value, tuple):
        return tuple(map(_index, value))
    is_number = isinstance(value, Tensor) and value.ndim == 0 and value.dtype in (torch.int64, torch.int32)
    return int(value) if is_number else value


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, int) and abs(value) >= _LARGEST):
        raise CustomLossError("the custom loss computes a number beyond 64 bits")
    return value


def _without_data(value: Any) -> Any:
    """The same arguments, on the meta device."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {name: _without_data(each) for name, each in value.items()}
    if isinstance(value, slice):
        return slice(_without_data(value.start), _without_data(value.stop), _without_data(value.step))
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_without_data(each) for each in value) if type(value) in (list, tuple) else value
    return value
