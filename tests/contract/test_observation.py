"""What operators see over HTTP, on the API with a canned engine: metrics, status, traces."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.contract.api_fixtures import CAPABILITIES, Api, running_api
from tests.contract.test_api_rules import PROMPT, message
from tinsmith.api import overview
from tinsmith.observe import REQUESTS
from tinsmith.store import keys, queue, records
from tinsmith.wire.jobs import Job
from tinsmith.wire.statistics import Distribution, Statistics

Labels = dict[str, str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("observed")) as api:
        yield api


def scrape(api: Api) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    text = api.http.get(f"{api.base_url}/metrics").raise_for_status().text
    return {(s.name, frozenset(s.labels.items())): s.value for family in parse(text) for s in family.samples}


def value(api: Api, name: str, **labels: str) -> float | None:
    return scrape(api).get((f"tinsmith_{name}", frozenset(labels.items())))


def told(api: Api, age: float, state: str = "ready", numbers: Statistics | None = None) -> None:
    """The engine's record, as if it had been heard of `age` seconds ago."""
    written = None if numbers is None else numbers.to_dict()
    beat_at = time.time() - age
    record = records.EngineRecord("tiny", "canned", 1, state, "", asdict(CAPABILITIES), beat_at, written)
    api.database.write(records.put_engine, record)


def sample(api: Api, headers: Labels | None = None) -> httpx.Response:
    session = api.session()
    body = {"sampling_session_id": api.sampler(session), "seq_id": 0, "prompt": PROMPT, "sampling_params": {}}
    return api.http.post("/asample", json=body, headers=headers)


def test_requests_are_counted_by_route_method_and_status(api: Api) -> None:
    def counts() -> list[float]:
        samples = scrape(api)
        wanted = [
            {"route": "/api/v1/sessions/{session_id}", "method": "GET", "status": "404"},
            {"route": "/api/v1/create_session", "method": "POST", "status": "200"},
            {"route": "none", "method": "GET", "status": "404"},
            {"route": "none", "method": "other", "status": "404"},
            {"route": "/api/v1/create_session", "method": "PUT", "status": "405"},
        ]
        return [samples.get(("tinsmith_http_requests_total", frozenset(each.items())), 0.0) for each in wanted]

    before = counts()
    for number in range(3):
        assert api.http.get(f"/sessions/nobodys{number}").status_code == 404
    api.session()
    for path in ("/nothing", "/nothing/else"):
        api.http.get(path)
    for method in ("PROPFIND", "MKCOL"):
        assert api.http.request(method, "/nothing").status_code == 404
    api.http.put("/create_session")
    assert [after - earlier for after, earlier in zip(counts(), before, strict=True)] == [3, 1, 2, 2, 1]
    seconds = {labels for name, labels in scrape(api) if name == "tinsmith_http_request_seconds_count"}
    assert frozenset({("route", "/api/v1/sessions/{session_id}")}) in seconds
    assert len(seconds) <= len(api.routes) + 1
    assert not [name for name, _ in scrape(api) if name.endswith("_created")]


def test_what_the_supervisor_is_told_of_leaves_out_questions_how_the_server_is(api: Api) -> None:
    answered = api.counts.answered
    api.session()
    for path in ("/api/v1/healthz", "/metrics", "/status", "/nothing"):
        api.http.get(api.base_url + path)
    assert api.counts.answered == answered + 1


