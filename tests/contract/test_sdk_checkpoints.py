"""The SDK saves and loads: both addressings, with and without the optimizer, names, lifetimes, lists, deletion."""

import datetime

import numpy as np
import pytest
import tinker
from tinker import types

from tests.contract.datums import score, supervised, tokens
from tests.contract.raw import RawClient
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

ADAM = types.AdamParams(learning_rate=2e-3, eps=1e-8)
DATUMS = [supervised(tokens(12, seed)) for seed in range(3)]


def create(service: tinker.ServiceClient, rank: int = 8) -> tinker.TrainingClient:
    metadata = {"renderer_name": "role_colon"}
    return service.create_lora_training_client("tiny", rank=rank, seed=3, user_metadata=metadata).result()


def train(client: tinker.TrainingClient, steps: int) -> None:
    for _ in range(steps):
        client.forward_backward(DATUMS, "cross_entropy")
        client.optim_step(ADAM)


@pytest.fixture(scope="module")
def rest(server: LocalServer) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.base_url)


@pytest.mark.parametrize("rank", [8, 0])
def test_a_new_client_goes_on_where_the_saved_one_was(service: tinker.ServiceClient, rank: int) -> None:
    client = create(service, rank)
    train(client, 3)
    path = client.save_state("three").result().path
    assert path == f"tinker://{client.model_id}/weights/three"
    saved = score(client, DATUMS)
    train(client, 2)
    expected = score(client, DATUMS)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    np.testing.assert_allclose(score(resumed, DATUMS), saved, atol=1e-6)
    train(resumed, 2)
    np.testing.assert_allclose(score(resumed, DATUMS), expected, atol=1e-4)


def test_without_the_optimizer_only_the_weights_come_back(service: tinker.ServiceClient) -> None:
    client = create(service)
    train(client, 3)
    path = client.save_state("weights-only").result().path
    saved = score(client, DATUMS)
    train(client, 2)
    fresh = service.create_training_client_from_state(path).result()
    np.testing.assert_allclose(score(fresh, DATUMS), saved, atol=1e-6)
    train(fresh, 2)
    assert np.abs(score(fresh, DATUMS) - score(client, DATUMS)).max() > 1e-4


@pytest.mark.parametrize("optimizer", [True, False])
def test_an_existing_client_loads_a_state(service: tinker.ServiceClient, optimizer: bool) -> None:
    client = create(service)
    train(client, 2)
    path = client.save_state("two").result().path
    saved = score(client, DATUMS)
    train(client, 2)
    expected = score(client, DATUMS)
    load = client.load_state_with_optimizer if optimizer else client.load_state
    with pytest.warns(FutureWarning, match="load_state"):
        load(path).result()
    np.testing.assert_allclose(score(client, DATUMS), saved, atol=1e-6)
    train(client, 2)
    same = np.allclose(score(client, DATUMS), expected, atol=1e-4)
    assert same == optimizer


def test_a_load_in_the_middle_of_a_pipeline_takes_its_turn(service: tinker.ServiceClient) -> None:
    client = create(service)
    start = score(client, DATUMS)
    path = client.save_state("start").result().path
    train(client, 2)
    with pytest.warns(FutureWarning, match="load_state"):
        client.load_state(path)
    after = client.forward(DATUMS, "cross_entropy").result()
    assert after.metrics["loss:sum"] == pytest.approx(-float(start.sum()), rel=1e-5)


def test_a_name_is_not_overwritten_unless_asked(service: tinker.ServiceClient) -> None:
    client = create(service)
    path = client.save_state("same", user_metadata={"a": "1"}).result().path
    train(client, 1)
    with pytest.raises(tinker.TinkerError, match="same"):
        client.save_state("same").result()
    np.testing.assert_array_equal(
        score(service.create_training_client_from_state(path).result(), DATUMS), score(create(service), DATUMS)
    )
    assert client.save_state("same", overwrite=True).result().path == path
    np.testing.assert_allclose(
        score(service.create_training_client_from_state(path).result(), DATUMS), score(client, DATUMS), atol=1e-6
    )


def test_state_and_sampler_may_share_a_name(service: tinker.ServiceClient) -> None:
    client = create(service)
    state, sampler = client.save_state("final"), client.save_weights_for_sampler("final")
    assert state.result().path == f"tinker://{client.model_id}/weights/final"
    assert sampler.result().path == f"tinker://{client.model_id}/sampler_weights/final"


