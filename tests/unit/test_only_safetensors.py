"""Weights are numbers, not programs: pickles and a model's own code are never run, whoever put them there."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tinsmith
from tests.unit.test_engine import embedded
from tinsmith.demo import tiny_folder
from tinsmith.errors import ConfigError, UserError
from tinsmith.models.loading import BaseModel, load_base
from tinsmith.protocols import ModelSpec
from tinsmith.served import Served
from tinsmith.training.trainer import TorchTrainer

SOURCES = sorted(Path(tinsmith.__file__).parent.rglob("*.py"))


class Trap:
    """Leaves a mark where its pickle is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


def load(folder: Path) -> BaseModel:
    return load_base(folder, dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda progress: None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "base"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("harmless", [True, False])
def test_a_base_model_that_is_a_pickle_is_refused_unread(base: Path, name: str, harmless: bool) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if harmless:
        torch.save(weights, base / name)
    else:
        (base / name).write_bytes(pickle.dumps(Trap(base / "mark")))
    with pytest.raises(ConfigError, match="safetensors"):
        load(base)
    assert not (base / "mark").exists()


def test_code_that_comes_with_a_model_is_not_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    code = f"open({str(base / 'mark')!r}, 'w')\nclass C: pass\nclass M: pass\n"
    (base / "modeling_theirs.py").write_text(code)
    automatic = {"AutoConfig": "modeling_theirs.C", "AutoModelForCausalLM": "modeling_theirs.M"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": automatic}))
    assert load(base).parameters > 0
    (base / "config.json").write_text(json.dumps(config | {"auto_map": automatic, "model_type": "theirs"}))
    with pytest.raises(ConfigError):
        load(base)
    assert not (base / "mark").exists()


@pytest.mark.parametrize("optimizer", [True, False])
def test_pickles_in_a_checkpoint_are_left_alone(tmp_path: Path, optimizer: bool) -> None:
    model, _ = embedded()
    trainer = TorchTrainer(model, micro_batch_tokens=64, max_adapters=2, max_rank=8)
    trainer.add("m", ModelSpec(rank=4, seed=1))
    trainer.save("m", tmp_path, optimizer=True)
    saved = list(tmp_path.glob("*.safetensors"))
    for stem in {path.stem for path in saved} | {"pytorch_model"}:
        for ending in ("bin", "pt", "pth", "pkl", "safetensors.bin"):
            (tmp_path / f"{stem}.{ending}").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    trainer.load("m", tmp_path, optimizer=optimizer)
    (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(UserError, match="not a safetensors file"):
        trainer.load("m", tmp_path, optimizer=optimizer)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        trainer.load("m", tmp_path, optimizer=optimizer)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("word", ["torch.load", "pickle", "weights_only"])
def test_no_source_names_a_way_to_run_what_it_loads(word: str) -> None:
    assert [path for path in SOURCES if word in path.read_text()] == []


def calls_of(*endings: str) -> list[ast.Call]:
    return [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(endings)
    ]


def test_every_model_is_asked_for_as_safetensors() -> None:
    models = [call for call in calls_of(".from_pretrained") if "Model" in ast.unparse(call.func)]
    assert models
    for call in models:
        assert "use_safetensors=True" in ast.unparse(call)


def test_code_that_comes_with_a_model_runs_only_where_somebody_has_said_so() -> None:
    given = [
        keyword
        for call in calls_of(".from_pretrained", ".from_config")
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert given
    for keyword in given:
        assert ast.unparse(keyword.value).split(".")[-1] == "trust_remote_code", ast.unparse(keyword.value)
    assert Served("m", "m").trust_remote_code is False
