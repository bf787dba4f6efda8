"""A real server, trained and sampled by the SDK, and what an operator sees of it: every number as it must be."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from prometheus_client.parser import text_string_to_metric_families as parse
from tinker import types

from tests.contract.datums import supervised, tokens
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("operations"), pytest.mark.timeout(300)]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("operations")
    arguments = ["--threads", "1", "--log-format", "json"]
    with LocalServer(folder / "data", folder / "log.txt", arguments) as server:
        yield server


def scrape(server: LocalServer) -> Samples:
    text = httpx.get(f"{server.base_url}/metrics", trust_env=False, timeout=60).raise_for_status().text
    return {(s.name, frozenset(s.labels.items())): s.value for family in parse(text) for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"tinsmith_{name}", frozenset(labels.items())), 0.0)


def told(server: LocalServer, since: Samples | None = None) -> Samples:
    """What the engine says with its second heartbeat from now: the first may have been under way."""
    deadline, beats, last = time.monotonic() + 120, 0, float("inf")
    while time.monotonic() < deadline:
        samples = scrape(server)
        age = value(samples, "engine_beat_age_seconds", model="tiny")
        beats += age < last
        last = age
        if beats > 2 and value(samples, "engine_state", model="tiny", state="ready"):
            return samples
        time.sleep(0.2)
    raise AssertionError(f"no heartbeats; the log ends:\n{server.tail()}")


def ended(samples: Samples) -> dict[tuple[str, str], float]:
    """(kind, outcome) → how many, where there are any."""
    found = {}
    for (name, labels), count in samples.items():
        if name == "tinsmith_jobs_ended_total" and count:
            values = dict(labels)
            found[values["kind"], values["outcome"]] = count
    return found


def lines(server: LocalServer) -> list[dict[str, Any]]:
    """The log's JSON objects; the supervisor greets people in plain text, and the last line may be half written."""
    whole = server.log.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def tinsmith(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from tinsmith.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | environment)


def test_the_numbers_move_by_what_was_done(server: LocalServer) -> None:
    before = told(server)
    with tinker.ServiceClient(base_url=server.base_url) as service:
        client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        rows = [tokens(11, seed=3), tokens(21, seed=4)]
        for _ in range(2):
            client.forward_backward([supervised(row) for row in rows], "cross_entropy").result()
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        client.forward([supervised(rows[0])], "cross_entropy").result()
        sampler = client.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(tokens(40, seed=5))
        params = types.SamplingParams(max_tokens=6, stop=[])
        output = sampler.sample(prompt, 3, params).result()
        assert [len(sequence.tokens) for sequence in output.sequences] == [6, 6, 6]
    nothing = {"tinker_path": "tinker://nobody:train:0/weights/nothing"}
    httpx.post(f"{server.base_url}/api/v1/weights_info", json=nothing, trust_env=False, timeout=60)
    after = told(server)
    jobs = {end: count - ended(before).get(end, 0) for end, count in ended(after).items()}
    assert jobs == {
        ("create_model", "done"): 1,
        ("forward_backward", "done"): 2,
        ("optim_step", "done"): 2,
        ("forward", "done"): 1,
        ("save_weights_for_sampler", "done"): 1,
        ("sample", "done"): 1,
    }

    def moved(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    counted = {
        what: moved("engine_tokens_total", model="tiny", what=what) for what in ("trained", "forward", "sampled")
    }
    assert counted == {"trained": 2 * (10 + 20), "forward": 10, "sampled": 18}
    assert moved("engine_tokens_total", model="tiny", what="prefilled") == 40
    assert moved("batch_requests_count", model="tiny") == moved("batch_requests_sum", model="tiny") == 3
    assert moved("batch_tokens_sum", model="tiny") == 70
    assert moved("job_seconds_count", model="tiny", kind="optim_step") == 2
    routes = {"forward_backward": 3, "optim_step": 2, "asample": 1, "create_model": 1}
    for route, count in routes.items():
        labels = {"route": f"/api/v1/{route}", "method": "POST", "status": "200"}
        assert moved("http_requests_total", **labels) == count, route
    refused = {"route": "/api/v1/weights_info", "method": "POST", "status": "404"}
    assert moved("http_requests_total", **refused) == 1
    assert value(after, "engine_recoveries_total", model="tiny") == 0
    assert value(after, "database_up") == 1


def test_a_trace_can_be_followed_through_the_logs_of_both_processes(server: LocalServer) -> None:
    with httpx.Client(base_url=f"{server.base_url}/api/v1", trust_env=False, timeout=60) as http:
        session = http.post("/create_session", json={"tags": []}).json()["session_id"]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
        sampler = http.post("/create_sampling_session", json=body).json()["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
        body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 2}}
        submitted = http.post("/asample", json=body, headers={"x-request-id": "follow-me"})
        answer = http.post("/retrieve_future", json={"request_id": submitted.json()["request_id"]})
        assert answer.headers["x-trace-id"] == submitted.headers["x-trace-id"] == "follow-me"
    deadline = time.monotonic() + 30
    while True:
        about = [x for x in lines(server) if x.get("trace") == "follow-me" or "follow-me" in x.get("traces", [])]
        if len(about) >= 4 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    stations = {(line["process"], line["message"]) for line in about}
    assert stations == {("api", "accepted"), ("engine", "running"), ("engine", "done"), ("api", "answered")}


def test_status_asks_a_running_server(server: LocalServer, tmp_path: Path) -> None:
    shown = tinsmith("status", "--url", server.base_url)
    assert shown.returncode == 0, shown
    assert "tiny" in shown.stdout and "ready" in shown.stdout
    as_json = json.loads(tinsmith("status", "--url", server.base_url, "--json").stdout)
    assert as_json["engines"][0]["state"] == "ready"
    assert tinsmith("status", TINKER_BASE_URL=server.base_url).returncode == 0
    nobody = tinsmith("status", "--url", "http://127.0.0.1:9", TINKER_BASE_URL=server.base_url)
    assert nobody.returncode == 1 and "127.0.0.1:9" in nobody.stderr
    doctor = tinsmith(
        "doctor", "--data-dir", str(server.data_dir), "--port", server.base_url.rpartition(":")[2], "tiny"
    )
    assert doctor.returncode == 0, doctor
    assert "a Tinsmith server answers" in doctor.stdout


def test_a_killed_engines_numbers_vanish_and_its_return_is_a_recovery(server: LocalServer) -> None:
    before = told(server)
    engine = server.processes()["engine"]
    engine.kill()
    engine.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        samples = scrape(server)
        if value(samples, "engine_recoveries_total", model="tiny") > value(
            before, "engine_recoveries_total", model="tiny"
        ):
            break
        time.sleep(0.05)
    assert value(before, "engine_recoveries_total", model="tiny") == 0
    assert value(samples, "engine_starts_total", model="tiny") == value(before, "engine_starts_total", model="tiny") + 1
    if not value(samples, "engine_state", model="tiny", state="ready"):
        assert ended(samples) == {}
    assert ended(told(server)) == {}
