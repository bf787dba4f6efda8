"""asample bodies to flat arrays and sampling results to protobuf."""

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from tinsmith.errors import UserError
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.codec import Limits
from tinsmith.wire.packing import SampleCall, SampleOutput
from tinsmith.wire.sample_codec import encode_sample_output, sample_call, sample_cost
from tinsmith.wire.sampling_types import SampleRequest

LIMITS = Limits(vocab_size=100, max_context=16, max_bytes=2**12)


def decode(**fields: Any) -> SampleCall:
    """`prompt`, `chunks` and `params` stand for what they become; other fields are the request's own."""
    chunks = fields.pop("chunks", [{"type": "encoded_text", "tokens": fields.pop("prompt", [1, 2, 3])}])
    body = {"sampling_session_id": "s", "seq_id": 0, "prompt": {"chunks": chunks}}
    body["sampling_params"] = fields.pop("params", {})
    return sample_call(msgspec.json.decode(json.dumps(body | fields), type=SampleRequest), LIMITS)


def refusal(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        decode(**fields)
    return str(caught.value)


def targets(shape: list[int], data: list[int], **more: Any) -> dict[str, Any]:
    return {"target_prompt_logprobs": {"dtype": "int64", "shape": shape, "data": data} | more}


def test_absent_parameters_take_the_defaults_of_the_sdk() -> None:
    call = decode()
    assert (call.temperature, call.top_k, call.top_p, call.num_samples, call.max_tokens) == (1.0, -1, 1.0, 1, None)
    assert call.prompt_P.dtype.str == "<i4"
    assert not call.prompt_logprobs


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    assert decode(params={"seed": 7}).seed == 7
    assert decode().seed != decode().seed


def test_chunks_of_a_prompt_are_joined() -> None:
    chunks = [{"type": "encoded_text", "tokens": tokens} for tokens in ([1, 2], [], [3])]
    assert decode(chunks=chunks).prompt_P.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, (True, (), ())),
        ([], (False, (), ())),
        ("\n\nUser:", (False, (), ("\n\nUser:",))),
        (["a", "b"], (False, (), ("a", "b"))),
        ([3, 4], (False, (3, 4), ())),
    ],
)
def test_every_form_of_stop_is_told_apart(stop: Any, expected: tuple[Any, ...]) -> None:
    call = decode(params={} if stop is None else {"stop": stop})
    assert (call.stop_at_eos, call.stop_tokens, call.stop_strings) == expected


def test_a_packed_call_survives_its_bytes() -> None:
    call = decode(params={"stop": [3], "seed": 5}, num_samples=2, **targets([2, 1], [4, -1]))
    again = SampleCall.from_bytes(call.to_bytes())
    assert again.stop_tokens == (3,)
    assert again.target_prompt_tokens is not None
    assert again.target_prompt_tokens.tolist() == [[-1], [4], [-1]]