def test_a_request_that_breaks_the_server_is_counted_and_named(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(records, "require_session", broken)
    with api.client("tml-test") as client:  # its connection ends with this
        answer = client.get("/sessions/any", headers={"x-request-id": "find-me"})
    assert (answer.status_code, answer.headers["x-trace-id"]) == (500, "find-me")
    assert "find-me" in answer.json()["detail"]
    labels = {"route": "/api/v1/sessions/{session_id}", "method": "GET", "status": "500"}
    assert value(api, "http_requests_total", **labels) == 1


def test_the_queue_is_shown_by_kind_and_tenant_with_its_age(api: Api) -> None:
    _, key = keys.new_key("anna")
    labels = {"model": "tiny", "state": "queued", "kind": "sample", "tenant": "local"}
    with api.engine.working:
        sample(api)
        assert value(api, "queue_jobs", **labels) == 1
        age = value(api, "queue_oldest_seconds", **labels)
        assert age is not None and 0 <= age < 60
    while value(api, "queue_jobs", **labels) is not None:
        time.sleep(0.05)
    assert key.owner not in api.http.get(f"{api.base_url}/metrics").text


def test_a_fresh_engines_numbers_are_shown_exactly(api: Api) -> None:
    numbers = Statistics(
        jobs={"sample": {"done": 7, "user": 2, "server": 1}},
        seconds={"sample": Distribution((0.1, 1.0), [3, 4, 3], 12.5)},
        batch_requests=Distribution((1.0, 2.0), [1, 0, 2], 9.0),
        tokens={"trained": 10, "sampled": 20},
        events={"restored": 3},
        held={"models": 2, "kv_tokens": 4096},
    )
    told(api, age=1.0, numbers=numbers)
    model = {"model": "tiny"}
    for outcome, count in (("done", 7), ("user", 2), ("server", 1)):
        assert value(api, "jobs_ended_total", kind="sample", outcome=outcome, **model) == count
    assert value(api, "engine_tokens_total", what="sampled", **model) == 20
    assert value(api, "engine_events_total", what="restored", **model) == 3
    assert value(api, "models_resident", **model) == 2
    assert value(api, "kv_cache_tokens", **model) == 4096
    buckets = [value(api, "job_seconds_bucket", kind="sample", le=le, **model) for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [3, 7, 10]
    assert value(api, "job_seconds_sum", kind="sample", **model) == 12.5
    assert value(api, "batch_requests_count", **model) == 3
    assert value(api, "engine_state", state="ready", **model) == 1
    assert 1 <= (value(api, "engine_beat_age_seconds", **model) or 0) < 60


@pytest.mark.parametrize(("age", "state", "shown"), [(60.0, "ready", "silent"), (1.0, "loading", "loading")])
def test_numbers_of_an_engine_that_is_silent_or_loads_are_not_shown_as_todays(
    api: Api, age: float, state: str, shown: str
) -> None:
    told(api, age, state, Statistics(jobs={"sample": {"done": 7}}, tokens={"sampled": 20}))
    samples = scrape(api)
    assert {name for name, _ in samples if name.startswith(("tinsmith_jobs_", "tinsmith_engine_tokens"))} == set()
    of_tiny = {s: frozenset({("model", "tiny"), ("state", s)}) for s in overview.STATES}
    states = {s: samples["tinsmith_engine_state", labels] for s, labels in of_tiny.items()}
    assert states == {s: float(s == shown) for s in overview.STATES}
    assert api.http.get(f"{api.base_url}/status").json()["engines"][0]["state"] == shown
    told(api, 1.0)


def test_numbers_of_another_version_are_passed_over(api: Api) -> None:
    record = records.EngineRecord("tiny", "canned", 1, "ready", "", asdict(CAPABILITIES), time.time(), {"jobs": 1})
    api.database.write(records.put_engine, record)
    assert value(api, "engine_state", model="tiny", state="ready") == 1
    assert not any(name.startswith("tinsmith_jobs_ended") for name, _ in scrape(api))
    told(api, 1.0)


def test_openmetrics_is_spoken_to_who_asks_for_it(api: Api) -> None:
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = api.http.get(f"{api.base_url}/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"tinsmith_http_requests", "tinsmith_engine_state", "tinsmith_database_up"} <= names


def test_when_the_database_does_not_answer_the_api_still_tells_what_it_knows(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(api.database, "read_async", away)
    samples = scrape(api)
    assert samples["tinsmith_database_up", frozenset()] == 0
    assert any(name == "tinsmith_http_requests_total" for name, _ in samples)
    assert not any(name == "tinsmith_engine_state" for name, _ in samples)


def test_status_tells_engines_queue_and_failures_with_their_traces(api: Api) -> None:
    told(api, 1.0, numbers=Statistics(held={"models": 2}))
    refused = Job("s:train:0", 5, "optim_step", "local", "tiny", b"", trace="abc")
    api.database.write(queue.reject, refused, "no such optimizer")
    found = api.http.get(f"{api.base_url}/status").json()
    assert [(engine["model"], engine["state"], engine["held"]) for engine in found["engines"]] == [
        ("tiny", "ready", {"models": 2})
    ]
    failure = found["failures"][0]
    assert (failure["request"], failure["tenant"], failure["category"]) == ("s:train:0:5", "local", "user")
    assert (failure["error"], failure["trace"]) == ("no such optimizer", "abc")


def test_only_operators_may_look(tmp_path: Path) -> None:
    secret, key = keys.new_key("operator", keys.ADMIN)
    user_secret, user = keys.new_key("user")
    with running_api(tmp_path, api_keys=("tml-given",)) as api:
        for each in (key, user):
            api.database.write(keys.create_key, each)
        time.sleep(2.1)  # what was read of the keys is taken for true that long
        for path in ("/metrics", "/status"):
            answers = {}
            for name, shown in (("admin", secret), ("user", user_secret), ("given", "tml-given"), ("none", None)):
                with api.client(shown) as client:
                    answers[name] = client.get(api.base_url + path).status_code
            assert answers == {"admin": 200, "user": 403, "given": 403, "none": 401}


def test_a_trace_goes_from_the_request_to_the_job_and_to_its_answer(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REQUESTS, "level", logging.INFO)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with caplog.at_level(logging.INFO, logger=REQUESTS.name):
        submitted = sample(api, {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
        assert submitted.headers["x-trace-id"] == trace
        result = api.result(submitted)
        assert result.headers["x-trace-id"] == trace
        assert api.engine.jobs[-1][0].trace == trace
        api.http.get("/sessions/nobodys", headers={"x-request-id": "mine"})
    lines = [(record.getMessage(), record.fields) for record in caplog.records if record.name == REQUESTS.name]  # type: ignore[attr-defined]
    request_id = submitted.json()["request_id"]
    about = [(message, fields["request"]) for message, fields in lines if fields["trace"] == trace]
    assert about == [("accepted", request_id), ("answered", request_id)]
    assert [(fields["path"], fields["status"]) for message, fields in lines if fields["trace"] == "mine"] == [
        ("/api/v1/sessions/nobodys", 404)
    ]


def test_every_kind_of_request_gives_its_job_its_own_trace(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    bodies = {
        "/optim_step": {"adam_params": {}},
        "/save_weights": {"path": "a"},
        "/save_weights_for_sampler": {"path": "a"},
        "/save_weights_external": {"path": "a"},
        "/load_weights": {"path": f"tinker://{model}/weights/a", "optimizer": True},
    }
    for seq, (path, body) in enumerate(bodies.items(), 1):
        api.result(api.post(path, model_id=model, seq_id=seq, **body))
    new = {"session_id": session, "model_seq_id": 7, "path": f"tinker://{model}/weights/a", "optimizer": False}
    api.result(api.post("/load_weights", **new))
    api.result(api.http.post("/forward_backward", content=message(model, 6)))
    api.result(sample(api))
    traces = {header.kind: header.trace for header, _ in api.engine.jobs}
    assert set(traces) >= {path.strip("/") for path in bodies} | {"create_model", "forward_backward", "sample"}
    everyone = [header.trace for header, _ in api.engine.jobs]
    assert None not in everyone and len(set(everyone)) == len(everyone)


def test_every_answer_names_a_trace_of_its_own(api: Api) -> None:
    answers = [api.http.get("/healthz"), api.http.get("/nothing"), api.http.post("/asample"), api.http.get("/sessions")]
    traces = [answer.headers["x-trace-id"] for answer in answers]
    assert len(set(traces)) == 4 and all(len(trace) == 32 for trace in traces)


def test_a_refused_training_request_keeps_its_trace_for_who_asks_later(api: Api) -> None:
    model = api.model(api.session())
    body = {"model_id": model, "seq_id": 1}  # no adam_params
    refused = api.http.post("/optim_step", json=body, headers={"x-request-id": "first-try"})
    assert refused.status_code == 400
    answer = api.post("/retrieve_future", request_id=f"{model}:1")
    assert json.loads(answer.content)["category"] == "user"
    assert answer.headers["x-trace-id"] == "first-try"
