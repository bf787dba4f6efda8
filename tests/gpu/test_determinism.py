"""A deterministic trainer on a GPU: a call's bits do not move with the company, nor from one run to the next."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.conftest import load
from tests.parity.reference import SPECS, as_call, random_datum
from tests.parity.training_lab import FULL, add, gradient
from tests.tiny_families import broad, randomize
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(autouse=True)
def workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` sets: cuBLAS is deterministic with a workspace of a fixed size."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["lora", "full"])
def test_bits_do_not_move_with_the_company(spec: ModelSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    module = broad()
    module.config.max_position_embeddings = 2048
    randomize(module, 3)
    module.save_pretrained(tmp_path)
    base = load(tmp_path, dtype, "cuda")
    trainer = TorchTrainer(base, micro_batch_tokens=4096, max_adapters=4, max_rank=32, deterministic=True)
    add(trainer, "m", spec)
    trainer.add("stranger", SPECS["attention"])
    rng = np.random.default_rng(0)
    call = ModelCall("m", as_call([random_datum(rng, length) for length in (1, 48, 130, 1500)]))
    gradients = []
    for round_ in range(6):
        lengths = rng.integers(1, 900, 3)
        crowd = [ModelCall("stranger", as_call([random_datum(rng, int(length)) for length in lengths]))]
        *_, result = trainer.forward_backward([*crowd, call] if round_ % 2 else [call])
        assert isinstance(result, TrainOutput), result
        gradients.append(gradient(trainer, "m"))
        trainer.discard_gradient("m")
    assert gradients[0].any()
    assert all(torch.equal(each, gradients[0]) for each in gradients[1:])
