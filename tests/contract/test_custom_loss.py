"""Losses of create_custom_loss: uploaded, kept, their owner's alone, and equal to the same function in the client."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.contract.api_fixtures import Api, running_api
from tests.contract.datums import logprobs_of, score, tokens
from tests.contract.test_api_rules import find, message
from tests.unit.test_custom_loss import body, pointwise
from tinsmith.demo.local_server import LocalServer
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.packing import TrainCall

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("losses"), api_keys=("tml-anna", "tml-ben")) as api:
        api.http = api.client("tml-anna")
        yield api


def upload(api: Api, session: str, number: int = 0) -> Any:
    content = body(pointwise, logprobs=1, advantages=1) | {"session_id": session, "custom_loss_seq_id": number}
    return api.http.post("/create_custom_loss", json=content)


def custom(model: str, seq: int, loss_id: str, **advantages: Any) -> bytes:
    """A request with a custom loss, of two tokens."""
    request = pb.ForwardBackwardRequest.FromString(message(model, seq))
    request.loss_fn = "custom"
    request.loss_fn_config_v2["loss_id"].text = loss_id
    inputs = request.data[0].loss_fn_inputs
    del inputs["weights"]
    values = advantages.get("values", np.ones(2, np.float32))
    inputs["advantages"].dense, inputs["advantages"].dtype = values.tobytes(), pb.DTYPE_FLOAT32
    inputs["advantages"].shape.extend(advantages.get("shape", [2]))
    return request.SerializeToString()


def test_a_loss_is_kept_and_travels_with_every_request_that_uses_it(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    answers = [api.result(upload(api, session)).json() for _ in range(2)]
    assert answers == [{"loss_id": f"{session}:loss:0", "type": "create_custom_loss"}] * 2
    api.result(api.http.post("/forward_backward", content=custom(model, 1, answers[0]["loss_id"])))
    ((_, _, packed),) = [job for job in api.engine.bodies(model) if job[1] == "forward_backward"]
    loss = TrainCall.from_bytes(packed).custom
    assert loss is not None
    assert loss.program["name"] == "pointwise"
    assert (loss.values["advantages"].tolist(), loss.shapes["advantages"].tolist()) == ([1.0, 1.0], [[2]])


def test_a_number_means_one_loss_for_ever(api: Api) -> None:
    session = api.session()
    assert upload(api, session).status_code == 200
    other = body(lambda logprobs: (logprobs.sum(), {}), logprobs=1) | {"session_id": session, "custom_loss_seq_id": 0}
    refused = api.http.post("/create_custom_loss", json=other)
    assert (refused.status_code, "another one" in refused.json()["detail"]) == (400, True)
    assert upload(api, session, 1000).status_code == 400


def test_another_tenants_loss_does_not_exist(api: Api) -> None:
    session = api.session()
    loss_id = api.result(upload(api, session)).json()["loss_id"]
    with api.client("tml-ben") as ben:
        anna, api.http = api.http, ben
        try:
            assert upload(api, session).status_code == 404
            model = api.model(api.session())
            assert ben.post("/forward_backward", content=custom(model, 1, loss_id)).status_code == 404
            assert find(api, f"{model}:1").state == "failed", "its seq is used up"  # type: ignore[union-attr]
        finally:
            api.http = anna


def test_inputs_that_are_not_what_the_loss_declares_are_refused(api: Api) -> None:
    session = api.session()
    model, loss_id = api.model(session), api.result(upload(api, session)).json()["loss_id"]
    wrong = [
        custom(model, 1, loss_id, shape=[2, 1]),
        custom(model, 2, loss_id, shape=[3]),
        custom(model, 3, loss_id, values=np.array([1.0, np.nan], np.float32)),
        custom(model, 4, f"{session}:loss:9"),
        custom(model, 5, "\0"),
    ]
    without = pb.ForwardBackwardRequest.FromString(custom(model, 6, loss_id))
    del without.data[0].loss_fn_inputs["advantages"]
    unnamed = pb.ForwardBackwardRequest.FromString(custom(model, 7, loss_id))
    unnamed.loss_fn_config_v2.clear()
    for request in (*wrong, without.SerializeToString(), unnamed.SerializeToString()):
        assert api.http.post("/forward_backward", content=request).status_code in (400, 404)


def clipped(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> Any:
    ratio = torch.exp(logprobs - old)
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    return -gain.sum(), {"custom/clipped:mean": (gain < ratio * advantages).float().mean()}


def in_client(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """The same loss, as a function that the client runs."""
    losses, shares = [], []
    for datum, lp in zip(data, logprobs, strict=True):
        loss, metrics = clipped(lp, *(datum.loss_fn_inputs[name].to_torch() for name in ("old", "advantages")))
        losses.append(loss)
        shares.append(metrics["custom/clipped:mean"].item())
    return torch.stack(losses).sum(), {"custom/clipped:mean": float(np.mean(shares))}


def datums() -> list[types.Datum]:
    made = []
    for seed, length in enumerate((6, 11, 9)):
        sequence, noise = tokens(length + 1, seed), np.random.default_rng(seed)
        made.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(sequence[:-1]),
                loss_fn_inputs={
                    "target_tokens": np.array(sequence[1:], np.int64),
                    "old": noise.normal(-7, 0.1, length).astype(np.float32),
                    "advantages": noise.normal(size=length).astype(np.float32),
                },
            )
        )
    return made


def test_a_loss_on_the_server_trains_as_the_same_function_in_the_client_does(server: LocalServer) -> None:
    with tinker.ServiceClient(base_url=server.base_url) as service:
        here, there = (service.create_lora_training_client("tiny", rank=4, seed=3).result() for _ in range(2))
        handle = service.create_custom_loss(clipped, {"logprobs": 1, "old": 1, "advantages": 1}).result()
        assert handle.loss_id is not None
        data = datums()
        for _ in range(2):
            ours = here.forward_backward_custom(data, in_client).result()
            theirs = there.forward_backward_custom(data, handle).result()
            for name in ("loss:sum", "custom/clipped:mean"):
                assert theirs.metrics[name] == pytest.approx(ours.metrics[name], rel=1e-5)
            for one, other in zip(logprobs_of(ours), logprobs_of(theirs), strict=True):
                np.testing.assert_allclose(other, one, atol=1e-5)
            for client in (here, there):
                client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        plain = [types.Datum(model_input=d.model_input, loss_fn_inputs=_scored(d)) for d in data]
        np.testing.assert_allclose(score(there, plain), score(here, plain), atol=1e-4)


def _scored(datum: types.Datum) -> dict[str, Any]:
    targets = datum.loss_fn_inputs["target_tokens"]
    return {"target_tokens": targets, "weights": np.ones(len(targets.data), np.float32)}


def test_a_loss_that_fails_is_its_requests_own_fault(server: LocalServer) -> None:
    with tinker.ServiceClient(base_url=server.base_url) as service:
        client = service.create_lora_training_client("tiny", rank=4, seed=3).result()
        handle = service.create_custom_loss(
            lambda logprobs: ((logprobs.view(2, -1) * 1.0).sum(), {}), {"logprobs": 1}
        ).result()
        bare = [
            types.Datum(model_input=d.model_input, loss_fn_inputs={"target_tokens": d.loss_fn_inputs["target_tokens"]})
            for d in datums()
        ]
        assert client.forward_backward_custom(bare[:1], handle).result().metrics["loss:sum"] < 0
        with pytest.raises(tinker.RequestFailedError, match="fails in view"):
            client.forward_backward_custom(bare, handle).result()
        steps = service.create_custom_loss(
            lambda logprobs: (torch.floor_divide(logprobs, 2).sum(), {}), {"logprobs": 1}
        ).result()
        with pytest.raises(tinker.RequestFailedError, match="has no gradient"):
            client.forward_backward_custom(bare, steps).result()
        assert client.forward_backward_custom(bare[:1], handle).result().metrics["loss:sum"] < 0
