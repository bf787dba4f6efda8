"""What clients rely on: retries are harmless, refusals hold nothing up, tenants are apart, errors explain."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.contract.api_fixtures import Api, running_api
from tinsmith.store import queue, quotas, records
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.jobs import Future
from tinsmith.wire.packing import SampleCall

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), max_body_bytes=200_000) as api:
        yield api


@pytest.fixture
def session(api: Api) -> str:
    return api.session()


@pytest.fixture
def model(api: Api, session: str) -> str:
    return api.model(session)


def message(model: str, seq: int, token: int = 1, count: int = 2) -> bytes:
    """A cross_entropy request."""
    request = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.full(count, token, np.int32).tobytes()
    targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
    targets.dense, targets.dtype = np.ones(count, np.int64).tobytes(), pb.DTYPE_INT64
    weights.dense, weights.dtype = np.ones(count, np.float32).tobytes(), pb.DTYPE_FLOAT32
    return request.SerializeToString()


def train(api: Api, body: bytes, **headers: str) -> httpx.Response:
    return api.http.post("/forward_backward", content=body, headers=headers)


def find(api: Api, request_id: str) -> Future | None:
    return api.database.read(queue.find, request_id)


def sample(api: Api, sampler: str, seq: int, **fields: Any) -> httpx.Response:
    body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": PROMPT, "sampling_params": {}}
    return api.post("/asample", **(body | fields))


def test_a_resent_request_is_the_same_request(api: Api, model: str) -> None:
    sent = [train(api, message(model, 1)) for _ in range(3)]
    sent += [api.post("/optim_step", model_id=model, seq_id=2, adam_params={}) for _ in range(2)]
    assert [answer.json()["request_id"] for answer in sent] == [f"{model}:1"] * 3 + [f"{model}:2"] * 2
    api.result(sent[-1])
    assert [seq for seq, _, _ in api.engine.bodies(model)] == [0, 1, 2]


def test_a_resent_request_keeps_its_id_even_when_it_would_now_be_refused(api: Api, model: str) -> None:
    train(api, message(model, 1))
    assert train(api, message(model, 1, token=9999)).json() == {"request_id": f"{model}:1", "model_id": model}
    saved = [api.post("/save_weights", model_id=model, seq_id=2, path="once") for _ in range(2)]
    assert api.result(saved[0]).json()["path"] == f"tinker://{model}/weights/once"
    assert api.post("/save_weights", model_id=model, seq_id=2, path="once").json() == saved[0].json()


def test_a_request_that_arrives_early_is_accepted_at_once(api: Api, model: str) -> None:
    assert train(api, message(model, 5)).status_code == 200


def test_a_refused_request_uses_up_its_seq(api: Api, model: str) -> None:
    refused = train(api, message(model, 1, token=9999))
    assert refused.status_code == 400
    assert "datum 0: model_input[0] is 9999" in refused.json()["detail"]
    future = find(api, f"{model}:1")
    assert future is not None
    assert (future.state, future.category, future.kind) == ("failed", "user", "forward_backward")
    assert "9999" in (future.error or "")
    assert train(api, message(model, 1, token=9999)).status_code == 400


@pytest.mark.parametrize("compressed", [False, True])
def test_a_body_over_the_limit_uses_up_its_seq(api: Api, model: str, compressed: bool) -> None:
    body = message(model, 1) + np.random.default_rng(0).bytes(390_000)
    headers = {"Content-Encoding": "zstd"} if compressed else {}
    refused = train(api, zstandard.compress(body) if compressed else body, **headers)
    assert refused.status_code == 413
    assert "200000" in refused.json()["detail"]
    future = find(api, f"{model}:1")
    assert future is not None
    assert future.state == "failed"


def test_a_body_that_decompresses_over_the_limit_uses_up_its_seq(api: Api, model: str) -> None:
    body = zstandard.compress(message(model, 1) + bytes(10_000_000))
    assert train(api, body, **{"Content-Encoding": "zstd"}).status_code == 413
    assert find(api, f"{model}:1") is not None


def test_a_damaged_body_uses_up_its_seq(api: Api, model: str) -> None:
    assert train(api, message(model, 1) + b"\xff").status_code == 400
    assert find(api, f"{model}:1") is not None


def test_a_compressed_body_is_read(api: Api, model: str) -> None:
    accepted = train(api, zstandard.compress(message(model, 1)), **{"Content-Encoding": "zstd"})
    assert api.result(accepted).status_code == 200
    assert train(api, message(model, 2), **{"Content-Encoding": "br"}).status_code == 400
    assert train(api, b"no zstd", **{"Content-Encoding": "zstd"}).status_code == 400


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("/optim_step", {"adam_params": {"beta1": 1.5}}, "beta1"),
        ("/optim_step", {"adam_params": {"momentum": 0.5}}, "momentum"),
        ("/optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}}, "'dimuon'"),
        ("/optim_step", {}, "adam_params"),
        ("/save_weights", {"path": "a/b"}, "'a/b'"),
        ("/save_weights", {"path": ".."}, "'..'"),
        ("/save_weights", {"path": "x" * 300}, "200 bytes"),
        ("/save_weights", {"path": "a\x00b"}, "printable"),
        ("/save_weights", {"path": "a", "ttl_seconds": 60}, "3600"),
        ("/save_weights_for_sampler", {}, "sampling_session_seq_id"),
        ("/save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 0}, "exclude each other"),
        ("/save_weights_for_sampler", {"path": "a", "kind": "moving"}, "moving"),
        (
            "/save_weights_external",
            {"path": "a", "age_encryption_recipients": ["age1"]},
            "age_encryption_recipients[0]",
        ),
        ("/save_weights_external", {"path": "a", "age_encryption_recipients": ["age1"] * 11}, "at most 10"),
        ("/load_weights", {"path": "somewhere", "optimizer": True}, "'somewhere'"),
        ("/load_weights", {"path": "tinker://x:train:0/weights/a", "optimizer": True}, "no checkpoint"),
        ("/load_weights", {"path": "tinker://x/external_weights/a", "optimizer": True}, "optimizer state"),
    ],
)
def test_a_refused_operation_says_why_and_uses_up_its_seq(
    api: Api, model: str, path: str, fields: dict[str, Any], said: str
) -> None:
    refused = api.post(path, model_id=model, seq_id=1, **fields)
    assert refused.status_code in (400, 404)
    assert said in refused.json()["detail"]
    future = find(api, f"{model}:1")
    assert future is not None
    assert (future.state, future.kind) == ("failed", path.strip("/"))


def test_seqs_count_from_one(api: Api, model: str) -> None:
    assert train(api, message(model, 0)).status_code == 400
    assert api.post("/optim_step", model_id=model, seq_id=0, adam_params={}).status_code == 400
    assert api.post("/optim_step", model_id=model, adam_params={}).status_code == 400
    assert api.result(api.post("/optim_step", model_id=model, seq_id=1, adam_params={})).status_code == 200


def test_a_checkpoint_without_a_name_is_called_after_its_seq(api: Api, model: str) -> None:
    saved = api.result(api.post("/save_weights", model_id=model, seq_id=1)).json()
    assert saved["path"] == f"tinker://{model}/weights/000001"


def test_a_name_is_taken_until_overwriting_is_asked_for(api: Api, model: str) -> None:
    api.result(api.post("/save_weights", model_id=model, seq_id=1, path="same"))
    again = api.post("/save_weights", model_id=model, seq_id=2, path="same")
    assert again.status_code == 400
    assert "overwrite=true" in again.json()["detail"]
    assert api.post("/save_weights", model_id=model, seq_id=3, path="same", overwrite=True).status_code == 200
    assert api.post("/save_weights_for_sampler", model_id=model, seq_id=4, path="same").status_code == 200


def test_the_engine_gets_what_a_save_says(api: Api, model: str) -> None:
    body = {"model_id": model, "seq_id": 1, "path": "full", "ttl_seconds": 7200, "user_metadata": {"a": "b"}}
    api.result(api.post("/save_weights", **body))
    assert json.loads(api.engine.bodies(model)[-1][2]) == {
        "name": "full",
        "path": f"tinker://{model}/weights/full",
        "ttl_seconds": 7200,
        "overwrite": False,
        "user_metadata": {"a": "b"},
    }


def test_an_unnamed_snapshot_takes_a_sampler_number_once(api: Api, session: str, model: str) -> None:
    first = api.post("/save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=4)
    assert api.result(first).json()["sampling_session_id"] == f"{session}:sample:4"
    again = api.post("/save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=4)
    assert again.json() == first.json()
    other = api.post("/save_weights_for_sampler", model_id=model, seq_id=2, sampling_session_seq_id=4)
    assert (other.status_code, "taken" in other.json()["detail"]) == (400, True)
    taken = api.post("/create_sampling_session", session_id=session, sampling_session_seq_id=4, base_model="tiny")
    assert taken.status_code == 400


def test_models_and_samplers_are_created_once(api: Api, session: str) -> None:
    assert api.model(session) == api.model(session) == f"{session}:train:0"
    assert api.sampler(session) == api.sampler(session) == f"{session}:sample:0"
    listed = api.http.get(f"/sessions/{session}").json()
    assert (listed["training_run_ids"], listed["sampler_ids"]) == ([f"{session}:train:0"], [f"{session}:sample:0"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_model": "Qwen/Other"}, "does not serve 'Qwen/Other'"),
        ({"lora_config": {"rank": 65}}, "65"),
        (
            {"lora_config": {"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False}},
            "trains nothing",
        ),
        ({"lora_config": {"rank": 0, "train_unembed": False}}, "rank 0 trains all parameters"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "'dimuon'"),
        ({"lora_config": {"rank": -1}}, "rank"),
        ({"colour": "red"}, "colour"),
        ({"model_seq_id": "0"}, "model_seq_id"),
    ],
)
def test_a_model_that_cannot_be_is_refused(api: Api, session: str, fields: dict[str, Any], said: str) -> None:
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 8}} | fields
    refused = api.post("/create_model", **body)
    assert refused.status_code == 400
    assert said in refused.json()["detail"]


def test_rank_zero_and_no_lora_config_mean_all_parameters(api: Api, session: str) -> None:
    for number, more in enumerate([{}, {"lora_config": {"rank": 0}}]):
        made = api.post("/create_model", session_id=session, model_seq_id=number, base_model="tiny", **more).json()
        info = api.post("/get_info", model_id=made["model_id"]).json()
        assert (info["is_lora"], info["lora_rank"]) == (False, None)


def test_a_finished_session_takes_nothing_new(api: Api, session: str) -> None:
    for _ in range(2):
        assert api.post(f"/sessions/{session}/finish", reason={"type": "success"}, detail=None).status_code == 200
    answers = [
        api.post("/create_model", session_id=session, model_seq_id=0, base_model="tiny"),
        api.post("/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="tiny"),
        api.post("/session_heartbeat", session_id=session),
    ]
    assert [answer.status_code for answer in answers] == [410] * 3


@pytest.mark.parametrize(("state", "status"), [("failed", 400), ("closed", 410)])
def test_a_model_that_is_no_more_takes_no_requests(api: Api, model: str, state: str, status: int) -> None:
    api.database.write(records.update_model, model, state=state)
    refused = [train(api, message(model, 1)), api.post("/optim_step", model_id=model, seq_id=2, adam_params={})]
    assert [answer.status_code for answer in refused] == [status] * 2


def test_a_models_last_use_is_noted(api: Api, model: str) -> None:
    api.database.write(records.update_model, model, used_at=1.0)
    train(api, message(model, 1))
    assert not api.http.get(f"/training_runs/{model}").json()["last_request_time"].startswith("1970")


def test_a_sample_without_a_seed_keeps_the_one_it_was_given(api: Api, session: str) -> None:
    sampler = api.sampler(session)
    first, second = sample(api, sampler, 0), sample(api, sampler, 0)
    assert first.json() == second.json()
    api.result(first)
    [(_, _, body)] = api.engine.bodies(sampler)
    assert SampleCall.from_bytes(body).seed >= 0


def test_sequences_are_named_when_they_are_asked_for(api: Api, session: str) -> None:
    sampler = api.sampler(session)
    submitted = sample(api, sampler, 10**9, num_samples=2).json()
    assert submitted["sample_sequence_ids"] == [f"{sampler}:{10**9}-0", f"{sampler}:{10**9}-1"]


def test_what_does_not_exist_is_not_found(api: Api) -> None:
    answers = [
        api.http.get("/nowhere"),
        api.post("/retrieve_future", request_id="nothing"),
        api.post("/retrieve_future", request_id="nothing:1"),
        api.post("/get_info", model_id="nothing"),
        api.post("/optim_step", model_id="nothing", seq_id=1, adam_params={}),
        train(api, message("nothing", 1)),
        sample(api, "nothing", 0),
        api.http.get("/samplers/nothing"),
        api.http.get("/training_runs/nothing"),
        api.http.get("/training_runs/nothing/checkpoints"),
        api.http.get("/sessions/nothing"),
        api.http.delete("/training_runs/nothing/checkpoints/weights/nothing"),
        api.http.delete("/training_runs/nothing/checkpoints/somewhere/nothing"),
        api.post("/weights_info", tinker_path="tinker://nothing/weights/nothing"),
    ]
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert all(answer.json()["detail"] for answer in answers)


def test_a_wrong_method_is_told_the_right_one(api: Api) -> None:
    answer = api.http.get("/optim_step")
    assert (answer.status_code, "POST" in answer.json()["detail"]) == (405, True)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1001", "offset=-1", "offset=99999999999999", "limit=٣"])
def test_pages_have_bounds(api: Api, query: str) -> None:
    assert api.http.get(f"/training_runs?{query}").status_code == 400


def test_pages_follow_each_other(api: Api, session: str) -> None:
    ids = [api.model(session, number) for number in range(3)]
    pages = [api.http.get(f"/training_runs?limit=1&offset={offset}").json() for offset in range(3)]
    assert [page["training_runs"][0]["training_run_id"] for page in pages] == ids[::-1]
    assert pages[0]["cursor"]["total_count"] >= 3


KEYS = ("tml-red", "tml-blue", "tml-black")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("keyed"), api_keys=KEYS) as api:
        api.http = api.client(KEYS[0])
        yield api


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-API-Key": "tml-green"}, {"X-API-Key": ""}, {"Authorization": "Basic tml-red"}, {"X-API-Key": "tml-réd"}],
)
def test_a_server_with_keys_wants_one_of_them(keyed: Api, headers: dict[str, str]) -> None:
    encoded = {name: value.encode() for name, value in headers.items()}
    with keyed.client(None) as stranger:
        assert stranger.get("/sessions", headers=encoded).status_code == 401
        assert stranger.get("/healthz").status_code == 200


def test_a_key_may_come_as_a_bearer_token(keyed: Api) -> None:
    with keyed.client(None) as client:
        answer = client.get("/sessions", headers={"Authorization": f"Bearer {KEYS[0]}"})
    assert answer.status_code == 200


def test_only_keys_have_a_days_worth_of_sessions_and_samplers(
    api: Api, keyed: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "SESSIONS_A_DAY", 1)
    monkeypatch.setattr(quotas, "SAMPLERS_A_DAY", 1)
    everybodys = [api.session() for _ in range(2)]
    assert all(api.sampler(session) for session in everybodys)
    with keyed.client(KEYS[2]) as black:  # with which no other test does anything
        asked = {"tags": [], "sdk_version": "0.38.0"}
        session = black.post("/create_session", json=asked).json()["session_id"]
        refused = [black.post("/create_session", json=asked)]
        sampler = {"session_id": session, "base_model": "tiny"}
        for number, status in ((0, 200), (0, 200), (1, 403)):
            answer = black.post("/create_sampling_session", json=sampler | {"sampling_session_seq_id": number})
            assert answer.status_code == status
        refused.append(answer)
    for answer, things in zip(refused, ("sessions", "samplers"), strict=True):
        assert answer.status_code == 403
        assert f"1 {things} within a day" in answer.json()["detail"]


def test_keys_are_not_stored(keyed: Api) -> None:
    keyed.session()
    files = [path for path in keyed.settings.data_dir.rglob("*") if path.is_file()]
    assert files
    assert not any(key.encode() in path.read_bytes() for path in files for key in KEYS)


def test_nobody_sees_or_touches_anothers_objects(keyed: Api) -> None:
    session = keyed.session()
    model, sampler = keyed.model(session), keyed.sampler(session)
    keyed.result(keyed.post("/save_weights", model_id=model, seq_id=1, path="mine"))
    checkpoint = f"/training_runs/{model}/checkpoints/weights/mine"
    path = f"tinker://{model}/weights/mine"
    with keyed.client(KEYS[1]) as other:
        own = other.post("/create_session", json={"tags": []}).json()["session_id"]
        load = {"path": path, "optimizer": False}
        answers = [
            other.post("/session_heartbeat", json={"session_id": session}),
            other.post(f"/sessions/{session}/finish", json={"reason": {"type": "errored"}}),
            other.get(f"/sessions/{session}"),
            other.post("/create_model", json={"session_id": session, "model_seq_id": 1, "base_model": "tiny"}),
            other.post("/get_info", json={"model_id": model}),
            other.post("/optim_step", json={"model_id": model, "seq_id": 2, "adam_params": {}}),
            other.post("/forward_backward", content=message(model, 2)),
            other.post("/forward_backward", content=message(model, 2, token=9999)),
            other.post("/save_weights", json={"model_id": model, "seq_id": 2, "path": "../x"}),
            other.post("/retrieve_future", json={"request_id": f"{model}:1"}),
            other.get(f"/samplers/{sampler}"),
            other.post(
                "/asample", json={"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {}}
            ),
            other.get(f"/training_runs/{model}"),
            other.get(f"/training_runs/{model}/checkpoints"),
            other.delete(checkpoint),
            other.post(f"{checkpoint}/publish"),
            other.put(f"{checkpoint}/ttl", json={"ttl_seconds": None}),
            other.post("/weights_info", json={"tinker_path": path}),
            other.post("/load_weights", json=load | {"session_id": own, "model_seq_id": 0}),
            other.post(
                "/create_sampling_session",
                json={"session_id": own, "sampling_session_seq_id": 0, "model_path": path},
            ),
        ]
        lists = [other.get("/sessions"), other.get("/training_runs"), other.get("/checkpoints")]
    wrong = [answer.request.url.path for answer in answers if answer.status_code not in (400, 404)]
    assert wrong == []
    assert not any(session in answer.text for answer in lists)
    assert find(keyed, f"{model}:2") is None


def test_a_published_checkpoint_can_be_used_by_all_and_changed_by_its_owner(keyed: Api) -> None:
    model = keyed.model(keyed.session())
    keyed.result(keyed.post("/save_weights", model_id=model, seq_id=1, path="shared"))
    checkpoint = f"/training_runs/{model}/checkpoints/weights/shared"
    assert keyed.post(f"{checkpoint}/publish").status_code == 200
    path = f"tinker://{model}/weights/shared"
    with keyed.client(KEYS[1]) as other:
        own = other.post("/create_session", json={"tags": []}).json()["session_id"]
        body = {"session_id": own, "model_seq_id": 0, "path": path, "optimizer": True}
        assert other.post("/load_weights", json=body).status_code == 200
        assert other.post("/weights_info", json={"tinker_path": path}).json()["lora_rank"] == 8
        assert other.delete(checkpoint).status_code == 404
        assert other.delete(f"{checkpoint}/publish").status_code == 404
