"""Saved models: the file layout, exact continuation, and refusal of what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.parity.reference import SPECS, as_call, logprobs, random_datum
from tinsmith.errors import UserError
from tinsmith.models.weights import FullWeights, LoraWeights, load_weights, save_weights
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

FULL = ModelSpec(rank=0, seed=0)
PARAMS = AdamParams(learning_rate=0.01, weight_decay=0.1)
KINDS = pytest.mark.parametrize("spec", [SPECS["all"], SPECS["mlp"], FULL], ids=["lora", "mlp only", "full"])
NewTrainer = Callable[..., TorchTrainer]


def run(trainer: TorchTrainer, model_id: str, seed: int, *, step: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    [output] = trainer.forward_backward([ModelCall(model_id, as_call([random_datum(rng, 9), random_datum(rng, 12)]))])
    if step:
        trainer.optim_step(model_id, PARAMS)
    return output.logprobs_M


@KINDS
def test_a_model_saved_with_optimizer_and_gradient_goes_on_bit_for_bit(
    spec: ModelSpec, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer, other = new_trainer(), new_trainer()
    trainer.add("m", spec)
    run(trainer, "m", 0)
    run(trainer, "m", 1)
    run(trainer, "m", 2, step=False)
    trainer.save("m", tmp_path, optimizer=True, gradient=True)
    other.add("n", spec)
    run(other, "n", 5, step=False)
    other.load("n", tmp_path, optimizer=True, gradient=True)
    for each, model_id in ((trainer, "m"), (other, "n")):
        run(each, model_id, 3)
    assert torch.equal(trainer._models["m"].weights.weights, other._models["n"].weights.weights)
    np.testing.assert_array_equal(run(trainer, "m", 4), run(other, "n", 4))


@KINDS
def test_loading_without_optimizer_starts_a_fresh_one_and_clears_the_gradient(
    spec: ModelSpec, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer()
    trainer.add("m", spec)
    run(trainer, "m", 0)
    trainer.save("m", tmp_path, optimizer=True, gradient=True)
    assert not (tmp_path / "gradient.safetensors").exists()
    run(trainer, "m", 1, step=False)
    trainer.load("m", tmp_path, optimizer=False)
    assert trainer._models["m"].optimizer.step_count == 0
    assert trainer.optim_step("m", PARAMS) == {"grad_norm": 0.0}


def test_a_model_that_never_stepped_can_be_saved_with_its_optimizer(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.add("m", SPECS["all"])
    trainer.save("m", tmp_path, optimizer=True)
    trainer.load("m", tmp_path, optimizer=True)
    run(trainer, "m", 0)


def test_an_adapters_files_have_the_names_and_shapes_that_exporters_read(
    new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer()
    trainer.add("m", SPECS["all"])
    trainer.save("m", tmp_path, optimizer=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 32.0, trainer._model.folder)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    prefix = "base_model.model.model."
    assert shapes[f"{prefix}layers.1.self_attn.q_proj.lora_A.weight"] == [8, 32]
    assert shapes[f"{prefix}layers.1.self_attn.q_proj.lora_B.weight"] == [64, 8]
    assert shapes[f"{prefix}layers.0.mlp.down_proj.lora_A.weight"] == [8, 64]
    assert shapes[f"{prefix}unembed_tokens.lora_B.weight"] == [97, 8]
    assert len(shapes) == 2 * (2 * 7 + 1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_loads_a_saved_adapter(new_trainer: NewTrainer, folders: Callable[[str], Path], tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.add("m", ModelSpec(rank=8, seed=1, train_unembed=False))
    run(trainer, "m", 0)
    trainer.save("m", tmp_path, optimizer=False)
    datum = random_datum(np.random.default_rng(1), 11)
    [ours] = trainer.forward_backward([ModelCall("m", as_call([datum], forward_only=True))])
    module = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders("qwen3-tied")), tmp_path).eval()
    np.testing.assert_allclose(ours.logprobs_M, logprobs(module, datum).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-untied"])
def test_transformers_loads_a_saved_full_model(family: str, new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer(family)
    trainer.add("m", FULL)
    run(trainer, "m", 0)
    trainer.save("m", tmp_path, optimizer=True)
    datum = random_datum(np.random.default_rng(1), 11)
    [ours] = trainer.forward_backward([ModelCall("m", as_call([datum], forward_only=True))])
    module = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    np.testing.assert_allclose(ours.logprobs_M, logprobs(module, datum).detach().numpy(), atol=1e-5)


@KINDS
def test_a_snapshot_does_not_move_and_survives_a_round_trip_through_files(
    spec: ModelSpec, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer()
    trainer.add("m", spec)
    run(trainer, "m", 0)
    snapshot = trainer.snapshot("m")
    before = [tensor.clone() for tensor in tensors_of(snapshot)]
    run(trainer, "m", 1)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(snapshot), before, strict=True))
    save_weights(snapshot, tmp_path)
    loaded = load_weights(trainer._model, tmp_path)
    assert type(loaded) is type(snapshot)
    assert loaded.nbytes == snapshot.nbytes > 0
    assert all(torch.equal(*pair) for pair in zip(tensors_of(loaded), before, strict=True))


def tensors_of(weights: LoraWeights | FullWeights) -> list[torch.Tensor]:
    return [weights.adapter.weights] if isinstance(weights, LoraWeights) else list(weights.module.parameters())


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (ModelSpec(rank=4, seed=1), "rank=4"),
        (ModelSpec(rank=8, seed=1, alpha=16.0), "alpha=16"),
        (ModelSpec(rank=8, seed=1, train_mlp=False), "train_mlp=False"),
        (FULL, "full-parameter"),
    ],
)
def test_a_checkpoint_of_another_kind_of_model_is_refused(
    other: ModelSpec, complaint: str, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer()
    trainer.add("m", SPECS["all"])
    trainer.add("other", other)
    trainer.save("m", tmp_path, optimizer=True)
    before = trainer._models["other"].weights.weights.clone()
    with pytest.raises(UserError, match=complaint):
        trainer.load("other", tmp_path, optimizer=True)
    assert torch.equal(trainer._models["other"].weights.weights, before)


def damage_shape(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if ".q_proj." in name)
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, folder / "adapter_model.safetensors")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter_model.safetensors")


def drop_the_optimizer(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def cut_the_file(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-100])


def spoil_the_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": "many"}')


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damage_shape, "shape"),
        (drop_a_tensor, "missing"),
        (drop_the_optimizer, "no optimizer state"),
        (cut_the_file, "not a safetensors file"),
        (spoil_the_config, "many"),
    ],
)
def test_damaged_checkpoints_are_refused_and_change_nothing(
    damage: Callable[[Path], None], complaint: str, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer()
    trainer.add("m", SPECS["all"])
    run(trainer, "m", 0)
    trainer.save("m", tmp_path, optimizer=True)
    damage(tmp_path)
    run(trainer, "m", 1)
    before = trainer._models["m"].weights.weights.clone()
    with pytest.raises(UserError, match=complaint):
        trainer.load("m", tmp_path, optimizer=True)
    assert torch.equal(trainer._models["m"].weights.weights, before)
    assert trainer._models["m"].optimizer.step_count == 2