def test_runs_and_checkpoints_are_listed_described_and_deleted(
    service: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    client = create(service, rank=16)
    state = client.save_state("one", user_metadata={"step": "1"}).result().path
    sampler = client.save_weights_for_sampler("one", ttl_seconds=7200).result().path
    run = rest.get_training_run_by_tinker_path(state).result()
    assert (run.training_run_id, run.is_lora, run.lora_rank, run.corrupted) == (client.model_id, True, 16, False)
    assert run.user_metadata == {"renderer_name": "role_colon"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == state
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == sampler
    assert client.model_id in {run.training_run_id for run in rest.list_training_runs(limit=500).result().training_runs}
    listed = {each.tinker_path: each for each in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert set(listed) == {state, sampler}
    assert (listed[state].checkpoint_id, listed[state].checkpoint_type) == ("weights/one", "training")
    assert (listed[sampler].checkpoint_id, listed[sampler].checkpoint_type) == ("sampler_weights/one", "sampler")
    assert (listed[state].size_bytes or 0) > (listed[sampler].size_bytes or 0) > 0
    assert listed[state].expires_at is None
    assert {state, sampler} <= {each.tinker_path for each in rest.list_user_checkpoints(limit=500).result().checkpoints}
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    assert [each.tinker_path for each in rest.list_checkpoints(client.model_id).result().checkpoints] == [state]
    with pytest.raises(tinker.TinkerError, match="one"):
        service.create_sampling_client(model_path=sampler).result()


def test_weights_tell_what_they_are(service: tinker.ServiceClient, rest: tinker.RestClient) -> None:
    client = service.create_lora_training_client("tiny", rank=4, train_mlp=False).result()
    info = rest.get_weights_info_by_tinker_path(client.save_state("described").result().path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == ("tiny", True, 4)
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, True)
    full = create(service, rank=0)
    assert not rest.get_weights_info_by_tinker_path(full.save_state("full").result().path).result().is_lora


def test_a_lifetime_is_set_changed_and_lifted(service: tinker.ServiceClient, rest: tinker.RestClient) -> None:
    client = create(service)
    path = client.save_state("mortal", ttl_seconds=3600).result().path

    def remaining() -> float | None:
        (checkpoint,) = rest.list_checkpoints(client.model_id).result().checkpoints
        if checkpoint.expires_at is None:
            return None
        return (checkpoint.expires_at - datetime.datetime.now(datetime.UTC)).total_seconds()

    assert 3000 < (remaining() or 0) <= 3600
    rest.set_checkpoint_ttl_from_tinker_path(path, 86400).result()
    assert 80000 < (remaining() or 0) <= 86400
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert remaining() is None


def test_a_checkpoint_is_published_and_unpublished(service: tinker.ServiceClient, rest: tinker.RestClient) -> None:
    client = create(service)
    path = client.save_weights_for_sampler("shared").result().path
    for publish, public in (
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.unpublish_checkpoint_from_tinker_path, False),
    ):
        publish(path).result()
        (checkpoint,) = rest.list_checkpoints(client.model_id).result().checkpoints
        assert checkpoint.public is public


def test_a_session_lists_its_runs_and_samplers_and_ends(raw: RawClient) -> None:
    session = raw.create_session()
    model = raw.create_model(session)
    body = {"session_id": session, "sampling_session_seq_id": 5, "base_model": "tiny"}
    sampler = raw.post("/create_sampling_session", body).json()["sampling_session_id"]
    described = raw.request("GET", f"/sessions/{session}").json()
    assert described["training_run_ids"] == [model]
    assert described["sampler_ids"] == [sampler]
    assert session in raw.request("GET", "/sessions", params={"limit": 500}).json()["sessions"]
    assert raw.post("/session_heartbeat", {"session_id": session}).json()["type"] == "session_heartbeat"
    ended = raw.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    assert ended.is_success
    assert raw.post("/session_heartbeat", {"session_id": session}).status_code == 410


def test_checkpoints_outlive_the_session_that_made_them(server: LocalServer, service: tinker.ServiceClient) -> None:
    with tinker.ServiceClient(base_url=server.base_url) as early:
        client = create(early)
        train(client, 2)
        path = client.save_state("legacy").result().path
        expected = score(client, DATUMS)
    heir = service.create_training_client_from_state_with_optimizer(path).result()
    np.testing.assert_allclose(score(heir, DATUMS), expected, atol=1e-6)
