"""Tiny random models of several families, as folders that `load_base` reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_families import FAMILIES, SIZED, randomize
from tinsmith.models.loading import BaseModel, load_base
from tinsmith.training.trainer import TorchTrainer

Folders = Callable[[str], Path]
Bases = Callable[[str], BaseModel]
NewTrainer = Callable[..., TorchTrainer]


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> BaseModel:
    return load_base(folder, dtype=dtype, device=torch.device(device), on_progress=lambda _: None)


def saved_and_loaded(module: PreTrainedModel, folder: Path) -> BaseModel:
    """A base model of these layers with random weights, by way of its files."""
    randomize(module, seed=0)
    module.save_pretrained(folder)
    return load(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a family's tiny model, made on first use."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            torch.manual_seed(0)
            module = (SIZED | FAMILIES)[family]()
            randomize(module, seed=len(family))
            module.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def bases(folders: Folders) -> Bases:
    """The loaded base model of a family; shared, since nothing may change it."""
    loaded: dict[str, BaseModel] = {}

    def base(family: str) -> BaseModel:
        if family not in loaded:
            loaded[family] = load(folders(family))
        return loaded[family]

    return base


@pytest.fixture
def new_trainer(bases: Bases) -> NewTrainer:
    """A trainer on a family's base model; keyword arguments override its limits."""

    def make(family: str = "qwen3-tied", **overrides: object) -> TorchTrainer:
        options = {"micro_batch_tokens": 64, "max_adapters": 8, "max_rank": 32, "gradient_checkpointing": False}
        return TorchTrainer(bases(family), **(options | overrides))

    return make
