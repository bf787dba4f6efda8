"""What is wrong with a request is refused by name, and everybody's later requests go on, its sender's included."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tests.contract.datums import rollout, supervised, tokens
from tests.contract.raw import RawClient, forward_backward_message
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

DATUMS = [supervised(tokens(8))]
ROLLOUTS = [rollout(tokens(8), [-1.0] * 7, [1.0] * 7)]
BOMB = zstandard.compress(bytes(600 * 2**20))


@dataclass
class Tenant:
    """One client's model."""

    client: RawClient
    session: str
    model: str

    def works(self) -> bool:
        """Whether its next requests are done."""
        seq = self.client.take_seq(self.model)
        answer = self.client.result(self.client.forward_backward(self.model, seq, DATUMS), protobuf=True)
        return answer.status_code == 200 and b"loss:sum" in answer.content


@pytest.fixture(scope="module")
def tenant(raw: RawClient) -> Tenant:
    session = raw.create_session()
    return Tenant(raw, session, raw.create_model(session))


@pytest.fixture(scope="module")
def neighbour(server: LocalServer) -> Iterator[Tenant]:
    with RawClient(server.base_url, "tml-neighbour") as client:
        session = client.create_session()
        yield Tenant(client, session, client.create_model(session))


def refusal(client: RawClient, answer: httpx.Response) -> str:
    """The text with which a request was refused, at the door or later as its sender's own fault."""
    if 400 <= answer.status_code < 500:
        assert answer.status_code not in (402, 408, 409, 429), answer.status_code
        return str(answer.json()["detail"])
    body = client.result(answer).json()
    assert body["category"] == "user", body
    return str(body["error"])


def change_tensor(key: str, **fields: Any) -> Callable[[pb.ForwardBackwardRequest], None]:
    def change(message: pb.ForwardBackwardRequest) -> None:
        for name, value in fields.items():
            tensor = message.data[0].loss_fn_inputs[key]
            if name == "shape":
                tensor.shape[:] = value
            else:
                setattr(tensor, name, value)

    return change


def set_tokens(values: list[int]) -> Callable[[pb.ForwardBackwardRequest], None]:
    def change(message: pb.ForwardBackwardRequest) -> None:
        message.data[0].model_input[0].encoded_text.tokens = np.array(values, np.int32).tobytes()

    return change


