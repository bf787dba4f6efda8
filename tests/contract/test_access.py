"""A server with API keys: strangers stay out, and one key's objects do not exist for another."""

from collections.abc import Iterator

import pytest
import tinker

from tests.contract.datums import supervised, tokens
from tests.contract.raw import RawClient
from tinsmith.demo.local_server import LocalServer

pytestmark = pytest.mark.xdist_group("restart")

DATUMS = [supervised(tokens(8))]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, client_environment: None) -> Iterator[LocalServer]:
    """Knows two keys, serves one name only, and takes small bodies."""
    folder = tmp_path_factory.mktemp("guarded")
    arguments = ["--api-key", "tml-anna", "--api-key", "tml-ben"]
    environment = {"TINSMITH_MAX_BODY_BYTES": str(2**20)}
    with LocalServer(folder / "data", folder / "log.txt", arguments, environment=environment) as server:
        yield server


@pytest.fixture
def anna(guarded: LocalServer) -> Iterator[RawClient]:
    with RawClient(guarded.base_url, "tml-anna") as client:
        yield client


@pytest.fixture
def ben(guarded: LocalServer) -> Iterator[RawClient]:
    with RawClient(guarded.base_url, "tml-ben") as client:
        yield client


@pytest.mark.parametrize("key", ["tml-mallory", "tml-ann", "tml-annaa", ""])
def test_a_wrong_key_opens_nothing(guarded: LocalServer, key: str) -> None:
    with RawClient(guarded.base_url, key) as client:
        for method, path in (
            ("POST", "/create_session"),
            ("POST", "/forward_backward"),
            ("GET", "/training_runs"),
            ("GET", "/get_server_capabilities"),
        ):
            answer = client.request(method, path, content=b"{}")
            assert answer.status_code == 401, path
            assert "anna" not in answer.text


def test_the_sdk_is_told_that_its_key_is_wrong(guarded: LocalServer) -> None:
    with pytest.raises(tinker.AuthenticationError, match=r"(?i)key"):
        tinker.RestClient(base_url=guarded.base_url, api_key="tml-mallory").get_server_capabilities().result()


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


def test_a_body_over_the_limit_is_refused_and_the_next_goes_on(anna: RawClient) -> None:
    model = anna.create_model(anna.create_session())
    large = [supervised(tokens(4000, seed)) for seed in range(20)]
    answer = anna.forward_backward(model, 1, large)
    assert answer.status_code == 413
    assert str(2**20) in answer.json()["detail"]
    assert anna.result(anna.forward_backward(model, 2, DATUMS), protobuf=True).status_code == 200


def test_a_health_check_needs_no_key(guarded: LocalServer) -> None:
    assert guarded.is_ready()
