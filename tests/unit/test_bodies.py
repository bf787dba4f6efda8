"""What a JSON body's error says: the place, what may stand there, and what stood there."""

from typing import Any

import msgspec
import pytest

from tinsmith.api.bodies import decode_json
from tinsmith.errors import UserError
from tinsmith.wire.sampling_types import SampleRequest
from tinsmith.wire.training_types import AdamParams, LoraConfig, SaveWeightsRequest


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (AdamParams, b'{"learning_rate": -0.5}', "Expected `float` >= 0.0, got -0.5 - at `$.learning_rate`"),
        (AdamParams, b'{"eps": 0}', "Expected `float` >= 1e-37, got 0 - at `$.eps`"),
        (LoraConfig, b'{"rank": -3}', "Expected `int` >= 0, got -3 - at `$.rank`"),
        (LoraConfig, b'{"rank": "8"}', "Expected `int`, got `str` - at `$.rank`"),
        (LoraConfig, b'{"rank": 8, "alpha": 3}', "unknown field `alpha`"),
        (SaveWeightsRequest, b'{"model_id": "", "seq_id": 1}', "length >= 1, got 0 - at `$.model_id`"),
        (SaveWeightsRequest, b'{"model_id": "a\\n", "seq_id": 1}', "matching regex"),
        (SampleRequest, b'{"sampling_params": {"max_tokens": -7}}', ">= 1, got -7 - at `$.sampling_params.max_tokens`"),
        (list[LoraConfig], b'[{"rank": 8}, {"rank": -3}]', "got -3 - at `$[1].rank`"),
    ],
)
def test_an_error_says_what_was_given_and_what_is_allowed(kind: type[Any], content: bytes, said: str) -> None:
    with pytest.raises(UserError) as failure:
        decode_json(content, kind)
    assert said in str(failure.value)


def test_a_nan_which_travels_as_null_is_called_by_its_name() -> None:
    content = msgspec.json.encode({"learning_rate": float("nan")})
    with pytest.raises(UserError, match=r"learning_rate.*NaN and infinity"):
        decode_json(content, AdamParams)


@pytest.mark.parametrize(
    "content", [b'{"rank": -3,', b'{"rank": -3, "rank": {}}', b'{"rank": -3, "seed": ' + b"[" * 100_000]
)
def test_what_follows_a_wrong_value_cannot_break_its_message(content: bytes) -> None:
    with pytest.raises(UserError, match=r"Expected `int` >= 0 - at `\$.rank`"):
        decode_json(content, LoraConfig)
