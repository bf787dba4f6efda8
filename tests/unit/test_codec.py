"""forward_backward messages to flat arrays: layout, and one clear refusal for everything that could break a batch."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.errors import TooLargeError, UserError
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.codec import (
    Address,
    Limits,
    decompress,
    decompress_beginning,
    encode_train_output,
    parse_forward_backward,
    peek_address,
    train_call,
)
from tinsmith.wire.packing import TrainCall, TrainOutput

LIMITS = Limits(vocab_size=100, max_context=16, max_bytes=2**16)


def tensor(values: Any, dtype: str, **options: Any) -> pb.Tensor:
    array = np.asarray(values, dtype)
    wire = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}[dtype]
    return pb.Tensor(dense=array.tobytes(), dtype=wire, **({"shape": array.shape} | options))


def sparse(dense: Any, dtype: str) -> pb.Tensor:
    array = np.asarray(dense, dtype)
    rows, columns = np.nonzero(array)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(array)))])
    csr = pb.SparseCsr(
        values=array[rows, columns].tobytes(),
        crow_indices=crow.astype(np.int64).tobytes(),
        col_indices=columns.astype(np.int64).tobytes(),
    )
    wire = pb.DTYPE_FLOAT32 if dtype == "float32" else pb.DTYPE_INT64
    return pb.Tensor(sparse_csr=csr, dtype=wire, shape=array.shape)


def datum(tokens: list[int], **inputs: pb.Tensor) -> pb.Datum:
    message = pb.Datum()
    message.model_input.add().encoded_text.tokens = np.array(tokens, np.int32).tobytes()
    for name, value in inputs.items():
        message.loss_fn_inputs[name].CopyFrom(value)
    return message


def supervised(tokens: list[int]) -> pb.Datum:
    ones = np.ones(len(tokens))
    return datum(tokens, target_tokens=tensor(tokens, "int64"), weights=tensor(ones, "float32"))


def policy(count: int, **more: pb.Tensor) -> pb.Datum:
    inputs = {name: tensor(np.ones(count), "float32") for name in ("logprobs", "advantages")}
    return datum([1] * count, **({"target_tokens": tensor([2] * count, "int64")} | inputs | more))


def request(*data: pb.Datum, loss: str = "cross_entropy", **fields: Any) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(model_id="m", seq_id=1, data=data, loss_fn=loss, **fields)


def decode(*data: pb.Datum, loss: str = "cross_entropy", **fields: Any) -> TrainCall:
    return train_call(request(*data, loss=loss, **fields), LIMITS)


def refusal(*data: pb.Datum, loss: str = "cross_entropy", **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        decode(*data, loss=loss, **fields)
    return str(caught.value)


def test_datums_become_flat_arrays_with_offsets() -> None:
    weights = tensor([0.5, 0.0], "float32")
    second = datum([4, 5], target_tokens=tensor([5, 6], "int64"), weights=weights)
    call = decode(supervised([1, 2, 3]), second, forward_only=True)
    assert call.forward_only
    assert call.tokens_T.tolist() == [1, 2, 3, 4, 5]
    assert call.token_offsets.tolist() == [0, 3, 5]
    assert call.targets_M.tolist() == [1, 2, 3, 5, 6]
    assert call.target_offsets.tolist() == [0, 3, 5]
    assert call.widths_N.tolist() == [0, 0]
    assert call.inputs["weights"].tolist() == [1, 1, 1, 0.5, 0]


def test_element_types_are_those_that_the_engine_reads() -> None:
    call = decode(supervised([1, 2]))
    arrays = (call.tokens_T, call.targets_M, call.widths_N, call.token_offsets, call.target_offsets)
    assert [array.dtype.str for array in arrays] == ["<i4", "<i4", "<i4", "<i8", "<i8"]
    assert call.inputs["weights"].dtype.str == "<f4"


def test_a_packed_call_survives_its_bytes() -> None:
    call = decode(supervised([1, 2, 3]), supervised([4]))
    again = TrainCall.from_bytes(call.to_bytes())
    assert again.tokens_T.tolist() == call.tokens_T.tolist()
    assert again.inputs["weights"].tolist() == call.inputs["weights"].tolist()


def test_chunks_of_one_input_are_joined() -> None:
    message = supervised([1, 2, 3])
    message.model_input[0].encoded_text.tokens = np.array([1], np.int32).tobytes()
    message.model_input.add().encoded_text.tokens = np.array([2, 3], np.int32).tobytes()
    assert decode(message).tokens_T.tolist() == [1, 2, 3]


def test_several_targets_per_token_lie_row_by_row() -> None:
    matrix = datum(
        [1, 2], target_tokens=tensor([[1, 2, 3], [4, 5, 6]], "int64"), weights=tensor(np.ones((2, 3)), "float32")
    )
    call = decode(matrix, supervised([9]))
    assert call.widths_N.tolist() == [3, 0]
    assert call.targets_M.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert call.target_offsets.tolist() == [0, 6, 7]


def test_sparse_tensors_are_filled_with_zeros() -> None:
    targets, weights = [[0, 7, 0, 0], [0, 0, 0, 0], [5, 0, 0, 3]], [[0, 0.5, 0, 0], [0, 0, 0, 0], [0.25, 0, 0, 1]]
    call = decode(datum([1, 2, 3], target_tokens=sparse(targets, "int64"), weights=sparse(weights, "float32")))
    assert call.targets_M.reshape(3, 4).tolist() == targets
    assert call.inputs["weights"].reshape(3, 4).tolist() == weights


def test_a_tensor_without_a_shape_is_a_vector() -> None:
    bare = {"target_tokens": tensor([1, 2], "int64", shape=[]), "weights": tensor([1, 1], "float32", shape=[])}
    assert decode(datum([1, 2], **bare)).widths_N.tolist() == [0]


def test_spans_and_fields_from_the_future_are_skipped() -> None:
    message = request(supervised([1, 2]))
    unknown = bytes([0x1A, 2, 0x0A, 0])  # field 3 of a datum: a span
    message.data[0].MergeFromString(unknown)
    assert train_call(parse_forward_backward(message.SerializeToString()), LIMITS).num_tokens == 2


def test_configuration_is_taken_from_the_newer_map_when_there_is_one() -> None:
    newer = {"clip_low_threshold": pb.LossConfigValue(number=0.5)}
    call = decode(policy(2), loss="ppo", loss_fn_config={"clip_low_threshold": 0.1}, loss_fn_config_v2=newer)
    assert call.config == {"clip_low_threshold": 0.5}
    assert decode(policy(2), loss="ppo", loss_fn_config={"clip_low_threshold": 0.1}).config == {
        "clip_low_threshold": 0.1
    }


def test_thresholds_may_be_given_per_token() -> None:
    call = decode(policy(2, clip_high_threshold=tensor([1.1, 1.3], "float32")), loss="ppo")
    assert call.inputs["clip_high_threshold"].tolist() == pytest.approx([1.1, 1.3])


REFUSALS: list[tuple[str, list[pb.Datum], dict[str, Any], list[str]]] = [
    ("no datum", [], {}, ["no datum"]),
    ("unknown loss", [supervised([1])], {"loss": "custom"}, ["'custom'", "cross_entropy", "ppo"]),
    ("empty datum", [supervised([1]), datum([])], {}, ["datum 1", "0 tokens", "16"]),
    ("too long", [supervised([1] * 17)], {}, ["datum 0", "17 tokens", "16"]),
    ("token too high", [supervised([1]), supervised([1, 100])], {}, ["datum 1: model_input[1]", "100", "99"]),
    ("token negative", [supervised([-1])], {}, ["datum 0: model_input[0]", "-1", "0 to 99"]),
    ("missing input", [datum([1], target_tokens=tensor([1], "int64"))], {}, ["datum 0", "'weights'", "missing"]),
    ("missing target", [datum([1], weights=tensor([1], "float32"))], {}, ["datum 0", "'target_tokens'", "missing"]),
    ("missing later", [policy(1), supervised([1])], {"loss": "ppo"}, ["datum 1", "'advantages'"]),
    (
        "unknown input",
        [supervised([1]), datum([1], **{"mask": tensor([1], "float32"), **dict(supervised([1]).loss_fn_inputs)})],
        {},
        ["datum 1", "'mask'", "target_tokens, weights"],
    ),
    (
        "optional input given once",
        [policy(1, clip_low_threshold=tensor([0.5], "float32")), policy(1)],
        {"loss": "ppo"},
        ["'clip_low_threshold'", "0 and 1"],
    ),
    (
        "short targets",
        [datum([1, 2], target_tokens=tensor([1], "int64"), weights=tensor([1], "float32"))],
        {},
        ["datum 0", "'target_tokens'", "[1]", "2 tokens", "[2]"],
    ),
    (
        "short weights",
        [datum([1, 2], target_tokens=tensor([1, 2], "int64"), weights=tensor([1], "float32"))],
        {},
        ["datum 0", "'weights'", "[1]", "[2]"],
    ),
    (
        "matrix for a policy loss",
        [policy(2, target_tokens=tensor([[1], [2]], "int64"))],
        {"loss": "ppo"},
        ["'target_tokens'", "[2, 1]", "'ppo'"],
    ),
    (
        "targets as floats",
        [datum([1], target_tokens=tensor([1], "float32"), weights=tensor([1], "float32"))],
        {},
        ["'target_tokens'", "float32", "int64"],
    ),
    (
        "weights as int32",
        [datum([1], target_tokens=tensor([1], "int64"), weights=tensor([1], "int32"))],
        {},
        ["'weights'", "int32", "float32"],
    ),
    (
        "NaN",
        [supervised([1]), datum([1, 2], target_tokens=tensor([1, 2], "int64"), weights=tensor([1, np.nan], "float32"))],
        {},
        ["datum 1: weights[1]", "nan"],
    ),
    ("infinity", [policy(1, advantages=tensor([-np.inf], "float32"))], {"loss": "ppo"}, ["advantages[0]", "-inf"]),
    (
        "target too high",
        [datum([1, 1], target_tokens=tensor([1, 2**40], "int64"), weights=tensor([1, 1], "float32"))],
        {},
        ["datum 0: target_tokens[1]", str(2**40), "0 to 99"],
    ),
    (
        "shape that does not fit",
        [datum([1, 2], target_tokens=tensor([1], "int64", shape=[2]), weights=tensor([1, 1], "float32"))],
        {},
        ["'target_tokens'", "1 values", "[2]"],
    ),
    (
        "negative shape",
        [datum([1], target_tokens=tensor([1], "int64", shape=[1, -1]), weights=tensor([1], "float32"))],
        {},
        ["'target_tokens'", "[1, -1]"],
    ),
    (
        "huge shape",
        [datum([1], target_tokens=tensor([1], "int64", shape=[1, 2**62]), weights=tensor([1], "float32"))],
        {},
        ["'target_tokens'", str(2**62)],
    ),
    ("unknown key", [policy(1)], {"loss": "ppo", "loss_fn_config": {"beta": 1.0}}, ["'beta'", "clip_low_threshold"]),
    ("any key", [supervised([1])], {"loss_fn_config": {"beta": 1.0}}, ["'beta'", "none"]),
    ("NaN key", [policy(1)], {"loss": "dro", "loss_fn_config": {"beta": float("nan")}}, ["'beta'", "nan"]),
    (
        "text key",
        [policy(1)],
        {"loss": "dro", "loss_fn_config_v2": {"beta": pb.LossConfigValue(text="high")}},
        ["'beta'", "'high'"],
    ),
    ("crossed clips", [policy(1)], {"loss": "ppo", "loss_fn_config": {"clip_low_threshold": 2.0}}, ["2.0", "1.2"]),
]


@pytest.mark.parametrize(("data", "fields", "said"), [entry[1:] for entry in REFUSALS], ids=[e[0] for e in REFUSALS])
def test_a_refusal_says_where_and_what(data: list[pb.Datum], fields: dict[str, Any], said: list[str]) -> None:
    message = refusal(*data, **fields)
    assert all(words in message for words in said), message


@pytest.mark.parametrize("kind", ["image", "dmel", None])
def test_inputs_that_are_no_text_are_refused(kind: str | None) -> None:
    message = supervised([1])
    chunk = message.model_input.add()
    if kind is not None:
        getattr(chunk, kind).SetInParent()
    assert "chunk 1" in refusal(message)
    assert "text only" in refusal(message)


def test_a_part_of_a_token_is_refused() -> None:
    message = supervised([1])
    message.model_input[0].encoded_text.tokens = b"12345"
    assert "5 bytes" in refusal(message)


@pytest.mark.parametrize(
    ("crow", "columns", "said"),
    [
        ([0, 1], [0, 0], "crow_indices"),
        ([0, 2, 1], [0], "crow_indices"),
        ([1, 1, 1], [0], "crow_indices"),
        ([0, 1, 9], [0], "crow_indices"),
        ([0, 0, 1], [3], "col_indices"),
        ([0, 0, 1], [-1], "col_indices"),
        ([0, 0, 1], [], "col_indices"),
        ([0, 2, 2], [1, 1], "ascend"),
    ],
)
def test_broken_sparse_indices_are_refused(crow: list[int], columns: list[int], said: str) -> None:
    values = sparse([[1, 0, 0], [1, 0, 0]], "int64")
    count = max(len(columns), 1)
    values.sparse_csr.values = np.ones(count, np.int64).tobytes()
    values.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
    values.sparse_csr.col_indices = np.array(columns, np.int64).tobytes()
    assert said in refusal(datum([1, 2], target_tokens=values, weights=tensor(np.ones((2, 3)), "float32")))


def test_sparse_tensors_cannot_fill_more_than_the_limit() -> None:
    wide = np.zeros((16, 100))
    wide[0, 0] = 1
    data = [datum([1] * 16, target_tokens=sparse(wide, "int64"), weights=sparse(wide, "float32")) for _ in range(8)]
    with pytest.raises(TooLargeError, match=str(LIMITS.max_bytes)):
        decode(*data)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with suppress(UserError):
        train_call(parse_forward_backward(data), LIMITS)


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_message_is_refused_or_read(data: st.DataObject) -> None:
    intact = request(policy(3), policy(2), loss="ppo").SerializeToString()
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(intact) - 1))] = data.draw(st.integers(0, 255))
    try:
        call = train_call(parse_forward_backward(bytes(damaged)), LIMITS)
    except UserError:
        return
    assert call.tokens_T.max() < LIMITS.vocab_size
    assert all(np.isfinite(values).all() and len(values) == call.target_offsets[-1] for values in call.inputs.values())


def test_the_address_is_read_from_the_beginning_alone() -> None:
    message = pb.ForwardBackwardRequest(model_id="session:train:0", seq_id=300, data=[supervised([1])])
    whole = message.SerializeToString()
    assert peek_address(whole) == peek_address(whole[:20]) == Address("session:train:0", 300)
    assert peek_address(whole[:19]) is None
    assert peek_address(b"") is None
    assert peek_address(pb.ForwardBackwardRequest(seq_id=3).SerializeToString()) is None
    assert peek_address(pb.ForwardBackwardRequest(model_id="m", seq_id=-3).SerializeToString()) is None


@given(st.binary(max_size=40))
def test_any_beginning_can_be_looked_at(data: bytes) -> None:
    peek_address(b"\x0a" + data)


@pytest.mark.parametrize("declared", [True, False])
def test_decompression_stops_at_the_limit(declared: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=declared).compressobj()
    data = bomb.compress(bytes(10_000)) + bomb.flush()
    if declared:
        data = zstandard.ZstdCompressor().compress(bytes(10_000))
    assert decompress(data, 10_000) == bytes(10_000)
    with pytest.raises(TooLargeError, match="9999"):
        decompress(data, 9_999)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with suppress(UserError):
        decompress(data, 1000)
    decompress_beginning(data, 100)


def test_the_beginning_of_a_cut_frame_can_be_read() -> None:
    content = np.random.default_rng(0).bytes(500_000)
    frame = zstandard.compress(content)
    assert decompress_beginning(frame[:300_000], 100) == content[:100]


def test_outputs_keep_the_order_and_shape_of_their_datums() -> None:
    widths_N = np.array([0, 0, 2, 0], np.int32)
    offsets = np.array([0, 2, 3, 7, 8], np.int64)
    output = TrainOutput(np.arange(8, dtype=np.float32), offsets, widths_N, {"loss:sum": 2.5})
    message = pb.ForwardBackwardOutput.FromString(encode_train_output(output))
    assert message.metrics == {"loss:sum": 2.5}
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 1, 1]
    columns = [record.fields["logprobs"] for record in message.loss_fn_outputs]
    assert [np.frombuffer(column.data, "<f4").tolist() for column in columns] == [[0, 1, 2], [3, 4, 5, 6], [7]]
    assert [np.frombuffer(column.offsets, "<i8").tolist() for column in columns] == [[0, 8, 12], [0, 16], [0, 4]]
    assert [list(column.trailing_shape) for column in columns] == [[], [2], []]
