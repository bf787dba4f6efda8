"""What nobody waits for any more is not sampled: cancelled by the SDK, or left behind by a finished session."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import tinker
from tinker import types

from tests.contract.api_fixtures import Api, running_api
from tests.contract.datums import greedy, tokens
from tests.contract.raw import RawClient
from tinsmith.demo.local_server import LocalServer
from tinsmith.store import queue
from tinsmith.store.database import Database

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

PROMPT = types.ModelInput.from_ints(tokens(6, seed=1))
LONG = types.SamplingParams(max_tokens=4000, stop=[], seed=1)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something becomes true within a while."""
    for _ in range(600):
        if holds():
            return True
        time.sleep(0.05)
    return False


def ask(api: Api, sampler: str, seq: int) -> Any:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]}
    body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "sampling_params": {"max_tokens": 5}}
    return api.post("/asample", **body)


@pytest.fixture
def api(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running_api(tmp_path_factory.mktemp("api"), api_keys=("tml-test", "tml-stranger")) as api:
        yield api


def test_a_cancelled_sample_is_gone_and_a_finished_one_keeps_its_result(api: Api) -> None:
    sampler = api.sampler(api.session())
    done = ask(api, sampler, 0)
    assert api.result(done).status_code == 200
    with api.engine.working:
        waiting = ask(api, sampler, 1)
        assert api.post("/cancel_future", request_id=waiting.json()["request_id"]).status_code == 200
    answer = api.result(waiting)
    assert answer.status_code == 410
    assert "gave it up" in answer.json()["detail"]
    assert api.post("/cancel_future", request_id=done.json()["request_id"]).status_code == 200
    assert api.result(done).status_code == 200
    assert [seq for seq, _, _ in api.engine.bodies(sampler)] == [0]


def test_only_ones_own_samples_can_be_cancelled(api: Api) -> None:
    sampler = api.sampler(api.session())
    with api.engine.working:
        request_id = ask(api, sampler, 0).json()["request_id"]
        stranger = api.client("tml-stranger")
        assert stranger.post("/cancel_future", json={"request_id": request_id}).status_code == 404
        assert api.post("/cancel_future", request_id="nothing:1").status_code == 404
    model = api.model(api.session())
    refused = api.post("/cancel_future", request_id=f"{model}:0")
    assert refused.status_code == 400
    assert "create_model; only samples" in refused.json()["detail"]


def test_a_finished_session_gives_up_its_samples_and_nobody_elses(api: Api) -> None:
    session, other = api.session(), api.session()
    samplers = [api.sampler(session, 0), api.sampler(session, 1), api.sampler(other)]
    with api.engine.working:
        asked = [ask(api, sampler, 0) for sampler in samplers]
        assert api.post(f"/sessions/{session}/finish", reason={"type": "success"}).status_code == 200
    assert [api.result(answer).status_code for answer in asked] == [410, 410, 200]


def test_the_sdk_cancels_what_is_abandoned_and_the_engine_stops_sampling_it(
    server: LocalServer, raw: RawClient
) -> None:
    async def wait_a_little(sampler: tinker.SamplingClient, request_id: str) -> None:
        waiting = asyncio.ensure_future(sampler.sample(PROMPT, 4, LONG))
        while database.read(queue.find, request_id) is None:
            await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    database = Database(f"sqlite:///{server.data_dir}/tinsmith.db")
    with tinker.ServiceClient(base_url=server.base_url) as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        request_id = f"{sampler._sampling_session_id}:0"
        asyncio.run(wait_a_little(sampler, request_id))
        assert eventually(lambda: raw.post("/retrieve_future", {"request_id": request_id}).status_code == 410)
        assert len(sampler.sample(PROMPT, 1, greedy(4)).result().sequences[0].tokens) == 4
    database.close()
