"""Merged models: Hugging Face computes with them what we compute with the adapter on its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.parity.conftest import Folders, NewTrainer, saved_and_loaded
from tests.parity.reference import SPECS, as_call, full_module, logprobs
from tests.parity.test_families import conditional
from tests.parity.training_lab import FULL, add, data_of, outputs
from tests.tiny_families import BEYOND_LLAMA
from tinsmith.errors import ConfigError, UserError
from tinsmith.models.merging import Merged, NotTheSameError, merge
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

TIED = {"qwen3-tied", "qwen3-moe-mixed", "gemma3"}


def saved(trainer: TorchTrainer, spec: ModelSpec, folder: Path) -> Path:
    """A model with weights that show mistakes, as a checkpoint; its id in the trainer is `m`."""
    add(trainer, "m", spec)
    folder.mkdir()
    trainer.save("m", folder, optimizer=False)
    return folder


def merged(base: Path, checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> Merged:
    out.mkdir()
    return merge(base, checkpoint, out, dtype, lambda _: None)


def logprobs_of(trainer: TorchTrainer, datum: Any) -> np.ndarray:
    [output] = outputs(trainer, ModelCall("m", as_call([datum], forward_only=True)))
    return output.logprobs_M


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-untied", "qwen2-biases", "phi3-fused", *BEYOND_LLAMA])
def test_a_merged_model_computes_what_the_adapter_does(
    family: str, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    trainer = new_trainer(family)
    checkpoint = saved(trainer, SPECS["all"], tmp_path / "adapter")
    report = merged(folders(family), checkpoint, tmp_path / "merged")
    assert report.untied == (family in TIED)
    assert report.effect > 0.05
    assert report.mean_difference <= report.largest_difference < 1e-4
    [datum] = data_of(1, (11,))
    theirs = logprobs(full_module(tmp_path / "merged"), datum).detach().numpy()
    np.testing.assert_allclose(theirs, logprobs_of(trainer, datum), atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-moe", "gpt-oss", "qwen3-next-moe"])
def test_a_merged_model_has_the_names_and_shapes_of_its_base(
    family: str, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    """What reads the base's files reads these: experts are written as they were, the head only beside them."""
    checkpoint = saved(new_trainer(family), SPECS["all"], tmp_path / "adapter")
    merged(folders(family), checkpoint, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (folders(family), tmp_path / "merged"))
    assert after.keys() - before.keys() == ({"lm_head.weight"} if family in TIED else set())
    assert before.keys() <= after.keys()
    assert all(after[name].shape == tensor.shape for name, tensor in before.items())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_tied_head_stays_tied_if_it_is_not_adapted(new_trainer: NewTrainer, folders: Folders, tmp_path: Path) -> None:
    checkpoint = saved(new_trainer("qwen3-tied"), SPECS["attention"], tmp_path / "adapter")
    assert not merged(folders("qwen3-tied"), checkpoint, tmp_path / "merged").untied
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-moe"])
def test_a_full_model_is_written_as_its_base_was(
    family: str, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    trainer = new_trainer(family)
    checkpoint = tmp_path / "full"
    checkpoint.mkdir()
    trainer.add("m", FULL)
    weights = trainer._models["m"].weights
    weights.weights.add_(0.02 * torch.randn(weights.weights.shape, generator=torch.Generator().manual_seed(3)))
    weights.weights_changed()
    trainer.save("m", checkpoint, optimizer=False)
    report = merged(folders(family), checkpoint, tmp_path / "merged")
    assert report.effect > 0.05
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == (
        load_file(folders(family) / "model.safetensors").keys()
    )
    [datum] = data_of(1, (11,))
    theirs = logprobs(full_module(tmp_path / "merged"), datum).detach().numpy()
    np.testing.assert_allclose(theirs, logprobs_of(trainer, datum), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3.5", "gemma3"])
def test_a_model_with_pictures_keeps_what_sees_them(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = saved_and_loaded(conditional()[family].eval(), base)
    trainer = TorchTrainer(model, micro_batch_tokens=64, max_adapters=1, max_rank=8)
    checkpoint = saved(trainer, SPECS["all"], tmp_path / "adapter")
    merged(base, checkpoint, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    seeing = [name for name in before if "visual" in name or "vision" in name]
    assert seeing
    assert all(torch.equal(after[name], before[name]) for name in seeing)
    [datum] = data_of(1, (11,))
    module = type(conditional()[family]).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    np.testing.assert_allclose(logprobs(module, datum).detach().numpy(), logprobs_of(trainer, datum), atol=1e-4)


@pytest.fixture
def narrow(folders: Folders, tmp_path: Path) -> Path:
    """A base whose files are bfloat16."""
    folder = Path(shutil.copytree(folders("qwen3-tied"), tmp_path / "narrow"))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def test_a_merged_model_has_the_dtype_of_its_base_and_is_rounded_once(
    narrow: Path, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    checkpoint = saved(new_trainer("qwen3-tied"), SPECS["all"], tmp_path / "adapter")
    wide, rounded = (
        merged(narrow, checkpoint, tmp_path / name, dtype)
        for name, dtype in (("wide", torch.float32), ("merged", None))
    )
    assert (wide.dtype, rounded.dtype) == ("float32", "bfloat16")
    assert wide.mean_difference < 1e-5 < rounded.mean_difference < 0.1 * rounded.effect
    exact, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "merged"))
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in exact.items())


def test_an_adapter_that_rounding_would_undo_is_not_merged(
    narrow: Path, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    checkpoint = saved(new_trainer("qwen3-tied"), SPECS["all"], tmp_path / "adapter")
    weights = load_file(checkpoint / "adapter_model.safetensors")
    faint = {name: tensor * (0.001 if ".lora_B." in name else 1.0) for name, tensor in weights.items()}
    save_file(faint, checkpoint / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(NotTheSameError, match="Rounding to bfloat16 hides what was trained; write float32"):
        merged(narrow, checkpoint, tmp_path / "merged")
    assert merged(narrow, checkpoint, tmp_path / "wide", torch.float32).mean_difference < 1e-5


def test_what_was_written_wrong_is_found_out(
    new_trainer: NewTrainer, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(new_trainer("qwen3-untied"), SPECS["mlp"], tmp_path / "adapter")
    monkeypatch.setattr("tinsmith.models.merging._add", lambda *_: None)
    with pytest.raises(NotTheSameError, match=r"from the base model's; 0\.0001 is allowed"):
        merged(folders("qwen3-untied"), checkpoint, tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(new_trainer: NewTrainer, folders: Folders, tmp_path: Path) -> None:
    checkpoint = saved(new_trainer("deepseek-mla"), SPECS["attention"], tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit this model"):
        merged(folders("qwen3-untied"), checkpoint, tmp_path / "merged")


def test_what_belongs_to_a_model_comes_along(new_trainer: NewTrainer, folders: Folders, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders("qwen3-untied"), tmp_path / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "pytorch_model.bin"):
        (base / name).write_text(name)
    checkpoint = saved(new_trainer("qwen3-untied"), SPECS["mlp"], tmp_path / "adapter")
    merged(base, checkpoint, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"),
    }


def test_a_folder_that_is_no_model_is_refused(new_trainer: NewTrainer, tmp_path: Path) -> None:
    checkpoint = saved(new_trainer("qwen3-untied"), SPECS["mlp"], tmp_path / "adapter")
    with pytest.raises(ConfigError, match="cannot load"):
        merged(tmp_path, checkpoint, tmp_path / "merged")


def test_a_quantized_base_is_refused(new_trainer: NewTrainer, folders: Folders, tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders("qwen3-untied"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    checkpoint = saved(new_trainer("qwen3-untied"), SPECS["mlp"], tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is quantized"):
        merged(base, checkpoint, tmp_path / "merged")
