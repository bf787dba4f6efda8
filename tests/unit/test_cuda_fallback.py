"""Where fused kernels do not work, a GPU samples without them and says so; a lost device is not taken for that."""

import logging
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parity.sampling_lab import VOCAB, new_sampler, prompt, run, sample
from tinsmith.demo import tiny_folder
from tinsmith.lost_device import DeviceLostError
from tinsmith.models.loading import load_base
from tinsmith.sampling import cuda_decoding


def broken(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def decoding(monkeypatch: pytest.MonkeyPatch, error: Exception) -> object:
    """What a sampler on a GPU gets whose kernels fail with `error`."""
    for name in ("cuda_layers", "graphs"):
        module = ModuleType(name)
        module.cuda_layers = module.DecodeGraphs = broken(error)  # type: ignore[attr-defined]
        monkeypatch.setitem(__import__("sys").modules, f"tinsmith.sampling.{name}", module)
    monkeypatch.setattr(cuda_decoding, "find_spec", lambda _: object())
    model: Any = SimpleNamespace(
        device=torch.device("cuda"), architecture="LlamaForCausalLM", dtype=torch.bfloat16, exact=None
    )
    cache: Any = None
    return cuda_decoding.cuda_decoding(model, cache, max_rows=4, max_context=64, max_rank=8)


def test_a_kernel_that_cannot_be_compiled_is_told_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert decoding(monkeypatch, RuntimeError("out of resource: shared memory")) is None
    assert "fused kernels do not work here: RuntimeError: out of resource: shared memory" in caplog.text


def test_a_lost_device_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceLostError):
        decoding(monkeypatch, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_a_sampler_that_cannot_capture_samples_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model = load_base(tiny_folder(), dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda _: None)
    assert model.vocab_size > VOCAB
    sampler = new_sampler(model)
    expected = run(sampler, sample("a", prompt(5)))
    sampler._cuda = SimpleNamespace(warm_up=broken(torch.OutOfMemoryError("2 GiB")))  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        sampler.warm_up(lambda _: None)
    assert "decoding steps cannot be captured here: OutOfMemoryError: 2 GiB" in caplog.text
    assert run(sampler, sample("b", prompt(5))).tokens_S.tolist() == expected.tokens_S.tolist()
