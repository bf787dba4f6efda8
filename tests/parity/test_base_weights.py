"""An adapter belongs to the weights that it was trained on, which a name does not tell."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.parity.conftest import Folders, load
from tests.parity.reference import SPECS
from tests.parity.training_lab import FULL, add
from tests.tiny_families import FAMILIES
from tinsmith.errors import UserError
from tinsmith.models.merging import merge
from tinsmith.models.weights import BASE_FILE, load_weights, save_weights
from tinsmith.protocols import ModelSpec
from tinsmith.training.trainer import TorchTrainer


def trainer_on(folder: Path) -> TorchTrainer:
    return TorchTrainer(load(folder), micro_batch_tokens=64, max_adapters=2, max_rank=32, gradient_checkpointing=False)


@pytest.fixture
def trained_on(folders: Folders) -> Path:
    return folders("qwen3-tied")


@pytest.fixture
def others(trained_on: Path, tmp_path: Path) -> Path:
    """The same model after some more training: of one layer, by a hundredth."""
    module = AutoModelForCausalLM.from_pretrained(trained_on)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    module.save_pretrained(tmp_path / "others")
    return tmp_path / "others"


def saved(trainer: TorchTrainer, spec: ModelSpec, folder: Path) -> Path:
    add(trainer, "m", spec)
    folder.mkdir()
    trainer.save("m", folder, optimizer=True, gradient=True)
    return folder


def test_an_adapter_is_neither_trained_nor_sampled_nor_merged_on_other_weights(
    trained_on: Path, others: Path, tmp_path: Path
) -> None:
    state = saved(trainer_on(trained_on), SPECS["all"], tmp_path / "state")
    elsewhere = trainer_on(others)
    elsewhere.add("m", SPECS["all"])
    with pytest.raises(UserError, match="trained on other weights of the base model"):
        elsewhere.load("m", state, optimizer=True, gradient=True)
    with pytest.raises(UserError, match="trained on other weights"):
        load_weights(load(others), state)
    with pytest.raises(UserError, match="trained on other weights"):
        merge(others, state, tmp_path / "merged", None, lambda _: None)


def test_an_adapter_that_does_not_say_what_it_was_trained_on_is_believed(
    trained_on: Path, others: Path, tmp_path: Path
) -> None:
    state = saved(trainer_on(trained_on), SPECS["all"], tmp_path / "state")
    (state / BASE_FILE).unlink()  # as PEFT writes it
    load_weights(load(others), state)


def test_a_full_model_has_all_of_its_weights_with_it(trained_on: Path, others: Path, tmp_path: Path) -> None:
    state = saved(trainer_on(trained_on), FULL, tmp_path / "state")
    elsewhere = trainer_on(others)
    elsewhere.add("m", FULL)
    elsewhere.load("m", state, optimizer=True, gradient=True)


def test_what_is_loaded_from_a_checkpoint_and_saved_again_still_says_it(
    trained_on: Path, others: Path, tmp_path: Path
) -> None:
    weights = load_weights(load(trained_on), saved(trainer_on(trained_on), SPECS["all"], tmp_path / "state"))
    (tmp_path / "again").mkdir()
    save_weights(weights, tmp_path / "again")
    with pytest.raises(UserError, match="trained on other weights"):
        load_weights(load(others), tmp_path / "again")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_same_weights_are_the_same_in_any_dtype_and_however_their_files_are_divided(
    family: str, folders: Folders, tmp_path: Path
) -> None:
    expected = load(folders(family)).fingerprint
    assert load(folders(family), torch.bfloat16).fingerprint == expected
    module = AutoModelForCausalLM.from_pretrained(folders(family))
    module.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 1
    assert load(tmp_path).fingerprint == expected
