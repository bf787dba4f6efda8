"""Memory budgets: what fits is used, what must fit is kept."""

from pathlib import Path

import pytest

from tinsmith.errors import ConfigError
from tinsmith.sizing import (
    ENGINE_ROOM,
    ModelSizes,
    check_cache,
    context_tokens,
    divide,
    free_host_memory,
    kv_cache_tokens,
    layer_tokens,
    model_bytes,
    running_sequences,
    step_bytes,
    train_tokens,
    trainable_tokens,
    useful_sequences,
)

SIZES = ModelSizes(
    kv_numbers=512, activation_bytes=70000, layers=4, hidden=64, max_context=2048, item_bytes=4, vocabulary=150_000
)
GIB = 2**30


def test_a_cached_token_costs_keys_and_values_of_all_layers() -> None:
    assert SIZES.kv_bytes == 2 * 4 * 2 * 32 * 4


@pytest.mark.parametrize("free", [0, GIB, 100 * GIB])
def test_the_cache_holds_one_context_at_least_and_all_running_ones_at_most(free: int) -> None:
    assert 2048 <= kv_cache_tokens(SIZES, free, 64, on_cpu=False) <= 64 * 2048


def test_the_cache_and_a_micro_batch_stay_within_their_shares() -> None:
    free = GIB // 8
    assert kv_cache_tokens(SIZES, free, 64, on_cpu=False) * SIZES.kv_bytes <= 0.35 * free
    assert train_tokens(SIZES, free, on_cpu=False) * SIZES.activation_bytes <= 0.25 * free
    assert train_tokens(SIZES, 0, on_cpu=False) == 256


def test_a_pass_of_prompts_takes_no_more_than_training_would_of_one_layer() -> None:
    free = GIB // 8
    tokens = layer_tokens(SIZES, free)
    assert 0.24 * free < tokens * SIZES.activation_bytes / SIZES.layers <= 0.25 * free
    assert layer_tokens(SIZES, 0) == 256


def test_models_get_their_weights_and_equal_parts_of_the_rest() -> None:
    parts = divide(40 * GIB, {"small": 2 * GIB, "large": 16 * GIB}, {})
    assert parts == {"small": 13 * GIB, "large": 27 * GIB}


def test_a_model_with_a_share_gets_that_and_the_others_divide_what_is_left() -> None:
    parts = divide(40 * GIB, {"a": GIB, "b": 2 * GIB, "c": 4 * GIB}, {"b": 0.25})
    assert parts == {"a": GIB + 12 * GIB + GIB // 2, "b": 10 * GIB, "c": 4 * GIB + 12 * GIB + GIB // 2}
    assert divide(40 * GIB, {"a": GIB}, {"a": 0.5}) == {"a": 20 * GIB}


@pytest.mark.parametrize("shares", [{}, {"large": 0.6}])
def test_models_that_do_not_fit_are_refused_with_the_arithmetic(shares: dict[str, float]) -> None:
    weights = {"small": 2 * 10**9, "large": 16 * 10**9}
    with pytest.raises(ConfigError, match=r"small 2 \+ 0\.403 \+ large 16 \+ 0\.403 = 18\.8 GB; there are 18 GB"):
        divide(18 * 10**9, weights, shares)
    fitting = sum(weights.values()) + 2 * ENGINE_ROOM
    assert sum(divide(fitting, weights, {}).values()) == fitting
    with pytest.raises(ConfigError, match=r"by memory_shares small 2\.4"):
        divide(24 * 10**9, weights, {"small": 0.1})


def test_a_cache_that_memory_cannot_hold_is_refused_with_the_arithmetic() -> None:
    check_cache(SIZES, 1000, 1000 * SIZES.kv_bytes)
    with pytest.raises(ConfigError, match=r"1000 × 2048 bytes = 0\.00205 GB.*5 GB are free; at most 999 tokens"):
        check_cache(SIZES, 1000, 1000 * SIZES.kv_bytes - 1)
    with pytest.raises(ConfigError, match=r"free beside 1\.42 GB for captured decoding steps; at most 999 tokens fit"):
        check_cache(SIZES, 1000, 1000 * SIZES.kv_bytes - 1, 1_420_000_000)


def test_captured_steps_take_the_logits_of_all_sequences_and_something_each() -> None:
    driver = 96 * 8 * 2**20
    assert step_bytes(SIZES, 100 * GIB, 1024) == 1024 * 150_000 * 4 + driver
    assert step_bytes(SIZES, 100 * GIB, 300) == 300 * 150_000 * 4 + driver
    few_tokens = step_bytes(SIZES, 100 * GIB, 1024, kv_tokens=512 * 256)
    assert few_tokens == 512 * 150_000 * 4 + driver
    assert step_bytes(SIZES, GIB, 1024) == GIB // 4  # no more: steps that find no room are not captured


def test_models_that_train_count_a_copy_of_the_gradients_that_one_pass_adds_to() -> None:
    assert model_bytes([], [], 2) == 0
    assert model_bytes([100, 50], [], 4) == 150 * (4 * 4 + 4)
    assert model_bytes([100, 50], [], 2) == 150 * (4 * 4 + 2 + 4)
    assert model_bytes([], [1000, 800], 2) == 1800 * 18 + 1000 * 4  # full-parameter models run one by one
    assert model_bytes([100, 50], [1000], 2) == 1150 * 18 + 1000 * 4


def test_sequences_with_a_state_are_as_many_as_fit() -> None:
    assert running_sequences(0, 0, 64) == 64
    assert running_sequences(GIB // 1024, GIB, 64) == 51
    assert running_sequences(GIB // 1024, 100 * GIB, 64) == 64
    assert running_sequences(GIB, 0, 64) == 1


def test_a_large_cache_is_shared_by_more_sequences() -> None:
    assert useful_sequences(0) == useful_sequences(256 * 256) == 256
    assert useful_sequences(256 * 1000) == 1000


def test_checkpointing_lets_longer_sequences_be_trained_in_the_same_memory() -> None:
    free = GIB // 8
    kept = trainable_tokens(SIZES, free, checkpointing=False)
    checkpointed = trainable_tokens(SIZES, free, checkpointing=True)
    assert SIZES.checkpointed_bytes == 4 * 64 * 4 + 70000 // 4
    assert kept * SIZES.activation_bytes <= 0.25 * free < (kept + 1) * SIZES.activation_bytes
    assert checkpointed > 3 * kept
    assert train_tokens(SIZES, free, on_cpu=True, checkpointing=True) == min(checkpointed, 1024)


@pytest.mark.parametrize(("free", "expected"), [(0, 256), (GIB // 16, 905), (100 * GIB, 2048)])
def test_the_context_is_what_can_be_sampled_and_trained(free: int, expected: int) -> None:
    assert context_tokens(SIZES, free, checkpointing=True) == expected
    assert context_tokens(SIZES, free, checkpointing=False) <= expected


def test_a_containers_limit_counts_but_its_page_cache_does_not(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    assert free_host_memory(tmp_path) == 300_000
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    assert free_host_memory(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_memory(tmp_path) > 1_000_000
