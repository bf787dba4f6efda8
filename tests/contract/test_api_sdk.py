"""The real SDK against the API alone: every call of its clients is understood, and answered as the SDK reads it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.contract.api_fixtures import CONTEXT, Api, running_api
from tinsmith.wire.packing import SampleCall, TrainCall

# The SDK leaves connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), aliases={"*": "tiny"}) as api:
        yield api


@pytest.fixture(scope="module")
def service(api: Api) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=api.base_url, user_metadata={"team": "red"}) as client:
        yield client


@pytest.fixture
def rest(api: Api) -> tinker.RestClient:
    return tinker.RestClient(base_url=api.base_url)


@pytest.fixture
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=8).result()


def datum(length: int, **inputs: Any) -> types.Datum:
    tokens = np.arange(1, length + 1)
    given = inputs or {"weights": np.ones(length, np.float32)}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens.tolist()), loss_fn_inputs={"target_tokens": tokens, **given}
    )


def last_call(api: Api, model_id: str) -> TrainCall:
    return TrainCall.from_bytes(api.engine.bodies(model_id)[-1][2])


def test_capabilities_name_the_served_model(rest: tinker.RestClient) -> None:
    [model] = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length) == ("tiny", CONTEXT)


def test_a_model_is_created_with_what_was_asked(api: Api, service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("Qwen/Qwen3-8B-Base", rank=4, seed=5, train_mlp=False).result()
    info = client.get_info()
    assert (info.model_name, info.is_lora, info.lora_rank) == ("Qwen/Qwen3-8B-Base", True, 4)
    [(seq, kind, body)] = api.engine.bodies(client.model_id)
    assert (seq, kind, body) == (0, "create_model", b"{}")


def test_the_tokenizer_of_the_served_model_is_found(training: tinker.TrainingClient) -> None:
    assert len(training.get_tokenizer().encode("hello")) > 0


def test_forward_backward_carries_every_datum_and_returns_each_ones_logprobs(
    api: Api, training: tinker.TrainingClient
) -> None:
    output = training.forward_backward([datum(3), datum(2)], "cross_entropy").result()
    call = last_call(api, training.model_id)
    assert (call.tokens_T.tolist(), call.forward_only) == ([1, 2, 3, 1, 2], False)
    assert [entry["logprobs"].data for entry in output.loss_fn_outputs] == [[0, -1, -2], [-3, -4]]
    assert output.metrics == {"loss:sum": 5.0}


def test_forward_says_so(api: Api, training: tinker.TrainingClient) -> None:
    training.forward([datum(3)], "cross_entropy").result()
    assert api.engine.bodies(training.model_id)[-1][1] == "forward"
    assert last_call(api, training.model_id).forward_only


def test_sparse_targets_of_several_widths_keep_their_order(api: Api, training: tinker.TrainingClient) -> None:
    targets = torch.zeros(6, 5, dtype=torch.int64)
    targets[2, 3], targets[4, 1] = 9, 8
    weights = targets.float() / 10
    wide = datum(
        6,
        target_tokens=types.TensorData.from_torch_sparse(targets),
        weights=types.TensorData.from_torch_sparse(weights),
    )
    output = training.forward_backward([datum(2), wide, datum(2)], "cross_entropy").result()
    call = last_call(api, training.model_id)
    assert call.widths_N.tolist() == [0, 5, 0]
    assert call.targets_M[2:32].reshape(6, 5).tolist() == targets.tolist()
    assert np.allclose(call.inputs["weights"][2:32].reshape(6, 5), weights)
    assert [entry["logprobs"].to_numpy().shape for entry in output.loss_fn_outputs] == [(2,), (6, 5), (2,)]


def test_policy_losses_carry_their_configuration(api: Api, training: tinker.TrainingClient) -> None:
    inputs = {"logprobs": np.full(3, -1, np.float32), "advantages": np.ones(3, np.float32)}
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    training.forward_backward([datum(3, **inputs)], "ppo", config).result()
    call = last_call(api, training.model_id)
    assert (call.loss, call.config) == ("ppo", config)
    assert call.inputs["logprobs"].tolist() == [-1, -1, -1]


def test_a_large_call_arrives_in_chunks_and_is_put_together(api: Api, training: tinker.TrainingClient) -> None:
    data = [datum(1 + index % 3) for index in range(1500)]
    output = training.forward_backward(data, "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 1500
    assert output.metrics["loss:sum"] == sum(1 + index % 3 for index in range(1500))
    assert sorted(seq for seq, kind, _ in api.engine.bodies(training.model_id) if kind != "create_model") == [1, 2]


def test_a_loss_of_the_clients_own_runs_in_two_passes(api: Api, training: tinker.TrainingClient) -> None:
    def loss(_data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return (logprobs[0] ** 2).sum(), {"mine": 1.0}

    training.forward_backward_custom([datum(3)], loss).result()
    kinds = [kind for _, kind, _ in api.engine.bodies(training.model_id)]
    assert kinds == ["create_model", "forward", "forward_backward"]
    assert last_call(api, training.model_id).inputs["weights"].tolist() == [0, 2, 4]


def test_steps_and_saves_answer_what_the_sdk_expects(training: tinker.TrainingClient) -> None:
    stepped = training.optim_step(types.AdamParams(learning_rate=1e-3))
    saved, sampler = training.save_state("one"), training.save_weights_for_sampler("one")
    assert stepped.result().metrics == {"grad_norm": 1.0}
    assert saved.result().path == f"tinker://{training.model_id}/weights/one"
    assert sampler.result().path == f"tinker://{training.model_id}/sampler_weights/one"


def test_a_saved_state_becomes_a_new_model(
    api: Api, service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    path = training.save_state("branch").result().path
    client = service.create_training_client_from_state_with_optimizer(path).result()
    [(seq, kind, body)] = api.engine.bodies(client.model_id)
    assert (seq, kind) == (0, "load_weights")
    assert b'"create":true' in body
    assert b'"optimizer":true' in body
    assert client.get_info().lora_rank == 8


def test_unnamed_snapshots_have_samplers_of_their_own(api: Api, training: tinker.TrainingClient) -> None:
    samplers = [training.save_weights_and_get_sampling_client().result() for _ in range(2)]
    answers = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result() for sampler in samplers]
    assert len({answer.sequences[0].sequence_id for answer in answers}) == 2


def test_a_named_snapshot_can_be_sampled_from(service: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    path = training.save_weights_for_sampler("named").result().path
    sampler = service.create_sampling_client(model_path=path).result()
    assert sampler.get_base_model() == "tiny"
    answer = sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=4)).result()
    assert [sequence.tokens for sequence in answer.sequences] == [[7], [7, 7]]


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model="tiny").result()


def test_samples_come_in_order_with_their_reasons(api: Api, sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=4, seed=3, temperature=0.5, top_k=9, top_p=0.9, stop=["\n"])
    answer = sampler.sample(PROMPT, 3, params).result()
    call = SampleCall.from_bytes(api.engine.jobs[-1][1])
    assert (call.prompt_P.tolist(), call.seed, call.temperature, call.top_k) == ([1, 2, 3, 4], 3, 0.5, 9)
    assert (call.top_p, call.stop_strings, call.num_samples) == (0.9, ("\n",), 3)
    assert [sequence.stop_reason for sequence in answer.sequences] == ["length", "stop", "length"]
    assert [sequence.logprobs for sequence in answer.sequences] == [[-1], [-1, -1], [-1, -1, -1]]


def test_everything_about_the_prompt_can_be_asked_at_once(sampler: tinker.SamplingClient) -> None:
    target = types.TensorData.from_torch_sparse(torch.tensor([[-1, -1, -1], [-1, 5, -1], [6, -1, -1]]), pad_value=-1)
    answer = sampler.sample(
        PROMPT,
        1,
        types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs=target,
        prompt_alt_tokens_k=2,
    ).result()
    assert answer.prompt_logprobs == [None, -1, -1, -1]
    assert answer.topk_prompt_logprobs is not None
    assert answer.topk_prompt_logprobs[:2] == [None, [(1, -1.0), (2, -2.0)]]
    assert answer.target_prompt_logprobs is not None
    assert answer.target_prompt_logprobs.to_numpy().tolist() == [[0, 0, 0], [0, -5, 0], [-6, 0, 0]]
    assert answer.prompt_alt_tokens is not None
    assert answer.prompt_alt_tokens.tokens.to_numpy().tolist() == [[3, 3]] * 3
    assert answer.prompt_cache_hit_tokens == 5


def test_logprobs_of_a_text_need_no_sample_of_their_own(sampler: tinker.SamplingClient) -> None:
    assert sampler.compute_logprobs(PROMPT).result() == [None, -1, -1, -1]


def test_a_checkpoint_is_listed_published_given_a_lifetime_and_deleted(
    rest: tinker.RestClient, training: tinker.TrainingClient
) -> None:
    path = training.save_state("listed").result().path
    [listed] = rest.list_checkpoints(training.model_id).result().checkpoints
    assert (listed.checkpoint_id, listed.checkpoint_type, listed.public) == ("weights/listed", "training", False)
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    changed = rest.get_training_run(training.model_id).result().last_checkpoint
    assert changed is not None
    assert changed.public
    assert changed.expires_at is not None
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    again = next(each for each in rest.list_user_checkpoints().result().checkpoints if each.tinker_path == path)
    assert (again.public, again.expires_at) == (False, None)
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(training.model_id).result().checkpoints == []


def test_weights_tell_what_they_are(rest: tinker.RestClient, training: tinker.TrainingClient) -> None:
    path = training.save_state("told").result().path
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.is_lora, info.lora_rank, info.train_mlp) == ("tiny", True, 8, True)


def test_runs_and_sessions_are_listed_with_their_metadata(
    api: Api, rest: tinker.RestClient, service: tinker.ServiceClient
) -> None:
    labels: Any = {"renderer_name": "role_colon", "steps": 3}
    client = service.create_lora_training_client("tiny", rank=8, user_metadata=labels).result()
    run = rest.get_training_run(client.model_id).result()
    assert run.user_metadata == {"renderer_name": "role_colon", "steps": "3"}
    assert client.model_id in [
        each.training_run_id for each in rest.list_training_runs(limit=50).result().training_runs
    ]
    session_id = client.model_id.split(":")[0]
    session = rest.get_session(session_id).result()
    assert client.model_id in session.training_run_ids
    assert session.user_metadata == {"team": "red"}
    assert session_id in rest.list_sessions().result().sessions


def test_a_refused_request_does_not_hold_up_the_next(training: tinker.TrainingClient) -> None:
    wrong = datum(2, weights=np.array([1, np.nan], np.float32))
    with pytest.raises(tinker.BadRequestError, match=r"datum 0: weights\[1\] is nan"):
        training.forward_backward([wrong], "cross_entropy").result()
    assert training.forward_backward([datum(2)], "cross_entropy").result().metrics == {"loss:sum": 2.0}


def test_closing_finishes_the_session(api: Api) -> None:
    client = tinker.ServiceClient(base_url=api.base_url)
    training = client.create_lora_training_client("tiny", rank=8).result()
    session_id = training.model_id.split(":")[0]
    client.close("success", detail="done").result()
    assert api.post("/session_heartbeat", session_id=session_id).status_code == 410
