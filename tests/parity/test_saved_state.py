"""Saved models: the file layout, exact continuation, and refusal of what does not fit."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.parity import continuation
from tests.parity.conftest import Folders, NewTrainer
from tests.parity.reference import (
    PEFTS_WARNINGS,
    SPECS,
    as_call,
    full_module,
    logprobs,
    lora_parameters,
    random_datum,
    warm,
)
from tests.parity.reference import train as train_elsewhere
from tests.parity.training_lab import FULL, add, data_of, outputs
from tests.tiny_families import BEYOND_LLAMA, MIXTURES
from tinsmith.errors import UserError
from tinsmith.models.weights import FullWeights, LoraWeights, load_weights, save_weights
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainCall

pytestmark = PEFTS_WARNINGS

PARAMS = AdamParams(learning_rate=0.01, weight_decay=0.1)
KINDS = pytest.mark.parametrize("spec", [SPECS["all"], SPECS["mlp"], FULL], ids=["lora", "mlp only", "full"])


def run(trainer: TorchTrainer, model_id: str, seed: int, *, step: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    [output] = outputs(trainer, ModelCall(model_id, as_call([random_datum(rng, 9), random_datum(rng, 12)])))
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


def six_calls() -> list[TrainCall]:
    rng = np.random.default_rng(6)
    return [as_call([random_datum(rng, int(length)) for length in rng.integers(1, 20, 3)]) for _ in range(6)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_fresh_process_goes_on_bit_for_bit(folders: Folders, tmp_path: Path) -> None:
    folder, calls, checkpoints = folders("qwen3-tied"), six_calls(), []
    (tmp_path / "calls").mkdir()
    for number, call in enumerate(calls[3:]):
        (tmp_path / "calls" / str(number)).write_bytes(call.to_bytes())
    for dtype in ("float32", "bfloat16"):
        trainer = continuation.new_trainer(folder, getattr(torch, dtype))
        for name, spec in (("lora", SPECS["all"]), ("full", FULL)):
            trainer.add(name, spec)
            path, here = tmp_path / f"{name}-{dtype}", tmp_path / f"{name}-{dtype}-here"
            for target, part in ((path, calls[:3]), (here, calls[3:])):
                continuation.train(trainer, name, part)
                target.mkdir()
                trainer.save(name, target, optimizer=True)
            checkpoints.append(f"{path}:{dtype}")
    program = [sys.executable, "-m", "tests.parity.continuation", str(folder), str(tmp_path / "calls"), *checkpoints]
    subprocess.run(program, check=True, cwd=Path(__file__).parents[2], timeout=120, stderr=subprocess.DEVNULL)
    for here in tmp_path.glob("*-here"):
        for file in here.glob("*.safetensors"):
            expected = load_file(file)
            actual = load_file(Path(str(here).replace("-here", "-continued")) / file.name)
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[name], expected[name]) for name in expected), f"{here.name}: {file.name}"


def test_master_weights_outlive_a_base_of_another_precision(folders: Folders, tmp_path: Path) -> None:
    """A checkpoint is fp32 whatever the base computes in: saved beside a bf16 base, it goes on beside an fp32 one."""
    narrow, wide = (continuation.new_trainer(folders("qwen3-tied"), each) for each in (torch.bfloat16, torch.float32))
    calls = six_calls()
    for trainer in (narrow, wide):
        trainer.add("m", SPECS["all"])
    continuation.train(narrow, "m", calls[:3])
    narrow.save("m", tmp_path, optimizer=True)
    wide.load("m", tmp_path, optimizer=True)
    ours, theirs = wide._models["m"], narrow._models["m"]
    assert ours.optimizer.step_count == theirs.optimizer.step_count == 3
    assert torch.equal(ours.weights.weights, theirs.weights.weights)
    assert not torch.equal(theirs.weights.weights, theirs.weights.weights.bfloat16().float())
    continuation.train(wide, "m", calls[3:4])
    assert ours.optimizer.step_count == 4


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
    files = ["adapter_config.json", "adapter_model.safetensors", "base.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 32.0, trainer._model.folder)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    prefix = "base_model.model.model."
    assert shapes[f"{prefix}layers.1.self_attn.q_proj.lora_A.weight"] == [8, 32]
    assert shapes[f"{prefix}layers.1.self_attn.q_proj.lora_B.weight"] == [64, 8]
    assert shapes[f"{prefix}layers.0.mlp.down_proj.lora_A.weight"] == [8, 64]
    assert shapes["base_model.model.lm_head.lora_B.weight"] == [97, 8]
    assert len(shapes) == 2 * (2 * 7 + 1)


OF_PEFT = [("qwen3-tied", SPECS["all"]), ("qwen3-untied", SPECS["unembedding"])]
OF_PEFT += [(family, spec) for family in MIXTURES for spec in (SPECS["all"], SPECS["mlp"])]
OF_PEFT += [(family, SPECS["all"]) for family in ("gemma3", "qwen3.5", "qwen3-next-moe", "qwen3.5-moe")]


@pytest.mark.parametrize(("family", "spec"), OF_PEFT)
def test_peft_loads_a_saved_adapter(
    family: str, spec: ModelSpec, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    trainer = new_trainer(family)
    add(trainer, "m", spec)
    trainer.save("m", tmp_path, optimizer=False)
    [datum] = data_of(1, (11,))
    call = as_call([datum], forward_only=True)
    [ours] = outputs(trainer, ModelCall("m", call))
    module = PeftModel.from_pretrained(full_module(folders(family)), tmp_path).eval()
    np.testing.assert_allclose(ours.logprobs_M, logprobs(module, datum).detach().numpy(), atol=1e-5)
    trainer.add("again", spec)
    trainer.load("again", tmp_path, optimizer=False)
    [again] = outputs(trainer, ModelCall("again", call))
    np.testing.assert_array_equal(again.logprobs_M, ours.logprobs_M)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-untied", *BEYOND_LLAMA])
def test_transformers_loads_a_saved_full_model(family: str, new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer(family)
    trainer.add("m", FULL)
    run(trainer, "m", 0)
    trainer.save("m", tmp_path, optimizer=True)
    [datum] = data_of(1, (11,))
    call = as_call([datum], forward_only=True)
    [ours] = outputs(trainer, ModelCall("m", call))
    module = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    np.testing.assert_allclose(ours.logprobs_M, logprobs(module, datum).detach().numpy(), atol=1e-5)
    trainer.add("again", FULL)
    trainer.load("again", tmp_path, optimizer=True)
    [again] = outputs(trainer, ModelCall("again", call))
    np.testing.assert_array_equal(again.logprobs_M, ours.logprobs_M)


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
        (ModelSpec(rank=4, seed=1), r"model: it has rank=8, not 4; create_training_client_from_state"),
        (ModelSpec(rank=8, seed=1, alpha=16.0), r"alpha=32\.0, not 16"),
        (ModelSpec(rank=8, seed=1, train_mlp=False), "train_mlp=True, not False"),
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


def adapter_of_peft(folder: Path, into: Path, **settings: Any) -> Any:
    """Trains an adapter for a step with PEFT, and saves it with PEFT."""
    options = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} | settings
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    module = get_peft_model(module, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for number, parameter in enumerate(lora_parameters(module).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(into)
    return module


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "attention": (ATTENTION, ModelSpec(rank=4, seed=0, train_mlp=False, train_unembed=False)),
    "two modules of seven": (["q_proj", "down_proj"], ModelSpec(rank=4, seed=0, train_unembed=False)),
    "every linear layer": ("all-linear", ModelSpec(rank=4, seed=0, train_unembed=False)),
    "attention and head": ([*ATTENTION, "lm_head"], ModelSpec(rank=4, seed=0, train_mlp=False)),
}


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_of_peft_goes_on_as_it_would_with_peft(
    name: str, new_trainer: NewTrainer, folders: Folders, tmp_path: Path
) -> None:
    targets, spec = TARGETS[name]
    module = adapter_of_peft(folders("qwen3-untied"), tmp_path, target_modules=targets)
    trainer = new_trainer("qwen3-untied")
    trainer.add("m", spec)
    trainer.load("m", tmp_path, optimizer=False)
    rng = np.random.default_rng(1)
    data = [random_datum(rng, 11), random_datum(rng, 5)]
    loaded = load_weights(trainer._model, tmp_path)
    assert isinstance(loaded, LoraWeights)
    assert torch.equal(loaded.adapter.weights, trainer._models["m"].weights.weights)
    params = AdamParams(learning_rate=0.003, eps=1e-8, weight_decay=0.1)
    [ours] = trainer.forward_backward([ModelCall("m", as_call(data))])
    theirs = torch.cat([logprobs(module, datum).detach() for datum in data])
    np.testing.assert_allclose(ours.logprobs_M, theirs.numpy(), atol=1e-5)
    trainer.optim_step("m", params)
    parameters = lora_parameters(module)
    train_elsewhere(module, parameters, [data], params)
    adapter = trainer._models["m"].weights
    for tensor_name, tensor in adapter.layout.named_views(adapter.weights).items():
        expected = parameters[tensor_name] if tensor_name in parameters else torch.zeros_like(tensor)
        torch.testing.assert_close(tensor, expected.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"use_rslora": True}, "use_rslora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"layers_pattern": "layers"}, "layers_pattern is 'layers'"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "'pissa', which also changes the base"),
        ({"peft_type": "LOHA"}, "'LOHA'; only 'LORA'"),
        ({"invented_later": 3}, "invented_later is 3"),
        ({"r": 0}, "must be positive"),
    ],
)
def test_an_adapter_that_computes_what_we_do_not_is_refused(
    changes: dict[str, Any], complaint: str, new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer()
    trainer.add("m", SPECS["attention"])
    trainer.save("m", tmp_path, optimizer=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    warm(trainer._models["m"].weights)
    before = trainer._models["m"].weights.weights.clone()
    for load in (lambda: trainer.load("m", tmp_path, optimizer=False), lambda: load_weights(trainer._model, tmp_path)):
        with pytest.raises(UserError, match=complaint):
            load()
    assert torch.equal(trainer._models["m"].weights.weights, before)


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


def name_experts_as_the_hosted_service(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(".mlp.gate_proj.", ".mlp.experts.w1."): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


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
        (name_experts_as_the_hosted_service, "w1 and w3.*hosted"),
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


@KINDS
def test_a_gradient_for_which_there_is_no_memory_leaves_the_model_as_it_was(
    spec: ModelSpec, new_trainer: NewTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer()
    for model_id in ("m", "other"):
        trainer.add(model_id, spec)
    run(trainer, "m", 0)
    run(trainer, "m", 1, step=False)
    trainer.save("m", tmp_path, optimizer=True, gradient=True)
    other = trainer._models["other"]
    before = other.weights.weights.clone()

    def no_memory() -> torch.Tensor:
        raise torch.OutOfMemoryError("no room for a gradient")

    monkeypatch.setattr(other.weights, "require_grad", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.load("other", tmp_path, optimizer=True, gradient=True)
    assert torch.equal(other.weights.weights, before)
    assert other.optimizer.step_count == 0 and not other.accumulated
