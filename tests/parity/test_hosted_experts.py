"""Experts as the hosted service exports them: we compute what the cookbook merges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tinker_cookbook.weights._merge import apply_merge_op, detect_merge_profile, plan_merge_ops
from torch import Tensor

from tests.parity.conftest import Folders, NewTrainer
from tests.parity.reference import as_call, full_module, logprobs
from tests.parity.training_lab import data_of, outputs
from tinsmith.errors import UserError
from tinsmith.protocols import ModelCall

RANK, ALPHA = 4, 24
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}


def hosted_adapter(base: Path, shared: bool) -> dict[str, Tensor]:
    """Random matrices of the service's names and shapes for a tiny mixture; `shared`: as much as experts may share."""
    config = json.loads((base / "config.json").read_text())
    is_gpt_oss = config["model_type"] == "gpt_oss"
    width = config["intermediate_size"] if is_gpt_oss else config["moe_intermediate_size"]
    experts, hidden = 6, config["hidden_size"]
    queries, keys = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}

    def pair(name: str, inputs: int, outputs: int, counts: tuple[int, int] | None = None) -> None:
        for part, shape, count in zip("AB", ((RANK, inputs), (outputs, RANK)), counts or (0, 0), strict=True):
            full = (count, *shape) if count else shape
            tensors[f"base_model.model.model.{name}.lora_{part}.weight"] = 0.1 * torch.randn(full, generator=generator)

    pair("unembed_tokens", hidden, config["vocab_size"])
    for layer in range(config["num_hidden_layers"]):
        attention = f"layers.{layer}.{'attn' if is_gpt_oss else 'self_attn'}"
        for name, width_of in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            pair(f"{attention}.{name}", hidden, width_of)
        pair(f"{attention}.o_proj", queries, hidden)
        first, last = ((1, experts), (experts, 1)) if shared else ((experts, experts), (experts, experts))
        pair(f"layers.{layer}.mlp.experts.w1", hidden, width, first)
        pair(f"layers.{layer}.mlp.experts.w3", hidden, width, first)
        pair(f"layers.{layer}.mlp.experts.w2", width, hidden, last)
    return tensors


def merged_by_the_cookbook(base: Path, adapter: dict[str, Tensor], out: Path) -> Path:
    config, tensors = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    profile = detect_merge_profile(config, set(tensors))
    for operations in plan_merge_ops(adapter, CONFIG, set(tensors), profile).values():
        for operation in operations:
            apply_merge_op(tensors, operation)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def saved(adapter: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_an_adapter_of_the_hosted_service_computes_what_the_cookbook_merges(
    family: str, shared: bool, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    trainer, adapter = new_trainer(family), hosted_adapter(folders(family), shared)
    adopted = trainer.adopt(saved(adapter, tmp_path / "hosted"), tmp_path / "ours")
    assert adopted == tmp_path / "ours"
    spec = trainer.describe(adopted)
    assert (spec.rank, spec.alpha, spec.train_unembed) == (2 * RANK, 2 * ALPHA, True)
    trainer.add("m", spec)
    trainer.load("m", adopted, optimizer=False)
    [datum] = data_of(1, (11,))
    [ours] = outputs(trainer, ModelCall("m", as_call([datum], forward_only=True)))
    module = full_module(merged_by_the_cookbook(folders(family), adapter, tmp_path / "merged"))
    np.testing.assert_allclose(ours.logprobs_M, logprobs(module, datum).detach().numpy(), atol=1e-4)


def test_other_adapters_are_left_as_they_are(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer("qwen3-moe")
    adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(RANK, 32)}
    folder = saved(adapter, tmp_path / "plain")
    assert trainer.adopt(folder, tmp_path / "ours") == folder
    assert not (tmp_path / "ours").exists()


def test_experts_that_do_not_belong_together_are_refused(
    new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    adapter = hosted_adapter(folders("qwen3-moe"), shared=False)
    lost = {name: tensor for name, tensor in adapter.items() if ".1.mlp.experts.w3." not in name}
    trainer = new_trainer("qwen3-moe")
    with pytest.raises(UserError, match=r"do not belong together.*w3"):
        trainer.adopt(saved(lost, tmp_path / "lost"), tmp_path / "ours")
    fewer = {name: tensor[:5] if tensor.ndim == 3 else tensor for name, tensor in adapter.items()}
    with pytest.raises(UserError, match="do not belong together"):
        trainer.adopt(saved(fewer, tmp_path / "fewer"), tmp_path / "ours")
    with pytest.raises(UserError, match="w1 and w3"):
        trainer.describe(tmp_path / "lost")
