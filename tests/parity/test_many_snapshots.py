"""Dozens of adapters in one batch: each request gets what its own weights say."""

import numpy as np

from tests.parity.conftest import Bases
from tests.parity.sampling_lab import lora, new_sampler, prompt, run, sample, sequences
from tinsmith.protocols import ModelSpec

SNAPSHOTS = 64


def test_sixty_four_snapshots_share_a_batch_and_each_samples_as_it_does_alone(bases: Bases) -> None:
    model = bases("qwen3-untied")
    crowded, alone = new_sampler(model, kv_tokens=4096, max_running=64), new_sampler(model)
    calls = []
    for number in range(SNAPSHOTS):
        targets = {"train_attn": number % 3 != 1, "train_mlp": number % 3 != 2, "train_unembed": number % 2 == 0}
        weights = lora(model, ModelSpec(rank=(1, 4, 8, 16)[number % 4], seed=number, **targets), seed=number)
        for sampler in (crowded, alone):
            sampler.publish(str(number), weights)
        length = 3 + number % 11
        calls.append(sample(str(number), prompt(length), str(number), f"tenant {number % 5}", seed=number))
    together = run(crowded, *calls)
    texts = set()
    for call, output in zip(calls, together, strict=True):
        expected = run(alone, call)
        assert sequences(output) == sequences(expected)
        np.testing.assert_allclose(output.logprobs_S, expected.logprobs_S, atol=1e-5, rtol=0)
        texts.add(tuple(output.tokens_S.tolist()))
    assert len(texts) == SNAPSHOTS