def test_target_rows_move_to_the_token_they_score() -> None:
    dense = decode(**targets([2, 2], [4, 5, -1, 6]))
    crow_and_columns = {"sparse_crow_indices": [0, 2, 3], "sparse_col_indices": [0, 1, 1]}
    sparse = decode(**targets([2, 2], [4, 5, 6], **crow_and_columns))
    for call in (dense, sparse):
        assert call.target_prompt_tokens is not None
        assert call.target_prompt_tokens.tolist() == [[-1, -1], [4, 5], [-1, 6]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": []}, ["0 tokens", "15"]),
        ({"prompt": [1] * 16}, ["16 tokens", "15"]),
        ({"prompt": [1, 100]}, ["prompt token 1 is 100", "99"]),
        ({"prompt": [-1]}, ["prompt token 0 is -1"]),
        ({"prompt": [2**70]}, ["whole numbers"]),
        ({"params": {"stop": ["a", 1]}}, ["mixes"]),
        ({"params": {"stop": [100]}}, ["stop token 0 is 100"]),
        ({"params": {"stop": ""}}, ["0 characters"]),
        ({"params": {"stop": ["x" * 1001]}}, ["1001 characters"]),
        ({"params": {"stop": ["x"] * 257}}, ["257 entries"]),
        ({"params": {"top_k": 0}}, ["top_k is 0"]),
        ({"prompt_logprobs_last_n": 1}, ["needs prompt_logprobs"]),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, ["is 3", "3 prompt tokens", "2"]),
        (targets([3, 1], [1, 2, 3]), ["[3, 1]", "[2, K]"]),
        (targets([2], [1, 2]), ["[2]", "[2, K]"]),
        (targets([2, 1], [1]), ["1 values", "2"]),
        (targets([2, 1], [1, 100]), ["100"]),
        (targets([2, 1], [1, -2]), ["-2"]),
        (targets([2, 10**6], [1]), ["bytes"]),
        (targets([2, 1], [1, 2], dtype="float32"), ["float32", "int64"]),
        (targets([2, 1], [1, 2.5]), ["whole numbers"]),
        (targets([2, 1], [1], sparse_crow_indices=[0, 1, 1]), ["col_indices"]),
        (targets([2, 1], [1], sparse_col_indices=[0]), ["crow_indices"]),
    ],
)
def test_a_refusal_says_what_is_allowed(arguments: dict[str, Any], said: list[str]) -> None:
    message = refusal(**arguments)
    assert all(words in message for words in said), message


@pytest.mark.parametrize("kind", ["image", "image_asset_pointer", "dmel"])
def test_prompts_that_are_no_text_are_refused(kind: str) -> None:
    chunks = [{"type": "encoded_text", "tokens": [1]}, {"type": kind, "data": "AAAA", "format": "png"}]
    message = refusal(chunks=chunks)
    assert f"chunk 1 is '{kind}'" in message


def test_the_cost_is_what_a_request_can_take_at_most() -> None:
    assert sample_cost(decode(params={"max_tokens": 4}, num_samples=3), 16) == 3 + 3 * 4
    assert sample_cost(decode(params={"max_tokens": 2**31 - 1}), 16) == 16
    assert sample_cost(decode(), 16) == 16
    assert sample_cost(decode(num_samples=4096), 2**31 - 1) == 2**31 - 1


def test_an_answer_carries_every_sequence_and_no_more_than_was_asked() -> None:
    offsets, stopped = np.array([0, 2, 3], np.int64), np.array([1, 0], np.int8)
    output = SampleOutput(np.array([5, 6, 7], np.int32), np.array([-1, -2, -3], np.float32), offsets, stopped, 9)
    message = pb.SampleResponse.FromString(encode_sample_output(output))
    assert [np.frombuffer(sequence.tokens, "<i4").tolist() for sequence in message.sequences] == [[5, 6], [7]]
    assert [np.frombuffer(sequence.logprobs, "<f4").tolist() for sequence in message.sequences] == [[-1, -2], [-3]]
    reasons = [sequence.stop_reason for sequence in message.sequences]
    assert reasons == [pb.STOP_REASON_STOP, pb.STOP_REASON_LENGTH]
    assert message.prompt_cache_hit_tokens == 9
    fields = ("prompt_logprobs", "topk_prompt_logprobs", "target_prompt_logprobs", "prompt_alt_tokens")
    assert not any(message.HasField(field) for field in fields)


def test_targets_come_back_in_the_shape_in_which_they_were_asked() -> None:
    extras = {"target_prompt_logprobs": np.array([[0, 0], [-1, -2], [0, -3]], np.float32)}
    one = np.array([0, 1], np.int64)
    output = SampleOutput(np.ones(1, np.int32), np.ones(1, np.float32), one, np.ones(1, np.int8), 0, extras)
    tensor = pb.SampleResponse.FromString(encode_sample_output(output)).target_prompt_logprobs
    assert list(tensor.shape) == [2, 2]
    assert np.frombuffer(tensor.dense, "<f4").tolist() == [-1, -2, 0, -3]
