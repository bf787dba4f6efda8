"""Every family on a CUDA device: adapters of several ranks and a full model together, against the same on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.parity.conftest import load
from tests.parity.reference import as_call, random_datum
from tests.parity.training_lab import add, gradient, outputs
from tests.tiny_families import FAMILIES
from tinsmith.demo import tiny_folder
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleCall, SampleOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SPECS = {"eight": ModelSpec(8, 1), "sixteen": ModelSpec(16, 2), "three": ModelSpec(3, 3), "full": ModelSpec(0, 4)}
PARAMS = AdamParams(learning_rate=1e-3, weight_decay=0.1, grad_clip_norm=1.0)


def train(folder: Path, device: str, dtype: torch.dtype) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """Logprobs of three steps, the first gradients, and what the trained snapshots sample from."""
    model = load(folder, dtype, device)
    trainer = TorchTrainer(model, micro_batch_tokens=64, max_adapters=8, max_rank=32)
    rng = np.random.default_rng(0)
    for name, spec in SPECS.items():
        add(trainer, name, spec)
    logprobs, grads = [], {}
    for step in range(3):
        calls = [ModelCall(name, as_call([random_datum(rng, length) for length in (5, 14)])) for name in SPECS]
        logprobs += [output.logprobs_M for output in outputs(trainer, *calls)]
        if step == 0:
            grads = {name: gradient(trainer, name).cpu() for name in SPECS}
        for name in SPECS:
            trainer.optim_step(name, PARAMS)
    sampler = TorchSampler(model, AutoTokenizer.from_pretrained(tiny_folder()), kv_tokens=1024, max_running=8)
    for name in SPECS:
        sampler.publish(name, trainer.snapshot(name))
        asked = SampleCall(np.array([20, 30, 31], np.int32), seed=1, num_samples=2, max_tokens=8, stop_at_eos=False)
        sampler.submit(SnapshotCall(name, name, "tenant", asked))
    while sampler.load:
        for end in sampler.step():
            assert isinstance(end.output, SampleOutput), end.output
    return logprobs, grads


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_as_on_the_cpu_in_float32(family: str, folders: Callable[[str], Path]) -> None:
    expected, expected_grads = train(folders(family), "cpu", torch.float32)
    logprobs, grads = train(folders(family), "cuda", torch.float32)
    for ours, theirs in zip(logprobs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() <= 1e-3 * expected_grads[name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_samples_in_bfloat16(family: str, folders: Callable[[str], Path]) -> None:
    expected, _ = train(folders(family), "cpu", torch.float32)
    logprobs, _ = train(folders(family), "cuda", torch.bfloat16)
    differences = np.concatenate([np.abs(a - b) for a, b in zip(logprobs, expected, strict=True)])
    assert np.isfinite(differences).all()
    assert np.median(differences) < 0.1
