"""Adapters as PEFT and vLLM read them: the same change of every weight, or a refusal that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.conftest import Folders, NewTrainer
from tests.parity.reference import SPECS, full_module
from tests.parity.test_merging import merged, saved
from tests.parity.vllm_loader import vllm_deltas
from tinsmith.errors import UserError
from tinsmith.models.adapter_forms import vllm_rank, vllm_tensors, write_peft, write_vllm
from tinsmith.protocols import ModelSpec

LAYERS = ModelSpec(rank=8, seed=1, train_unembed=False)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def deltas_of_merging(base: Path, checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Parameter → what merging the adapter added to it."""
    merged(base, checkpoint, folder)
    before, after = full_module(base).state_dict(), full_module(folder).state_dict()
    return {name: after[name] - tensor for name, tensor in before.items() if not torch.equal(after[name], tensor)}


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", SPECS["all"]),
        ("qwen3-untied", SPECS["all"]),
        ("mistral-window", SPECS["unembedding"]),
        ("qwen2-biases", LAYERS),
        ("gemma3", LAYERS),
        ("qwen3-moe", SPECS["all"]),
        ("qwen3-moe-mixed", LAYERS),
        ("gpt-oss", LAYERS),
    ],
)
def test_vllm_adds_to_every_weight_what_merging_does(
    family: str, spec: ModelSpec, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    checkpoint, config = saved(new_trainer(family), spec, tmp_path / "checkpoint"), config_of(folders(family))
    out = tmp_path / "vllm"
    out.mkdir()
    write_vllm(checkpoint, out, "the/base", config)
    ours = deltas_of_merging(folders(family), checkpoint, tmp_path / "merged")
    theirs = vllm_deltas(out, config)
    for name, delta in ours.items():
        path = name.removesuffix(".weight")
        if ".experts." not in name:
            torch.testing.assert_close(theirs.pop(path), delta, atol=1e-5, rtol=1e-4)
            continue
        layer, _, projection = path.rpartition(".")
        if family == "gpt-oss":  # whose weights are [E, I, O]
            fused = theirs.pop(f"{layer}.base_layer" if projection == "gate_up_proj" else layer)
            torch.testing.assert_close(fused.transpose(1, 2), delta, atol=1e-5, rtol=1e-4)
            continue
        for expert, expected in enumerate(delta):
            names = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else ["down_proj"]
            parts = [theirs.pop(f"{layer}.{expert}.{each}") for each in names]
            torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-4)
    assert not theirs
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"


@pytest.mark.parametrize(
    ("family", "spec", "complaint"),
    [
        ("qwen3-tied", SPECS["all"], "head and embedding are one module.*--merged.*train_unembed=False"),
        ("gpt-oss", SPECS["all"], "'gpt_oss' model has no LoRA for the LM head"),
        ("deepseek-moe", LAYERS, "folds the kv_b_proj of latent attention"),
        ("qwen3-next-moe", LAYERS, "gated delta nets"),
        ("qwen3.5", LAYERS, "gated delta nets"),
        ("phi3-fused", LAYERS, "has not been checked"),
    ],
)
def test_what_vllm_cannot_load_is_refused_with_the_reason(
    family: str, spec: ModelSpec, complaint: str, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    checkpoint = saved(new_trainer(family), spec, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=complaint):
        write_vllm(checkpoint, tmp_path, "the/base", config_of(folders(family)))


def test_vllms_own_limits_are_known() -> None:
    assert [vllm_rank(rank) for rank in (1, 8, 9, 33, 512)] == [8, 8, 16, 64, 512]
    with pytest.raises(UserError, match="rank 512 at most, this one has 513"):
        vllm_rank(513)
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1)}
    config = {"model_type": "llama", "vocab_size": 258_049, "tie_word_embeddings": False}
    with pytest.raises(UserError, match="258049 tokens"):
        vllm_tensors(head, 1, config)
    assert vllm_tensors(head, 1, config | {"vocab_size": 258_048}) == head


def test_peft_reads_what_an_older_version_saved(new_trainer: NewTrainer, tmp_path: Path) -> None:
    """Checkpoints once named the head as the layouts do, which PEFT passes over in silence."""
    checkpoint = saved(new_trainer("qwen3-untied"), SPECS["all"], tmp_path / "checkpoint")
    file, out = checkpoint / "adapter_model.safetensors", tmp_path / "peft"
    tensors = load_file(file)
    save_file({name.replace(".lm_head.", ".model.unembed_tokens."): each for name, each in tensors.items()}, file)
    out.mkdir()
    write_peft(checkpoint, out, "the/base")
    written = load_file(out / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    config = json.loads((out / "adapter_config.json").read_text())
    assert "lm_head" in config["target_modules"]
