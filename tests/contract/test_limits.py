"""A server at its limits: more models than places on the device, bodies too large, results that take long."""

import pytest
import tinker
from tinker import types

from tests.contract.datums import greedy, supervised, tokens
from tests.contract.raw import RawClient, decoded_logprobs
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("small server"), pytest.mark.timeout(300)]

DATUMS = [supervised(tokens(8))]
EXAM = [supervised(tokens(20, seed=5))]
PROMPT = types.ModelInput.from_ints(tokens(6, seed=1))
MODELS = 8  # with places for three


def test_more_models_than_places_take_turns_and_lose_nothing(anna: RawClient) -> None:
    session = anna.create_session()
    models = [anna.create_model(session, number) for number in range(MODELS)]
    submitted = []
    for turn in range(3):
        for model in models:
            anna.forward_backward(model, anna.take_seq(model), [supervised(tokens(8, seed=turn))])
        for model in models:
            anna.optim_step(model, anna.take_seq(model), learning_rate=1e-3, eps=1e-8)
    submitted = [anna.forward_backward(model, anna.take_seq(model), EXAM) for model in models]
    logprobs = [decoded_logprobs(anna.result(answer, protobuf=True)) for answer in submitted]
    untrained = anna.create_model(session, MODELS)
    start = decoded_logprobs(anna.result(anna.forward_backward(untrained, 1, EXAM), protobuf=True))
    assert len(set(logprobs)) == 1
    assert logprobs[0] != start


def test_more_samplers_than_places_keep_their_weights(small_server: LocalServer) -> None:
    with tinker.ServiceClient(base_url=small_server.base_url, api_key="tml-anna") as service:
        client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
        samplers = []
        for turn in range(MODELS):
            samplers.append(client.save_weights_and_get_sampling_client().result())
            client.forward_backward([supervised(tokens(20, seed=turn))], "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8))

        def draw() -> list[list[int]]:
            futures = [sampler.sample(PROMPT, 1, greedy(6)) for sampler in samplers]
            return [future.result().sequences[0].tokens for future in futures]

        first = draw()
        assert len({tuple(text) for text in first}) > MODELS // 2
        assert draw() == first


def test_a_body_over_the_limit_is_refused_and_the_next_goes_on(anna: RawClient) -> None:
    model = anna.create_model(anna.create_session())
    large = [supervised(tokens(4000, seed)) for seed in range(20)]
    answer = anna.forward_backward(model, 1, large)
    assert answer.status_code == 413
    assert str(2**20) in answer.json()["detail"]
    assert anna.result(anna.forward_backward(model, 2, DATUMS), protobuf=True).status_code == 200


def test_a_result_that_is_not_there_yet_is_to_be_asked_for_again(anna: RawClient) -> None:
    model = anna.create_model(anna.create_session())
    early = anna.forward_backward(model, 2, DATUMS)
    request_id = early.json()["request_id"]
    waiting = anna.post("/retrieve_future", {"request_id": request_id})
    assert waiting.status_code == 408
    assert waiting.json()["type"] == "try_again"
    assert waiting.json()["request_id"] == request_id
    anna.forward_backward(model, 1, DATUMS)
    for _ in range(2):
        assert anna.result(early, protobuf=True).status_code == 200


def test_a_finished_session_takes_nothing_new(anna: RawClient) -> None:
    session = anna.create_session()
    anna.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    for path, number in (("/create_model", "model_seq_id"), ("/create_sampling_session", "sampling_session_seq_id")):
        answer = anna.post(path, {"session_id": session, number: 0, "base_model": "tiny"})
        assert answer.status_code == 410
        assert session in answer.json()["detail"]
