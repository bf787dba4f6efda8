"""A server with API keys: strangers stay out, and one key's objects do not exist for another."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tinker

from tests.contract.datums import supervised, tokens
from tests.contract.raw import RawClient
from tinsmith.demo.local_server import LocalServer
from tinsmith.store import keys
from tinsmith.store.database import Database

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


def test_a_key_made_beside_the_running_server_opens_it_until_it_is_revoked(small_server: LocalServer) -> None:
    def command(*arguments: str) -> str:
        program = [sys.executable, "-c", "from tinsmith.cli import main; main()", "keys", *arguments]
        folder = ["--data-dir", str(small_server.data_dir)]
        return subprocess.run([*program, *folder], capture_output=True, text=True, check=True).stdout.strip()

    def await_status(status: int) -> None:
        with RawClient(small_server.base_url, key) as client:
            for _ in range(300):
                if client.request("GET", "/sessions").status_code == status:
                    return
                time.sleep(0.1)
        pytest.fail(f"the server did not come to answer {status}")

    key = command("create", "carla", "--max-models", "1", "--max-storage", "500000")
    await_status(200)
    with RawClient(small_server.base_url, key) as carla:
        model = carla.create_model(carla.create_session())
        second = carla.post(
            "/create_model", {"session_id": model.split(":")[0], "model_seq_id": 1, "base_model": "tiny"}
        )
        assert second.status_code == 403
        names = ["one", "two", "three", "four", "five", "six"]
        saves = [
            carla.post("/save_weights", {"model_id": model, "seq_id": 1 + index, "path": name})
            for index, name in enumerate(names)
        ]
        saved = [carla.result(save).json() for save in saves]
        stored = carla.request("GET", "/checkpoints").json()["checkpoints"]
    refused = [answer for answer in saved if "error" in answer]
    assert stored and refused
    assert all((each["category"], "at most 500000" in each["error"]) == ("user", True) for each in refused)
    assert len(stored) == len(names) - len(refused)
    assert sum(each["size_bytes"] for each in stored) <= 500_000
    command("revoke", "carla")
    await_status(401)


def test_the_sdk_raises_at_once_what_waiting_cannot_help(small_server: LocalServer) -> None:
    secret, key = keys.new_key("dora")
    database = Database(f"sqlite:///{small_server.data_dir}/tinsmith.db")
    database.write(keys.create_key, replace(key, max_models=1, tokens_per_second=1.0))
    database.close()
    while tinker_status(small_server, secret) == 401:
        time.sleep(0.1)
    with tinker.ServiceClient(base_url=small_server.base_url, api_key=secret) as service:
        client = service.create_lora_training_client("tiny", rank=4).result()
        with pytest.raises(tinker.PermissionDeniedError, match="1 open models of at most 1"):
            service.create_lora_training_client("tiny", rank=4).result()
        with pytest.raises(tinker.PermissionDeniedError, match="at most 240"):
            client.forward_backward([supervised(tokens(300))], "cross_entropy").result()
        # The second call finds the bucket overdrawn by the first, waits as it is told to, and loses nothing.
        first = client.forward_backward([supervised(tokens(12))], "cross_entropy")
        second = client.forward_backward([supervised(tokens(12))], "cross_entropy")
        assert first.result().metrics["loss:sum"] == pytest.approx(second.result().metrics["loss:sum"])


def tinker_status(server: LocalServer, key: str) -> int:
    with RawClient(server.base_url, key) as client:
        return client.request("GET", "/sessions").status_code


def test_a_health_check_needs_no_key(small_server: LocalServer) -> None:
    assert small_server.is_ready()
