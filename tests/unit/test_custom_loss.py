"""Custom losses as graphs: what is on the list works as in the client, nothing else is taken, nothing grows too big."""

import copy
import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss
from torch import Tensor

from tinsmith.errors import UserError
from tinsmith.training import loss_bounds
from tinsmith.training.custom_loss import evaluate, summed
from tinsmith.training.loss_bounds import CustomLossError
from tinsmith.wire import operators
from tinsmith.wire.custom_loss import CreateCustomLossRequest, checked_program
from tinsmith.wire.packing import CustomLoss, TrainCall

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def body(loss: Loss, **ranks: int) -> dict[str, Any]:
    """What the SDK sends for a loss."""
    handle = trace_loss(loss, ranks, "s")  # type: ignore[arg-type]
    inputs = [{"name": each.name, "rank": each.rank} for each in handle.inputs]
    graph = encode_graph(handle).model_dump(mode="json")
    return {"session_id": "s", "custom_loss_seq_id": 0, "name": handle.name, "inputs": inputs, "graph": graph}


def program_of(content: dict[str, Any]) -> dict[str, Any]:
    return checked_program(msgspec.json.decode(json.dumps(content).encode(), type=CreateCustomLossRequest))


def pointwise(logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = torch.exp(logprobs - logprobs.detach()).clamp(min=0.8, max=1.2)
    loss = -(ratio * advantages).sum() + 0.1 * logprobs.abs().mean() / (1 + 2**0.5)
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/n:sum": torch.ones_like(ratio).sum()}


def branches(logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    gained = torch.where(advantages > 0, logprobs, logprobs.square() * 0.5)
    weights = torch.softmax(advantages, dim=-1, dtype=torch.float32)
    count = logprobs.shape[0] + logprobs.size(0) * 2 - 1
    loss = -(gained * weights).sum() / count - torch.nn.functional.logsigmoid(logprobs).max()
    return loss, {"custom/top:sum": torch.topk(logprobs, k=2).values.sum()}


def shaped(logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    first, rest = logprobs[0], logprobs[1:]
    paired = torch.stack([rest, advantages[1:]], dim=1).t()
    both = torch.cat([paired[0], first.unsqueeze(0)])
    loss = (both[..., None] @ both[None]).tril().mean() + torch.logsumexp(logprobs, 0) - both.flip(0)[-1]
    return loss, {}


def matrix(logprobs: Tensor, weights: Tensor, beta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mixed = (logprobs.float() * weights).sum(dim=1, keepdim=True).expand(-1, 3)
    loss = -(mixed * beta).sum() - torch.nn.functional.huber_loss(logprobs, weights, reduction="sum", delta=0.5)
    return loss, {"custom/beta:mean": beta * 1.0}


def whole_numbers(logprobs: Tensor, target_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    is_even = target_tokens % 2 == 0
    loss = -(logprobs * is_even.to(torch.float32)).sum() - torch.cumsum(logprobs, dim=0)[target_tokens.argmin()]
    return loss, {"custom/even:sum": is_even.sum()}


NORMAL = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=NORMAL)


CASES: list[tuple[Loss, dict[str, int], list[Tensor]]] = [
    (pointwise, {"logprobs": 1, "advantages": 1}, [draw(5), draw(5)]),
    (branches, {"logprobs": 1, "advantages": 1}, [draw(5), draw(5)]),
    (shaped, {"logprobs": 1, "advantages": 1}, [draw(5), draw(5)]),
    (matrix, {"logprobs": 2, "weights": 2, "beta": 0}, [draw(5, 3), draw(5, 3), torch.tensor(0.3)]),
    (whole_numbers, {"logprobs": 1, "target_tokens": 1}, [draw(5), torch.tensor([7, 4, 1, 6, 2])]),
]


@pytest.mark.parametrize(("loss", "ranks", "tensors"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_graph_computes_what_its_function_does(loss: Loss, ranks: dict[str, int], tensors: list[Tensor]) -> None:
    program = program_of(body(loss, **ranks))
    ours, theirs = (tensors[0].clone().requires_grad_() for _ in range(2))
    found, metrics = evaluate(json.loads(json.dumps(program)), [ours, *tensors[1:]])
    expected, expected_metrics = loss(theirs, *tensors[1:])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {key: value.item() for key, value in metrics.items()} == {
        key: value.item() for key, value in expected_metrics.items()
    }
    (gradient,), (expected_gradient,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)


def test_every_name_on_the_list_is_torchs() -> None:
    assert [name for name in operators.FUNCTIONS if not callable(getattr(torch, name))] == []
    assert [name for name in operators.FUNCTIONAL if not callable(getattr(torch.nn.functional, name))] == []
    assert [name for name in operators.METHODS if not callable(getattr(Tensor, name))] == []
    assert not any(name.endswith("_") for name in operators.FUNCTIONS | operators.METHODS), "nothing works in place"


def node(target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": "x", "target": target, "args": list(args), "kwargs": kwargs}


def with_node(added: dict[str, Any]) -> dict[str, Any]:
    """A right request with one more node behind its input."""
    content = body(lambda logprobs: (logprobs.sum(), {}), logprobs=1)
    content["graph"]["nodes"].insert(1, added)
    return content


LP = {"ref": "logprobs"}


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (node("os.system", LP), "os.system"),
        (node("builtins.eval", LP), "eval"),
        (node("torch.load", LP), "torch.load"),
        (node("torch.ops.load_library", LP), "load_library"),
        (node("torch.sum.__globals__", LP), "__globals__"),
        (node("operator.attrgetter", LP), "attrgetter"),
        (node("operator.methodcaller", LP), "methodcaller"),
        (node("torch.rand", 3), "torch.rand"),
        (node("getattr", LP, "__class__"), "__class__"),
        (node("getattr", LP, "grad_fn"), "grad_fn"),
        (node("getattr", LP), "attribute"),
        (node("backward", LP, op="call_method"), "backward"),
        (node("item", LP, op="call_method"), "item"),
        (node("add_", LP, 1, op="call_method"), "add_"),
        (node("__reduce__", LP, op="call_method"), "__reduce__"),
        (node("anything", op="get_attr"), "get_attr"),
        (node("anything", op="call_module"), "call_module"),
        (node("torch.add", LP, 1, out=LP), "out"),
        (node("torch.add", LP, "text"), "text"),
        (node("torch.add", LP, 2**53 + 1), str(2**53 + 1)),
        (node("torch.add", {"ref": "sum_1"}, 1), "no earlier node"),
        (node("torch.add", {"ref": ["logprobs"]}, 1), "no earlier node"),
        (node("torch.add", {"code": "1"}), "code"),
        (node("torch.add", {"dtype": "complex64"}), "complex64"),
        (node("torch.add", {"slice": [1]}), "slice"),
        (node("torch.zeros", 1, {"device": "c" * 10**5}), "device"),
        (node("torch.add", [[[[[[[[1]]]]]]]]), "deep"),
        (node("torch.add", [1] * 5000), "too large"),
        (node("logprobs", op="placeholder"), "begins with"),
        (node("output", LP, op="output"), "one output"),
    ],
)
def test_what_is_not_on_the_list_is_refused_by_name(added: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        program_of(with_node(added))


def changed(value: Any, *path: int | str) -> dict[str, Any]:
    """A right request with another value in one place."""
    content = body(pointwise, logprobs=1, advantages=1)
    target: Any = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return content


def returning(loss: Any, metrics: Any) -> dict[str, Any]:
    return changed([{"tuple": [loss, {"dict": metrics}]}], "graph", "nodes", -1, "args")


@pytest.mark.parametrize(
    "content",
    [
        changed([{"name": "advantages", "rank": 1}], "inputs"),
        changed(0, "inputs", 0, "rank"),
        changed("logprobs", "inputs", 1, "name"),
        changed("rewards", "graph", "nodes", 1, "target"),
        changed("logprobs", "graph", "nodes", 2, "name"),
        changed([LP], "graph", "nodes", -1, "args"),
        changed([[[[[[[[[1]]]]]]]]], "graph", "nodes", 0, "args"),
        changed({"anything": ["x"] * 10**5}, "graph", "nodes", 0, "kwargs"),
        changed({"anything": 1}, "graph", "nodes", -1, "kwargs"),
        returning(LP, {"loss:sum": LP}),
        returning({"ref": "nothing"}, {}),
        returning(LP, {f"custom/{n}:sum": LP for n in range(99)}),
    ],
)
def test_a_graph_must_be_whole(content: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        program_of(content)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (node("torch.zeros", 2**40), "elements"),
        (node("torch.arange", 1e12), "elements"),
        (node("expand", LP, 2**30, -1, op="call_method"), "elements"),
        (node("operator.pow", 10, 400), "operator.pow"),
        (node("operator.mul", 2**53, 2**53), "64 bits"),
        (node("operator.mul", [1, 2], 3), "neither"),
        (node("operator.add", LP, {"tuple": [1]}), "operator.add"),
        (node("torch.matmul", LP, [1]), "torch.matmul"),
        (node("view", LP, 7, op="call_method"), "view"),
        (node("sum", 3, op="call_method"), "int"),
    ],
)
def test_what_grows_too_large_or_fails_is_the_requests_own_fault(added: dict[str, Any], said: str) -> None:
    program = program_of(with_node(added))
    with pytest.raises(CustomLossError, match=said.replace(".", r"\.")):
        evaluate(program, [torch.zeros(3, requires_grad=True)])


def test_many_tensors_together_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_bounds, "MAX_ELEMENTS", 1000)
    content = with_node(node("torch.exp", LP))
    last = "x"
    for number in range(60):
        more = node("torch.exp", {"ref": last}) | {"name": f"e{number}"}
        content["graph"]["nodes"].insert(2 + number, more)
        last = f"e{number}"
    with pytest.raises(CustomLossError, match="1000 elements"):
        evaluate(program_of(content), [torch.zeros(3, requires_grad=True)])


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([("torch.zeros", [2**24, 0]), ("torch.unbind", ref("x0"))], "rows apart"),
        ([("torch.zeros", [2**40, 0])], "elements"),
        ([("torch.zeros", [2**22]), ("torch.split", ref("x0"), 1)], "rows apart"),
        ([("torch.zeros", [2**22]), ("torch.chunk", ref("x0"), 2**22)], "rows apart"),
        ([("torch.zeros", [2**9, 1, 1, 2**13]), ("torch.zeros", [2**9, 2**13, 1]), "product"], "elements"),
        ([("torch.zeros", [2**16, 1]), ("torch.zeros", [1, 2**16]), "distance"], "elements"),
        ([("torch.zeros", [2**16]), ("torch.diff", ref("x0"), 2**15)], "differences"),
        ([("torch.zeros", [2**24]), *[("torch.sum", ref("x0"))] * 400], "work"),
    ],
)
def test_what_takes_more_than_its_result_shows_never_runs(steps: list[Any], said: str) -> None:
    pairs = {"product": "torch.matmul", "distance": "torch.nn.functional.mse_loss"}
    content = with_node(node("torch.exp", LP))
    for number, step in enumerate(steps):
        target, *args = (pairs[step], ref("x0"), ref("x1")) if isinstance(step, str) else step
        content["graph"]["nodes"].insert(2 + number, node(target, *args) | {"name": f"x{number}"})
    with pytest.raises(CustomLossError, match=said):
        evaluate(program_of(content), [torch.zeros(4096, requires_grad=True)])


def test_a_short_datum_cannot_take_as_much_as_a_long_one() -> None:
    program = program_of(with_node(node("torch.zeros", [2**20])))
    evaluate(program, [torch.zeros(2048, requires_grad=True)])
    with pytest.raises(CustomLossError, match="of this length"):
        evaluate(program, [torch.zeros(3, requires_grad=True)])


def test_the_engine_checks_names_again() -> None:
    program = program_of(with_node(node("torch.exp", LP)))
    for target, op in (("os.system", "call_function"), ("item", "call_method")):
        forged = copy.deepcopy(program)
        forged["nodes"][1] |= {"target": target, "op": op}
        with pytest.raises(CustomLossError, match="cannot call"):
            evaluate(forged, [torch.zeros(3)])
    forged["nodes"][1] |= {"target": "getattr", "op": "call_function", "args": [LP, "__class__"]}
    with pytest.raises(CustomLossError, match="cannot read"):
        evaluate(forged, [torch.zeros(3)])


def call_of(program: dict[str, Any], lengths: list[int]) -> TrainCall:
    offsets = np.cumsum([0, *lengths])
    tokens = np.zeros(offsets[-1], np.int32)
    advantages = np.arange(offsets[-1], dtype=np.float32) / 10
    shapes = np.array(lengths, np.int64)[:, None]
    custom = CustomLoss(program, {"advantages": advantages}, {"advantages": shapes})
    widths = np.zeros(len(lengths), np.int32)
    return TrainCall("custom", {}, False, tokens, offsets, tokens, offsets, widths, {}, custom)


def test_losses_add_up_over_datums_however_they_are_cut_and_packed() -> None:
    program = program_of(body(pointwise, logprobs=1, advantages=1))
    call = TrainCall.from_bytes(call_of(program, [2, 3, 4]).to_bytes())
    lp_M, advantages = draw(9), torch.arange(9) / 10
    whole, metrics = summed(call, 0, 3, lp_M.clone().requires_grad_())
    spans = ((0, 1, lp_M[:2]), (1, 3, lp_M[2:]))
    parts = [summed(call, first, last, lp_M.clone().requires_grad_()) for first, last, lp_M in spans]
    alone = [pointwise(lp_M[a:b], advantages[a:b]) for a, b in ((0, 2), (2, 5), (5, 9))]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-6)
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts), rel=1e-6)
    assert metrics["custom/n:sum"].item() == sum(part["custom/n:sum"].item() for _, part in parts) == 9
    mean = np.mean([found["custom/ratio:mean"].item() for _, found in alone])
    assert metrics["custom/ratio:mean"].item() == pytest.approx(mean)
    assert sum(part["custom/ratio:mean"].item() for _, part in parts) == pytest.approx(mean)


def test_a_loss_that_has_nothing_to_do_with_logprobs_is_refused() -> None:
    program = program_of(body(lambda logprobs, advantages: (advantages.sum(), {}), logprobs=1, advantages=1))
    with pytest.raises(CustomLossError, match="depend"):
        summed(call_of(program, [2]), 0, 1, torch.zeros(2, requires_grad=True))
