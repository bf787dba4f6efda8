"""A server with API keys: strangers stay out, and one key's objects do not exist for another."""

import pytest
import tinker

from tests.contract.datums import supervised, tokens
from tests.contract.raw import RawClient
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("small server"), pytest.mark.timeout(300)]

DATUMS = [supervised(tokens(8))]


@pytest.mark.parametrize("key", ["tml-mallory", "tml-ann", "tml-annaa", ""])
def test_a_wrong_key_opens_nothing(small_server: LocalServer, key: str) -> None:
    with RawClient(small_server.base_url, key) as client:
        for method, path in (
            ("POST", "/create_session"),
            ("POST", "/forward_backward"),
            ("GET", "/training_runs"),
            ("GET", "/get_server_capabilities"),
        ):
            answer = client.request(method, path, content=b"{}")
            assert answer.status_code == 401, path
            assert "anna" not in answer.text


def test_the_sdk_is_told_that_its_key_is_wrong(small_server: LocalServer) -> None:
    with pytest.raises(tinker.AuthenticationError, match=r"(?i)key"):
        tinker.RestClient(base_url=small_server.base_url, api_key="tml-mallory").get_server_capabilities().result()


def test_another_keys_objects_do_not_exist(anna: RawClient, ben: RawClient) -> None:
    session = anna.create_session()
    model = anna.create_model(session)
    submitted = anna.forward_backward(model, 1, DATUMS)
    anna.result(submitted)
    saved = anna.post("/save_weights", {"model_id": model, "seq_id": 2, "path": "mine"})
    path = anna.result(saved).json()["path"]
    sampler = anna.post(
        "/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    ).json()["sampling_session_id"]
    home = ben.create_session()
    tries = [
        ben.forward_backward(model, 3, DATUMS),
        ben.optim_step(model, 3),
        ben.post("/get_info", {"model_id": model}),
        ben.post("/retrieve_future", {"request_id": submitted.json()["request_id"]}),
        ben.request("GET", f"/training_runs/{model}"),
        ben.request("GET", f"/training_runs/{model}/checkpoints"),
        ben.request("DELETE", f"/training_runs/{model}/checkpoints/weights/mine"),
        ben.request("GET", f"/samplers/{sampler}"),
        ben.request("GET", f"/sessions/{session}"),
        ben.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}}),
        ben.post("/session_heartbeat", {"session_id": session}),
        ben.post("/weights_info", {"tinker_path": path}),
        ben.post("/load_weights", {"session_id": home, "model_seq_id": 0, "path": path, "optimizer": True}),
        ben.post("/create_model", {"session_id": session, "model_seq_id": 7, "base_model": "tiny"}),
    ]
    assert [answer.status_code for answer in tries] == [404] * len(tries)
    assert ben.request("GET", "/training_runs").json()["training_runs"] == []
    assert ben.request("GET", "/checkpoints").json()["checkpoints"] == []
    assert anna.result(anna.forward_backward(model, 3, DATUMS), protobuf=True).status_code == 200
    assert anna.request("GET", f"/training_runs/{model}/checkpoints").json()["checkpoints"][0]["tinker_path"] == path


def test_only_the_served_model_is_served(anna: RawClient) -> None:
    session = anna.create_session()
    for path, number in (("/create_model", "model_seq_id"), ("/create_sampling_session", "sampling_session_seq_id")):
        answer = anna.post(path, {"session_id": session, number: 5, "base_model": "Qwen/Qwen3-8B"})
        assert 400 <= answer.status_code < 500
        assert "Qwen/Qwen3-8B" in answer.json()["detail"]
        assert "tiny" in answer.json()["detail"]


def test_a_health_check_needs_no_key(small_server: LocalServer) -> None:
    assert small_server.is_ready()
