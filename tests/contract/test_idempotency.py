"""The same request sent twice is one request: clients resend whenever an answer was lost."""

import pytest

from tests.contract.datums import supervised, tokens
from tests.contract.raw import RawClient, decoded_logprobs

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

DATUMS = [supervised(tokens(10))]


def test_a_resent_training_request_keeps_its_id_and_is_applied_once(raw: RawClient) -> None:
    session = raw.create_session()
    once, twice = raw.create_model(session, 0), raw.create_model(session, 1)
    final = []
    for model, sends in ((once, 1), (twice, 3)):
        for seq in (1, 3):
            submitted = [raw.forward_backward(model, seq, DATUMS) for _ in range(sends)]
            stepped = [raw.optim_step(model, seq + 1, learning_rate=1e-3, eps=1e-8) for _ in range(sends)]
            for answers in (submitted, stepped):
                assert len({answer.json()["request_id"] for answer in answers}) == 1
            answers = [raw.result(answer, protobuf=True).content for answer in submitted]
            assert len(set(answers)) == 1
        final.append(decoded_logprobs(raw.result(raw.forward_backward(model, 5, DATUMS), protobuf=True)))
    assert final[0] == final[1]


def test_a_request_resent_after_it_was_done_gives_the_same_answer(raw: RawClient) -> None:
    model = raw.create_model(raw.create_session())
    first = raw.forward_backward(model, 1, DATUMS)
    answer = raw.result(first, protobuf=True).content
    again = raw.forward_backward(model, 1, DATUMS)
    assert again.json()["request_id"] == first.json()["request_id"]
    assert raw.result(again, protobuf=True).content == answer


def test_a_model_is_created_once_for_its_session_and_number(raw: RawClient) -> None:
    session = raw.create_session()
    assert raw.create_model(session) == raw.create_model(session) == f"{session}:train:0"
    assert raw.request("GET", f"/sessions/{session}").json()["training_run_ids"] == [f"{session}:train:0"]


def test_a_resent_save_is_no_second_save(raw: RawClient) -> None:
    model = raw.create_model(raw.create_session())
    body = {"model_id": model, "path": "kept", "seq_id": 1, "type": "save_weights"}
    answers = [raw.result(raw.post("/save_weights", body)).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["path"] == f"tinker://{model}/weights/kept"


def test_a_resent_sample_gives_the_same_tokens(raw: RawClient) -> None:
    session = raw.create_session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    samplers = [raw.post("/create_sampling_session", body).json()["sampling_session_id"] for _ in range(2)]
    assert samplers[0] == samplers[1]
    request = {
        "sampling_session_id": samplers[0],
        "seq_id": 0,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens(5)}]},
        "sampling_params": {"max_tokens": 8},
        "type": "sample",
    }
    submitted = [raw.post("/asample", request) for _ in range(2)]
    assert submitted[0].json() == submitted[1].json()
    assert len({raw.result(answer, protobuf=True).content for answer in submitted}) == 1


def test_requests_that_arrive_early_wait_for_their_turn(raw: RawClient) -> None:
    session = raw.create_session()
    ordered, shuffled = raw.create_model(session, 0), raw.create_model(session, 1)

    def send(model: str, seq: int):  # type: ignore[no-untyped-def]
        if seq == 5:
            return raw.forward_backward(model, seq, DATUMS)
        if seq % 2:
            return raw.forward_backward(model, seq, [supervised(tokens(10, seed=seq))])
        return raw.optim_step(model, seq, learning_rate=1e-3, eps=1e-8)

    results = []
    for model, order in ((ordered, [1, 2, 3, 4, 5]), (shuffled, [5, 3, 4, 2, 1])):
        submitted = {seq: send(model, seq) for seq in order}
        results.append(decoded_logprobs(raw.result(submitted[5], protobuf=True)))
    assert results[0] == results[1]
