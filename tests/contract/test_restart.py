"""Processes die and come back; clients notice a pause at most, and what was learned stays."""

import http.client
import os
import signal
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
import tinker
from tinker import types

from tests.contract.datums import greedy, score, supervised, tokens
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("restart"), pytest.mark.timeout(300)]

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
EXAM = [supervised(tokens(24, seed=99))]
PROMPT = types.ModelInput.from_ints(tokens(6, seed=1))
STEPS = 12
RANKS = (8, 0)
Futures = list[tinker.APIFuture[object]]


@pytest.fixture(scope="module")
def hurt_server(tmp_path_factory: pytest.TempPathFactory, client_environment: None) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("hurt")
    environment = {"TINSMITH_STUCK_MINUTES": "0.15"}  # longer than any slice of work here
    with LocalServer(folder / "data", folder / "log.txt", environment=environment) as server:
        yield server


@pytest.fixture
def own_server(hurt_server: LocalServer) -> LocalServer:
    """A server that may be hurt; it is started again if another test has ended it."""
    assert hurt_server._process is not None
    if hurt_server._process.poll() is not None:
        hurt_server.start()
    return hurt_server


def kill(server: LocalServer, role: str) -> None:
    """kill -9; returns when the process is gone."""
    process = server.processes()[role]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)


def start(service: tinker.ServiceClient, rank: int) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=rank, seed=5).result()


def submit(client: tinker.TrainingClient, steps: range) -> Futures:
    """Some steps of a supervised loop, without waiting for any."""
    futures: Futures = []
    for number in steps:
        datums = [supervised(tokens(12 + number, seed=10 * number + place)) for place in range(3)]
        futures += [client.forward_backward(datums, "cross_entropy"), client.optim_step(ADAM)]
    return futures


@pytest.mark.parametrize("role", ["engine", "api"])
def test_loops_do_not_notice_that_a_process_was_killed(own_server: LocalServer, role: str) -> None:
    with tinker.ServiceClient(base_url=own_server.base_url) as service:
        expected = []
        for rank in RANKS:
            client = start(service, rank)
            submit(client, range(STEPS))
            expected.append(score(client, EXAM))
        clients = [start(service, rank) for rank in RANKS]
        for client in clients:
            submit(client, range(STEPS // 2))[1].result()
        kill(own_server, role)
        futures = [future for client in clients for future in submit(client, range(STEPS // 2, STEPS))]
        for future in futures:
            future.result()
        for client, quiet in zip(clients, expected, strict=True):
            np.testing.assert_allclose(score(client, EXAM), quiet, atol=1e-5)


def test_samplers_and_samples_under_way_survive_the_engine(own_server: LocalServer) -> None:
    with tinker.ServiceClient(base_url=own_server.base_url) as service:
        client = service.create_lora_training_client("tiny", rank=8, seed=5).result()
        client.forward_backward([supervised(tokens(30, seed=2))], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2))
        sampler = client.save_weights_and_get_sampling_client().result()
        expected = sampler.sample(PROMPT, 1, greedy(30)).result().sequences[0].tokens
        client.forward_backward([supervised(tokens(30, seed=3))], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        pending = sampler.sample(PROMPT, 8, greedy(400))
        kill(own_server, "engine")
        assert [sequence.tokens[:30] for sequence in pending.result().sequences] == [expected] * 8
        assert sampler.sample(PROMPT, 1, greedy(30)).result().sequences[0].tokens == expected


def test_an_engine_that_stands_still_is_replaced_and_answers_what_it_was_asked(own_server: LocalServer) -> None:
    with tinker.ServiceClient(base_url=own_server.base_url) as service:
        client = start(service, 8)
        expected = score(client, EXAM)
        own_server.processes()["engine"].send_signal(signal.SIGSTOP)
        np.testing.assert_allclose(score(client, EXAM), expected, atol=1e-5)
    assert "engine is alive but has not moved for 9 s" in own_server.log.read_text()


def test_a_connection_made_while_the_api_is_away_is_answered_by_the_next_one(own_server: LocalServer) -> None:
    kill(own_server, "api")
    address = urlsplit(own_server.base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.request("GET", "/api/v1/healthz")
    assert connection.getresponse().status in (200, 503)
    connection.close()


def test_a_server_that_ctrl_c_has_ended_still_has_models_samplers_and_checkpoints(own_server: LocalServer) -> None:
    first = tinker.ServiceClient(base_url=own_server.base_url)
    client = first.create_lora_training_client("tiny", rank=8, seed=5).result()
    client.forward_backward(EXAM, "cross_entropy")
    client.optim_step(ADAM)
    state = client.save_state("before").result().path
    named = client.save_weights_for_sampler("before").result().path
    expected = score(client, EXAM)
    drawn = first.create_sampling_client(model_path=named).result().sample(PROMPT, 1, greedy(10)).result()
    processes = own_server.processes()
    assert own_server.stop(signal.SIGINT) == 0
    assert not any(process.is_running() for role, process in processes.items() if role != "server")
    own_server.start()
    with tinker.ServiceClient(base_url=own_server.base_url) as service:
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        np.testing.assert_allclose(score(resumed, EXAM), expected, atol=1e-6)
        again = service.create_sampling_client(model_path=named).result().sample(PROMPT, 1, greedy(10)).result()
        assert again.sequences[0].tokens == drawn.sequences[0].tokens
        runs = tinker.RestClient(base_url=own_server.base_url).list_training_runs(limit=500).result().training_runs
        assert client.model_id in {run.training_run_id for run in runs}


def test_no_process_outlives_a_killed_supervisor(own_server: LocalServer) -> None:
    processes = own_server.processes()
    assert set(processes) == {"server", "api", "engine"}
    kill(own_server, "server")
    for role in ("api", "engine"):
        processes[role].wait(60)
