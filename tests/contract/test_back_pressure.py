"""Too much at once: new requests are told to come again, in time for nothing to be lost; and why accepted ones wait."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.contract.api_fixtures import Api, running_api
from tests.contract.test_api_rules import PROMPT, message
from tinsmith.store.backlog import Amount

MOST, MOST_EACH = 8, 6


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Small bounds, and two keys."""
    keys = ("tml-test", "tml-other")
    bounds: dict[str, Any] = {
        "max_outstanding": MOST,
        "max_outstanding_per_key": MOST_EACH,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinsmith.api.backlog._LOOK_SECONDS", 0.0)
        with running_api(tmp_path_factory.mktemp("api"), poll_seconds=0.2, api_keys=keys, **bounds) as api:
            yield api


def sample(api: Api, sampler: str, seq: int, client: httpx.Client | None = None) -> httpx.Response:
    body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": PROMPT, "sampling_params": {"max_tokens": 2}}
    return (client or api.http).post("/asample", json=body)


def train(api: Api, model: str, seq: int, count: int = 2) -> httpx.Response:
    return api.http.post("/forward_backward", content=message(model, seq, count=count))


def step(api: Api, model: str, seq: int) -> httpx.Response:
    return api.post("/optim_step", model_id=model, seq_id=seq, adam_params={})


def ended(api: Api, submitted: httpx.Response) -> int:
    return api.result(submitted).status_code


def ask(api: Api, submitted: httpx.Response) -> dict[str, Any]:
    answer = api.ask(submitted)
    assert answer.status_code == 408
    return dict(answer.json())


def test_a_key_with_too_much_under_way_is_told_to_come_again_and_gets_in_once_there_is_room(api: Api) -> None:
    sampler = api.sampler(api.session())
    with api.engine.working:
        taken = [sample(api, sampler, seq) for seq in range(MOST_EACH)]
        assert [answer.status_code for answer in taken] == [200] * MOST_EACH
        refused = sample(api, sampler, MOST_EACH)
        assert refused.status_code == 429
        assert f"{MOST_EACH} requests under way, of at most {MOST_EACH}" in refused.json()["detail"]
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert sample(api, sampler, 0).json() == taken[0].json(), "a retry of an accepted one is no new request"
    assert [ended(api, answer) for answer in taken] == [200] * MOST_EACH
    assert ended(api, sample(api, sampler, MOST_EACH)) == 200


def test_all_keys_together_are_bounded_and_one_alone_never_shuts_the_others_out(api: Api) -> None:
    sampler = api.sampler(api.session())
    with api.client("tml-other") as other:
        session = other.post("/create_session", json={"tags": [], "sdk_version": "0.38.0"}).json()["session_id"]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
        others = other.post("/create_sampling_session", json=body).json()["sampling_session_id"]
        with api.engine.working:
            mine = [sample(api, sampler, seq).status_code for seq in range(MOST_EACH + 1)]
            theirs = [sample(api, others, seq, other) for seq in range(MOST - MOST_EACH + 1)]
    assert mine == [200] * MOST_EACH + [429]
    assert [answer.status_code for answer in theirs] == [200] * (MOST - MOST_EACH) + [429]
    assert f"there are {MOST} requests" in theirs[-1].json()["detail"]


def test_what_accepted_requests_wait_for_is_let_in_however_full_it_is(api: Api) -> None:
    model = api.model(api.session())
    assert ended(api, step(api, model, 1)) == 200
    with api.engine.working:
        behind = [train(api, model, seq) for seq in range(3, 3 + MOST_EACH)]
        assert [answer.status_code for answer in behind] == [200] * MOST_EACH
        assert train(api, model, 3 + MOST_EACH).status_code == 429
        assert step(api, model, 3 + MOST_EACH).status_code == 429
        assert "has not arrived" in ask(api, behind[0])["queue_state_reason"]
        assert train(api, model, 2).status_code == 200
        assert "has not arrived" not in ask(api, behind[0])["queue_state_reason"]
    assert [ended(api, answer) for answer in behind] == [200] * MOST_EACH
    assert ended(api, step(api, model, 3 + MOST_EACH)) == 200, "what was refused has kept its place"


def test_who_sends_the_last_ones_first_gets_twice_as_much_in_and_no_more(api: Api) -> None:
    model, last = api.model(api.session()), 3 * MOST_EACH
    assert ended(api, step(api, model, 1)) == 200
    with api.engine.working:
        first = step(api, model, last)
        answers = [step(api, model, seq) for seq in reversed(range(2, last))]
        statuses = [answer.status_code for answer in answers]
        assert first.status_code == 200 and 429 in statuses
        taken = [first, *(answer for answer in answers if answer.status_code == 200)]
        assert MOST_EACH < len(taken) <= 2 * MOST_EACH
        assert step(api, model, last).json() == first.json(), "a retry of an accepted one is no new request"
    api.post(f"/sessions/{model.partition(':')[0]}/finish", reason={"type": "success"})


def test_bytes_are_bounded_too_but_anything_may_come_alone(api: Api) -> None:
    model = api.model(api.session())
    assert ended(api, step(api, model, 1)) == 200
    with pytest.MonkeyPatch.context() as patch, api.engine.working:
        patch.setattr(api.backlog, "_most_each", Amount(MOST_EACH, 2**11))
        answers = [train(api, model, seq, count=250) for seq in (2, 3)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert "bytes under way, of at most 2048" in answers[1].json()["detail"]


def test_why_a_request_waits_is_told(api: Api) -> None:
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    assert ended(api, step(api, model, 1)) == 200
    with api.engine.working:
        trained, asked = [step(api, model, 2), step(api, model, 3)], sample(api, sampler, 0)
        first, second = (ask(api, submitted) for submitted in trained)
        assert (first["queue_state"], first["queue_state_reason"]) == ("active", "it is being worked on")
        assert (
            second["queue_state"] == "active"
            and "1 requests of its own and 0 of others" in second["queue_state_reason"]
        )
        full = ask(api, asked)
    assert full["queue_state"] == "paused_capacity"
    assert full["queue_state_reason"] == "the sampler is full; 2 requests are before this one"


def test_a_used_up_rate_is_told_to_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_api(tmp_path, poll_seconds=0.2, api_keys=("tml-test",)) as api:
        model = api.model(api.session())
        caller = api.access._given.popitem()
        api.access._given[caller[0]] = caller[1].__class__(caller[1].owner, tokens_per_second=1.0)
        with api.engine.working:
            slow = train(api, model, 1, count=100)
            told = ask(api, slow)
            assert train(api, model, 2).status_code == 429
        assert told["queue_state"] == "paused_rate_limit"
        assert "1 tokens per second are used up for" in told["queue_state_reason"]


def test_the_sdk_waits_and_gets_everything(api: Api) -> None:
    with tinker.ServiceClient(base_url=api.base_url, api_key="tml-test") as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        prompt = types.ModelInput.from_ints([1, 2, 3])
        futures = [sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2)) for _ in range(3 * MOST)]
        assert all(future.result().sequences[0].tokens for future in futures)
