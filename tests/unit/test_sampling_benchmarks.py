"""The sampler's benchmarks run: tiny sizes, all kinds of rows; what they measure is no matter here."""

import numpy as np
import pytest
import torch

from benchmarks import long_prompt, sampling_exactness, snapshots
from benchmarks.qwen3 import load
from benchmarks.workloads import Sizes
from tinsmith.demo import tiny_folder

TINY = Sizes(32, 2, 64, long_prompt.SMALL.vocabulary, heads=4, kv_heads=2, head_dim=16)
CPU = torch.device("cpu")


def test_sampled_logprobs_are_compared_with_the_trainers() -> None:
    rows = list(sampling_exactness.measure(["llama"], sampling_exactness.DTYPES, CPU))
    values = {row.name: row.value for row in rows}
    assert values["llama, float32: max |difference|"] < 1e-5
    assert 0 <= values["llama, float32: KL (k3)"] < values["llama, bfloat16: KL (k3)"] < 0.01
    assert values["llama, float32: mean |difference|"] < values["llama, bfloat16: mean |difference|"] < 0.1


def test_the_divergence_is_estimated_by_its_formula() -> None:
    [mean, most, divergence] = sampling_exactness.rows("x", np.array([0.1, -0.3]))
    assert (mean.value, most.value) == (0.2, 0.3)
    ratio = np.exp([0.1, -0.3])
    assert divergence.value == pytest.approx((ratio - 1 - np.log(ratio)).mean())


def test_steps_beside_a_long_prompt_are_timed() -> None:
    rows = list(long_prompt.measure(TINY, 1200, 2, CPU, torch.float32))
    assert all(row.value > 0 for row in rows)
    assert rows[3].name == "while a prompt of 1200 tokens runs: gap between a neighbour's tokens, median"


def test_publishing_and_crowds_of_snapshots_are_timed() -> None:
    model = load(tiny_folder(), torch.float32, CPU)
    rows = [*snapshots.publishing(model, 2), *snapshots.crowds(model, 10)]
    assert all(row.value > 0 for row in rows)
    assert rows[-1].name == "64 rows of 64 snapshots of rank 16: decoding step, median"