def floats(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def set_loss(name: str) -> Callable[[pb.ForwardBackwardRequest], None]:
    return lambda message: setattr(message, "loss_fn", name)


def set_config(key: str, value: float) -> Callable[[pb.ForwardBackwardRequest], None]:
    return lambda message: message.loss_fn_config_v2[key].__setattr__("number", value)


def unclipped(message: pb.ForwardBackwardRequest) -> None:
    message.loss_fn = "ppo"
    message.loss_fn_config_v2["clip_low_threshold"].number = math.nan


def rename(old: str, new: str) -> Callable[[pb.ForwardBackwardRequest], None]:
    def change(message: pb.ForwardBackwardRequest) -> None:
        message.data[0].loss_fn_inputs[new].CopyFrom(message.data[0].loss_fn_inputs[old])
        del message.data[0].loss_fn_inputs[old]

    return change


def add_image(message: pb.ForwardBackwardRequest) -> None:
    message.data[0].model_input.add().image.format = "png"


BAD_DATUMS: dict[str, tuple[list[types.Datum], Callable[[pb.ForwardBackwardRequest], Any], list[str]]] = {
    "unknown loss": (DATUMS, set_loss("cross_entropie"), ["cross_entropie", "cross_entropy"]),
    "no loss": (DATUMS, set_loss(""), ["loss_fn", "cross_entropy"]),
    "a missing input": (DATUMS, set_loss("ppo"), ["logprobs|advantages", "missing"]),
    "an unknown input": (DATUMS, rename("weights", "wights"), ["weights|wights"]),
    "one loss's input given to another": (ROLLOUTS, set_loss("cross_entropy"), ["advantages|weights"]),
    "an unknown setting": (ROLLOUTS, set_config("clip", 1.0), ["clip"]),
    "a setting of another loss": (ROLLOUTS, set_config("beta", 1.0), ["beta"]),
    "a setting that is no number": (ROLLOUTS, unclipped, ["clip_low_threshold", "nan"]),
    "weights too short": (DATUMS, change_tensor("weights", dense=floats(1, 1), shape=[2]), ["weights", "2", "7"]),
    "targets too short": (DATUMS, change_tensor("target_tokens", dense=bytes(16), shape=[2]), ["target_tokens", "7"]),
    "bytes that do not fill the shape": (DATUMS, change_tensor("weights", dense=floats(1)), ["weights", "7"]),
    "half a number": (DATUMS, change_tensor("weights", dense=b"abc"), ["weights", "3|7"]),
    "a shape of many dimensions": (DATUMS, change_tensor("weights", shape=[7, 1, 1]), ["weights"]),
    "a negative shape": (DATUMS, change_tensor("weights", shape=[-7]), ["weights", "-7"]),
    "a huge shape": (DATUMS, change_tensor("weights", shape=[2**40, 2**40]), ["weights"]),
    "floats for tokens": (DATUMS, change_tensor("target_tokens", dtype=pb.DTYPE_FLOAT32), ["target_tokens", "int64"]),
    "integers for weights": (DATUMS, change_tensor("weights", dtype=pb.DTYPE_INT64), ["weights", "float32"]),
    "a weight that is no number": (
        DATUMS,
        change_tensor("weights", dense=floats(1, 1, math.nan, 1, 1, 1, 1)),
        ["weights", "nan"],
    ),
    "an infinite advantage": (
        ROLLOUTS,
        change_tensor("advantages", dense=floats(1, 1, 1, math.inf, 1, 1, 1)),
        ["advantages", "inf"],
    ),
    "a token beyond the vocabulary": (DATUMS, set_tokens([1, 2, 3, 4, 5, 6, 1280]), ["1280", "1279"]),
    "a negative token": (DATUMS, set_tokens([1, 2, 3, 4, 5, 6, -1]), ["-1", "1279"]),
    "a target beyond the vocabulary": (
        DATUMS,
        change_tensor("target_tokens", dense=np.full(7, 99999, np.int64).tobytes()),
        ["99999", "1279"],
    ),
    "a target beyond 32 bits": (
        DATUMS,
        change_tensor("target_tokens", dense=np.full(7, 2**32 + 5, np.int64).tobytes()),
        [str(2**32 + 5)],
    ),
    "no tokens": (DATUMS, set_tokens([]), ["0 tokens|empty"]),
    "no datum": (DATUMS, lambda message: message.ClearField("data"), ["datum"]),
    "more tokens than the context": (DATUMS, set_tokens([1] * 5000), ["5000", "4096"]),
    "an image": (DATUMS, add_image, ["image", "text"]),
}


@pytest.mark.parametrize("case", BAD_DATUMS)
def test_a_bad_datum_is_refused_and_the_next_request_goes_on(tenant: Tenant, neighbour: Tenant, case: str) -> None:
    datums, spoil, named = BAD_DATUMS[case]
    loss = "cross_entropy" if datums is DATUMS else "importance_sampling"
    message = forward_backward_message(tenant.model, tenant.client.take_seq(tenant.model), datums, loss)
    spoil(message)
    text = refusal(tenant.client, tenant.client.post_protobuf(message.SerializeToString()))
    for alternatives in named:
        assert any(word in text for word in alternatives.split("|")), f"{alternatives} is not named in: {text}"
    assert tenant.works()
    assert neighbour.works()


def good_body(tenant: Tenant) -> bytes:
    seq = tenant.client.take_seq(tenant.model)
    return forward_backward_message(tenant.model, seq, DATUMS).SerializeToString()


BROKEN_BODIES: dict[str, tuple[Callable[[bytes], bytes], dict[str, str], str]] = {
    "cut protobuf": (lambda body: body[:-3], {}, "protobuf"),
    "text after protobuf": (lambda body: body + b"\xff\xff\xff", {}, "protobuf"),
    "zstd that is none": (lambda body: body, {"Content-Encoding": "zstd"}, "zstd"),
    "cut zstd": (lambda body: zstandard.compress(body)[:-5], {"Content-Encoding": "zstd"}, "zstd"),
    "another encoding": (lambda body: body, {"Content-Encoding": "br"}, "br"),
}


@pytest.mark.parametrize("case", BROKEN_BODIES)
def test_a_broken_body_is_refused(tenant: Tenant, case: str) -> None:
    spoil, headers, named = BROKEN_BODIES[case]
    answer = tenant.client.post_protobuf(spoil(good_body(tenant)), headers)
    assert 400 <= answer.status_code < 500
    assert named in refusal(tenant.client, answer)
    # Where the encoding hides (model, seq), the server cannot know which one was spent.
    if headers:
        resent = forward_backward_message(tenant.model, tenant.client.seq[tenant.model] - 1, DATUMS)
        tenant.client.post_protobuf(resent.SerializeToString())
    assert tenant.works()


@pytest.mark.parametrize("body", [b"", b"\x00", b"{}", b"\xff" * 1000], ids=["empty", "zero", "json", "noise"])
def test_a_body_that_is_no_message_is_refused(tenant: Tenant, body: bytes) -> None:
    assert 400 <= tenant.client.post_protobuf(body).status_code < 500
    assert tenant.works()


def test_a_small_body_that_unpacks_to_a_huge_one_is_refused(tenant: Tenant) -> None:
    answer = tenant.client.post_protobuf(BOMB, {"Content-Encoding": "zstd"})
    assert answer.status_code == 413
    assert str(256 * 2**20) in answer.json()["detail"]
    assert tenant.works()


def test_an_oversize_body_is_refused(tenant: Tenant) -> None:
    pieces = (bytes(2**20) for _ in range(300))
    try:
        answer = tenant.client.post_protobuf(pieces)  # type: ignore[arg-type]
    except httpx.WriteError:
        pass  # the server answered and hung up while we were sending
    else:
        assert answer.status_code == 413
        assert str(256 * 2**20) in answer.json()["detail"]
    assert tenant.works()


BAD_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "a negative rate": ({"learning_rate": -1.0}, "learning_rate"),
    "beta of one": ({"beta1": 1.0}, "beta1"),
    "an unknown parameter": ({"momentum": 0.9}, "momentum"),
    "text for a number": ({"eps": "small"}, "eps"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_bad_step_is_refused_and_the_next_request_goes_on(tenant: Tenant, case: str) -> None:
    params, named = BAD_STEPS[case]
    answer = tenant.client.optim_step(tenant.model, tenant.client.take_seq(tenant.model), **params)
    assert named in refusal(tenant.client, answer)
    assert tenant.works()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(tenant: Tenant, number: str) -> None:
    seq = tenant.client.take_seq(tenant.model)
    content = f'{{"model_id": "{tenant.model}", "seq_id": {seq}, "adam_params": {{"learning_rate": {number}}}}}'
    answer = tenant.client.request("POST", "/optim_step", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    # Broken JSON names no request: the client would resend it whole.
    tenant.client.optim_step(tenant.model, seq)
    assert tenant.works()


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/save_weights", {"path": "../escape"}, "../escape"),
        ("/save_weights", {"path": "a/b"}, "a/b"),
        ("/save_weights", {"path": "x", "ttl_seconds": 5}, "ttl_seconds"),
        ("/save_weights", {"path": "n\x00l"}, r"n\x00l"),
        ("/load_weights", {"path": "tinker://nowhere:train:0/weights/x", "optimizer": True}, "nowhere"),
        ("/load_weights", {"path": "/etc/passwd", "optimizer": True}, "/etc/passwd"),
        ("/save_weights_for_sampler", {"path": "s", "kind": "frozen"}, "kind"),
        ("/save_weights_for_sampler", {}, "path"),
    ],
)
def test_a_bad_save_or_load_is_refused_by_name(tenant: Tenant, path: str, body: dict[str, Any], named: str) -> None:
    seq = tenant.client.take_seq(tenant.model)
    answer = tenant.client.post(path, {"model_id": tenant.model, "seq_id": seq} | body)
    assert named in refusal(tenant.client, answer)
    assert tenant.works()


@pytest.mark.parametrize("seq", [0, -5, 2**40])
def test_a_seq_that_cannot_be_is_refused(tenant: Tenant, seq: int) -> None:
    answer = tenant.client.optim_step(tenant.model, seq)
    if seq < 2**31:
        assert "seq_id" in refusal(tenant.client, answer)
    assert tenant.works()


@pytest.mark.parametrize("spoiled", [{"rank": -1}, {"rank": 10**6}, {"rank": 4, "alpha": 1}])
def test_a_bad_adapter_is_refused(tenant: Tenant, spoiled: dict[str, int]) -> None:
    body = {"session_id": tenant.session, "model_seq_id": 50, "base_model": "tiny", "lora_config": spoiled}
    text = refusal(tenant.client, tenant.client.post("/create_model", body))
    assert "rank" in text or "alpha" in text
    assert tenant.works()


def test_an_optimizer_that_the_server_has_not_is_refused(tenant: Tenant) -> None:
    body = {"session_id": tenant.session, "model_seq_id": 51, "base_model": "tiny", "lora_config": {"rank": 4}}
    text = refusal(tenant.client, tenant.client.post("/create_model", body | {"optimizer_config": {"type": "dimuon"}}))
    assert "dimuon" in text
    assert "adamw" in text


@pytest.mark.parametrize("path", ["/create_model", "/optim_step", "/asample", "/create_session", "/retrieve_future"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"type": 5}'])
def test_broken_json_is_refused_everywhere(raw: RawClient, path: str, content: bytes) -> None:
    answer = raw.request("POST", path, content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["detail"]


def sample_body(sampler: str, seq: int, **changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 2},
    }
    return body | changes


def text_prompt(*ids: Any) -> dict[str, Any]:
    return {"prompt": {"chunks": [{"type": "encoded_text", "tokens": list(ids)}]}}


BAD_SAMPLES: list[tuple[dict[str, Any], str]] = [
    (text_prompt(1, 1280), "1280"),
    (text_prompt(-1), "-1"),
    (text_prompt(2**70), "tokens"),
    (text_prompt("a"), "tokens"),
    (text_prompt(), "0 tokens"),
    (text_prompt(*[1] * 5000), "5000"),
    ({"prompt": {"chunks": []}}, "0 tokens"),
    ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "image"),
    ({"num_samples": 0}, "num_samples"),
    ({"num_samples": 10**9}, "num_samples"),
    ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
    ({"sampling_params": {"temperature": -1.0}}, "temperature"),
    ({"sampling_params": {"top_p": 0.0}}, "top_p"),
    ({"sampling_params": {"top_k": 0}}, "top_k"),
    ({"sampling_params": {"stop": [1, "a"]}}, "stop"),
    ({"sampling_params": {"stop": [5000]}}, "5000"),
    ({"sampling_params": {"min_p": 0.1}}, "min_p"),
    ({"prompt_logprobs_last_n": 2}, "prompt_logprobs"),
    ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
]


@pytest.mark.parametrize(("changes", "named"), BAD_SAMPLES, ids=lambda value: str(value)[:40])
def test_a_bad_sample_request_is_refused_and_others_go_on(
    raw: RawClient, tenant: Tenant, changes: dict[str, Any], named: str
) -> None:
    session = {"session_id": tenant.session, "sampling_session_seq_id": 900, "base_model": "tiny"}
    sampler = raw.post("/create_sampling_session", session).json()["sampling_session_id"]
    seq = abs(hash(json.dumps(changes))) % 10**9
    assert named in refusal(raw, raw.post("/asample", sample_body(sampler, seq, **changes)))
    answer = raw.result(raw.post("/asample", sample_body(sampler, seq + 1)), protobuf=True)
    assert answer.status_code == 200


def test_unknown_objects_are_named(raw: RawClient, tenant: Tenant) -> None:
    answers = {
        "no-such-run": raw.request("GET", "/training_runs/no-such-run"),
        "no-such-future": raw.post("/retrieve_future", {"request_id": "no-such-future"}),
        "no-such-model": raw.optim_step("no-such-model", 1),
        "no-such-sampler": raw.post("/asample", sample_body("no-such-sampler", 0)),
        "no-such-session": raw.post("/session_heartbeat", {"session_id": "no-such-session"}),
    }
    for name, answer in answers.items():
        assert answer.status_code == 404
        assert name in answer.json()["detail"]
    message = forward_backward_message("no-such-model", 1, DATUMS)
    assert "no-such-model" in refusal(raw, raw.post_protobuf(message.SerializeToString()))
    path = f"tinker://{tenant.model}/sampler_weights/none"
    body = {"session_id": tenant.session, "sampling_session_seq_id": 901, "model_path": path}
    assert path in refusal(raw, raw.post("/create_sampling_session", body))


def test_unknown_routes_and_methods_are_answered(raw: RawClient) -> None:
    assert raw.post("/no_such_route", {}).status_code == 404
    assert raw.request("DELETE", "/create_session").status_code == 405
    assert raw.request("GET", "/../../etc/passwd").status_code == 404
    assert raw.post("/create_custom_loss", {}).status_code in (400, 404, 422)
