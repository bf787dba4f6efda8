"""The trainer and the sampler on a CUDA device, against the same on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tinsmith.demo import tiny_folder
from tinsmith.models import lora
from tinsmith.models.loading import load_base
from tinsmith.models.lora import AdapterLayout, initial_weights
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall, SampleOutput, TrainCall, TrainOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SPECS = {"a": ModelSpec(8, 1), "b": ModelSpec(32, 2, train_mlp=False), "full": ModelSpec(0, 3)}


def call(*rows: list[int]) -> TrainCall:
    lengths = [len(row) - 1 for row in rows]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.array([token for row in rows for token in row[:-1]], np.int32)
    targets = np.array([token for row in rows for token in row[1:]], np.int32)
    weights = {"weights": np.ones(len(tokens), np.float32)}
    return TrainCall(
        "cross_entropy", {}, False, tokens, offsets, targets, offsets, np.zeros(len(rows), np.int32), weights
    )


def backend(device: str, dtype: torch.dtype) -> tuple[TorchTrainer, TorchSampler]:
    folder = tiny_folder()
    model = load_base(folder, dtype=dtype, device=torch.device(device), on_progress=lambda progress: None)
    trainer = TorchTrainer(model, micro_batch_tokens=256, max_adapters=8, max_rank=64)
    return trainer, TorchSampler(model, AutoTokenizer.from_pretrained(folder), kv_tokens=4096, max_running=16)


def lesson(device: str, dtype: torch.dtype) -> tuple[list[np.ndarray[Any, Any]], list[list[int]]]:
    """The logprobs of three tenants over a few steps, and what they then say greedily."""
    trainer, sampler = backend(device, dtype)
    for name, spec in SPECS.items():
        trainer.add(name, spec)
    logprobs = []
    for step in range(4):
        calls = [ModelCall(name, call([20 + step, 30, 31, 32], [50, 51, 52 + step])) for name in SPECS]
        outcomes = trainer.forward_backward(calls)
        assert all(isinstance(outcome, TrainOutput) for outcome in outcomes), outcomes
        logprobs += [outcome.logprobs_M for outcome in outcomes if isinstance(outcome, TrainOutput)]
        for name in SPECS:
            trainer.optim_step(name, AdamParams(learning_rate=1e-3, weight_decay=0.1, grad_clip_norm=1.0))
    for name in SPECS:
        sampler.publish(name, trainer.snapshot(name))
        prompt = np.array([20, 30, 31], np.int32)
        asked = SampleCall(prompt, seed=1, num_samples=3, max_tokens=12, temperature=0.0, stop_at_eos=False)
        sampler.submit(SnapshotCall(name, name, "tenant", asked))
    said: dict[str, list[int]] = {}
    while sampler.load:
        for end in sampler.step():
            assert isinstance(end.output, SampleOutput), end.output
            said[end.request_id] = end.output.tokens_S.tolist()
    return logprobs, [said[name] for name in SPECS]


def test_training_and_sampling_agree_with_the_cpu_in_float32() -> None:
    expected, expected_tokens = lesson("cpu", torch.float32)
    logprobs, tokens = lesson("cuda", torch.float32)
    for ours, theirs in zip(logprobs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert tokens == expected_tokens


def test_a_seed_gives_the_same_adapter_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{linear}.{part}" for linear in range(40) for part in "AB"]
    layout = AdapterLayout(names, [(32, 256), (512, 32)] * 40, [linear for linear in range(40) for _ in "AB"])
    expected = initial_weights(layout, 3, torch.device("cpu"))
    for most in (10**4, 10**9):
        monkeypatch.setattr(lora, "_MOST_STAGED", most)
        assert torch.equal(initial_weights(layout, 3, torch.device("cuda")).cpu(), expected)


def test_bfloat16_stays_near_float32() -> None:
    expected, _ = lesson("cpu", torch.float32)
    logprobs, _ = lesson("cuda", torch.bfloat16)
    differences = np.concatenate([np.abs(a - b) for a, b in zip(logprobs, expected, strict=True)])
    assert differences.mean() < 0.1
