"""Waiting for results: held, woken, repeated, expired; and what the API does while its engine is away."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from tests.contract.api_fixtures import CAPABILITIES, FOREVER, Api, running_api
from tests.store import makers
from tinsmith.api.waiting import Waiters
from tinsmith.store import queue
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.wire.jobs import Outcome


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Api]:
    """An API that soon sends those away whose results are not there."""
    with running_api(tmp_path, poll_seconds=0.2) as api:
        yield api


@pytest.fixture
def model(api: Api) -> str:
    return api.model(api.session())


def step(api: Api, model: str, seq: int) -> str:
    answer = api.post("/optim_step", model_id=model, seq_id=seq, adam_params={})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def retrieve(api: Api, request_id: str) -> httpx.Response:
    return api.post("/retrieve_future", request_id=request_id, allow_metadata_only=True)


def end(api: Api, request_id: str, *, body: bytes | None = None, error: str | None = None) -> None:
    """Ends a queued job as an engine would, but rings nobody."""
    [header] = [job for job in api.database.write(queue.claim, "tiny", "test", 100) if job.request_id == request_id]
    api.database.write(queue.complete, [Outcome(header.number, body, error, "server" if error else None)])


def test_a_request_is_held_until_its_result_is_there(api: Api, model: str) -> None:
    with ThreadPoolExecutor(1) as waiting:
        with api.engine.working:
            answer = waiting.submit(retrieve, api, step(api, model, 1))
            assert not answer.done()
        assert answer.result().json() == {"type": "optim_step", "metrics": {"grad_norm": 1.0}}


def test_the_doorbell_wakes_those_who_wait_for_what_it_names(database_url: str) -> None:
    doorbell, database = Doorbell(database_url), Database(database_url)
    database.migrate()

    async def wait() -> tuple[bool, bool]:
        waiters = Waiters(doorbell, database)
        waiters.start()
        try:
            with waiters.watch("m:1") as first, waiters.watch("m:1") as second, waiters.watch("m:2") as other:
                while not first.is_set():  # the bell may not hang yet
                    doorbell.ring("done", ["m:0", "m:1"])
                    await asyncio.sleep(0.01)
                return second.is_set(), other.is_set()
        finally:
            waiters.close()

    assert asyncio.run(wait()) == (True, False)
    doorbell.close()
    database.close()


def test_the_doorbell_wakes_also_after_a_look_at_the_database_that_failed(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    doorbell, database, looked = Doorbell(database_url), Database(database_url), threading.Event()

    def fail(*_: object) -> None:
        looked.set()
        raise OperationalError("SELECT 1", {}, Exception("canceling statement due to user request"))

    monkeypatch.setattr(database, "read", fail)

    async def wait() -> None:
        waiters = Waiters(doorbell, database)
        with waiters.watch("m:1") as event:
            waiters.start()
            while not looked.is_set():
                await asyncio.sleep(0.01)
            for _ in range(3000):
                doorbell.ring("done", ["m:1"])
                await asyncio.sleep(0.01)
                if event.is_set():
                    break
            waiters.close()
            assert event.is_set()

    asyncio.run(wait())
    doorbell.close()
    database.close()


def test_many_requests_are_held_at_once(api: Api, model: str) -> None:
    with ThreadPoolExecutor(16) as waiting:
        with api.engine.working:
            answers = [waiting.submit(retrieve, api, step(api, model, 1 + index // 2)) for index in range(16)]
        assert [answer.result().status_code for answer in answers] == [200] * 16


def test_a_request_without_a_result_is_sent_away_to_ask_again(hasty: Api) -> None:
    model = hasty.model(hasty.session())
    with hasty.engine.working:
        request_id = step(hasty, model, 1)
        answer = retrieve(hasty, request_id)
        assert answer.status_code == 408
        assert answer.json()["type"] == "try_again"
        assert (answer.json()["request_id"], answer.json()["queue_state"]) == (request_id, "active")


def test_a_result_that_nobody_rang_for_is_found_all_the_same(api: Api, model: str) -> None:
    with api.engine.working, ThreadPoolExecutor(1) as waiting:
        request_id = step(api, model, 1)
        answer = waiting.submit(retrieve, api, request_id)
        end(api, request_id, body=b'{"metrics":{}}')
        assert answer.result().json() == {"metrics": {}}


def test_a_result_can_be_read_again(api: Api, model: str) -> None:
    request_id = step(api, model, 1)
    assert retrieve(api, request_id).content == retrieve(api, request_id).content


def test_a_failed_job_answers_with_its_error_and_whose_fault_it_was(api: Api, model: str) -> None:
    with api.engine.working:
        request_id = step(api, model, 1)
        end(api, request_id, error="out of memory")
        answer = retrieve(api, request_id)
    assert (answer.status_code, answer.json()) == (200, {"error": "out of memory", "category": "server"})


def test_an_expired_result_is_gone(api: Api, model: str) -> None:
    request_id = step(api, model, 1)
    retrieve(api, request_id)
    api.database.write(makers.prune, 2e10)
    assert retrieve(api, request_id).status_code == 410


def test_waiting_ends_when_the_client_goes_away(api: Api, model: str) -> None:
    with api.engine.working:
        request_id = step(api, model, 1)
        timeout = httpx.Timeout(FOREVER, read=0.1)
        with api.client("tml-other") as impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post("/retrieve_future", json={"request_id": request_id}, timeout=timeout)
    assert retrieve(api, request_id).status_code == 200


def test_a_server_that_ends_sends_those_who_wait_away_to_ask_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}]}
    capable = replace(CAPABILITIES, vocab_size=1280)
    with running_api(tmp_path, capable) as api, ThreadPoolExecutor(4) as waiting, api.engine.working:
        session = api.session()
        sampler = api.sampler(session)
        future = waiting.submit(retrieve, api, step(api, api.model(session), 1))
        target = {"sampling_session_id": sampler, "cloned_sampler_id": 0}
        futures = waiting.submit(api.post, "/retrieve_futures", target=target, prev_cursor=0)
        answer = waiting.submit(api.post, f"{api.base_url}/v1/chat/completions", **chat)
        stream = waiting.submit(api.post, f"{api.base_url}/v1/chat/completions", **chat, stream=True)
        while api.waiters.held < 3 or not api.chat.streams.held:
            time.sleep(0.01)
        api.server.should_exit = True
        assert (future.result().status_code, future.result().json()["type"]) == (408, "try_again")
        assert futures.result().json()["completions"] == []
        assert answer.result().status_code == 503
        assert "the server is stopping" in stream.result().text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def announce(api: Api, state: str) -> None:
    """Has the engine say so, and waits until the API has heard it."""
    api.engine.announce(state, None)
    heard = threading.Event()
    while (api.http.get("/healthz").status_code == 200) != (state == "ready"):
        heard.wait(0.02)


def test_requests_are_taken_while_the_engine_is_being_restarted(hasty: Api) -> None:
    model = hasty.model(hasty.session())
    with hasty.engine.working:
        announce(hasty, "loading")
        health = hasty.http.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        answer = retrieve(hasty, step(hasty, model, 1))
        assert (answer.status_code, answer.json()["queue_state"]) == (408, "paused_capacity")
        assert "loading" in answer.json()["queue_state_reason"]
        announce(hasty, "ready")
    while (answer := retrieve(hasty, f"{model}:1")).status_code == 408:
        pass
    assert answer.status_code == 200


def test_before_the_first_engine_is_ready_clients_are_told_to_come_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_api(tmp_path_factory.mktemp("young"), capabilities=None) as api:
        session = api.session()
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        answers = [api.post("/create_model", **body), api.http.get("/get_server_capabilities")]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert [answer.headers["x-should-retry"] for answer in answers] == ["true", "true"]
        assert "not ready" in answers[0].json()["detail"]
