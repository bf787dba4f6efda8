"""Custom losses as data: a graph of named operations, checked against the closed list before anything is kept of it.

Nothing of a client's is ever code here: a graph is names, numbers and references to earlier nodes.
"""

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, to_builtins

from tinsmith.errors import UserError
from tinsmith.wire.operators import ATTRIBUTES, DTYPES, KEYWORDS, METHODS, WORDS, known_function
from tinsmith.wire.types import Count, Id, Request, Response

MAX_NODES = 512
MAX_INPUTS = 16
MAX_METRICS = 64
MAX_VALUES = 4096  # numbers and references in the arguments of a whole graph
MAX_DEPTH = 6
MAX_NUMBER = 2**53
MAX_DEVICE = 32  # characters of a device's name, whatever it is

_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_IN_CLIENT = "; a plain function, given to forward_backward_custom without create_custom_loss, runs in the client"
_FLOATS = ("inf", "-inf", "nan")

Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)")]


class LossInput(Request):
    """`logprobs`, or the loss_fn_input that the loss reads; 0 dimensions, [T] or [T, K]."""

    name: Annotated[str, Meta(pattern=r"^[a-z_][a-z0-9_]{0,63}$(?!\n)")]
    rank: Literal[0, 1, 2]


class Node(Request):
    """One operation, on earlier nodes."""

    op: str
    name: Name
    target: Name
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)


class Graph(Request):
    nodes: Annotated[list[Node], Meta(min_length=2, max_length=MAX_NODES)]
    format: Literal[1] = 1


class CreateCustomLossRequest(Request):
    session_id: Id
    custom_loss_seq_id: Count
    name: Name
    inputs: Annotated[list[LossInput], Meta(min_length=1, max_length=MAX_INPUTS)]
    graph: Graph
    type: Literal["create_custom_loss"] = "create_custom_loss"


class CreateCustomLossResponse(Response):
    loss_id: str
    type: Literal["create_custom_loss"] = "create_custom_loss"


class LossFuture(Struct):
    """The answer to a submission that concerns no model."""

    request_id: str


def checked_program(request: CreateCustomLossRequest) -> dict[str, Any]:
    """The loss as it is kept and run: its name, inputs and nodes. Raises UserError for anything not on the list."""
    names = [each.name for each in request.inputs]
    if names[0] != "logprobs" or request.inputs[0].rank == 0 or len(set(names)) != len(names):
        raise UserError(f"the inputs of a custom loss are logprobs ([T] or [T, K]) and other names; given are {names}")
    nodes = request.graph.nodes
    placeholders = [node.target for node in nodes if node.op == "placeholder"]
    if placeholders != names or any(node.op != "placeholder" for node in nodes[: len(names)]):
        raise UserError(f"the graph begins with {placeholders}; it must begin with its inputs, {names}")
    if [index for index, node in enumerate(nodes) if node.op == "output"] != [len(nodes) - 1]:
        raise UserError("a custom loss has one output, its last node")
    check = _Check()
    for node in nodes:
        check.node(node)
    inputs = [{"name": each.name, "rank": each.rank} for each in request.inputs]
    return {"name": request.name, "inputs": inputs, "nodes": to_builtins(nodes)}


class _Check:
    """Goes through the nodes in order, and knows those behind it."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._values = 0

    def node(self, node: Node) -> None:
        if node.op not in ("output", "placeholder"):
            self._operation(node)
        elif node.kwargs or (node.args and node.op == "placeholder"):
            raise UserError(f"{node.op} {node.name!r} of the custom loss has arguments that mean nothing there")
        elif node.op == "output":
            self._output(node)
        if node.name in self._known:
            raise UserError(f"two nodes of the custom loss are called {node.name!r}")
        self._known.add(node.name)

    def _operation(self, node: Node) -> None:
        args = node.args
        if node.op == "call_function" and node.target in ("getattr", "builtins.getattr"):
            if len(args) != 2 or args[1] not in ATTRIBUTES:
                allowed = ", ".join(sorted(ATTRIBUTES))
                raise UserError(f"a custom loss reads the attribute {args[1:]}; allowed: {allowed}{_IN_CLIENT}")
            args = args[:1]
        elif node.op == "call_function":
            if known_function(node.target) is None:
                raise UserError(f"a custom loss cannot call {node.target!r} on this server{_IN_CLIENT}")
        elif node.op != "call_method" or node.target not in METHODS:
            raise UserError(f"a custom loss cannot use {node.op} {node.target!r} on this server{_IN_CLIENT}")
        for name in node.kwargs:
            if name not in KEYWORDS:
                raise UserError(f"{node.target} in a custom loss cannot take {name!r}{_IN_CLIENT}")
        for value in (*args, *node.kwargs.values()):
            self._value(value, MAX_DEPTH)

    def _value(self, value: Any, depth: int) -> None:
        self._values += 1
        if depth == 0 or self._values > MAX_VALUES:
            raise UserError(f"the custom loss is too large: at most {MAX_VALUES} arguments, {MAX_DEPTH} lists deep")
        if isinstance(value, list):
            for each in value:
                self._value(each, depth - 1)
        elif isinstance(value, dict):
            self._tagged(value, depth)
        elif value not in WORDS and (isinstance(value, str) or not abs(value or 0) <= MAX_NUMBER):
            raise UserError(
                f"a custom loss cannot use {value!r} as an argument; numbers up to {MAX_NUMBER} are allowed"
            )

    def _tagged(self, value: dict[str, Any], depth: int) -> None:
        """One-key objects: what JSON has no form of its own for."""
        tag, content = next(iter(value.items())) if len(value) == 1 else ("", None)
        if tag == "ref":
            self._reference(content)
        elif tag in ("tuple", "slice") and isinstance(content, list) and (tag == "tuple" or len(content) == 3):
            for each in content:
                self._value(each, depth - 1)
        elif not (
            (tag == "float" and content in _FLOATS)
            or (tag == "dtype" and content in DTYPES)
            or (tag == "ellipsis" and content is True)
            or (tag == "device" and isinstance(content, str) and len(content) <= MAX_DEVICE)
        ):
            raise UserError(f"a custom loss cannot use {str(value)[:200]} as an argument{_IN_CLIENT}")

    def _reference(self, name: Any) -> None:
        if not isinstance(name, str) or name not in self._known:
            raise UserError(f"a node of the custom loss refers to {str(name)[:200]!r}, which is no earlier node")

    def _output(self, node: Node) -> None:
        returned = node.args[0] if len(node.args) == 1 else None
        pair = returned.get("tuple") if isinstance(returned, dict) else returned
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, dict) for each in pair)):
            raise UserError("a custom loss returns (loss, metrics)")
        loss, metrics = pair[0].get("ref"), pair[1].get("dict")
        self._reference(loss)
        if not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
            raise UserError(f"a custom loss returns its metrics as a dict of at most {MAX_METRICS}")
        for key, value in metrics.items():
            if not _METRIC.fullmatch(key):
                raise UserError(f"metric {key[:200]!r} must be called custom/<name>:sum or custom/<name>:mean")
            self._reference(value.get("ref") if isinstance(value, dict) else None)
