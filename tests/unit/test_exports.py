"""Exports and imports in the engine: files for readers elsewhere, encrypted if asked, and adapters from elsewhere."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest
from safetensors.torch import load_file, save_file

from tests.unit.test_engine import SESSION, Bench, lesson
from tinsmith.age import read_recipients
from tinsmith.errors import UserError
from tinsmith.store import records

PROMISED = {"rank": 4, "train_attn": True, "train_mlp": True, "train_unembed": True}
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN alice@example"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def export(bench: Bench, model_id: str, name: str = "out", **options: object) -> records.Checkpoint:
    path = f"tinker://{model_id}/external_weights/{name}"
    bench.result(bench.submit(model_id, "save_weights_external", {"name": name, "path": path, **options}))
    checkpoint = bench.database.read(records.find_checkpoint, path)
    assert checkpoint is not None
    return checkpoint


def trained(bench: Bench) -> str:
    model = bench.create("a")
    lesson(bench, model, range(2))
    return model


def test_an_export_names_the_base_as_its_client_does_and_tells_its_size(bench: Bench) -> None:
    model = trained(bench)
    bench.run()
    bench.database.write(records.update_model, model, base_name="Qwen/Qwen3-8B")
    path = f"tinker://{model}/external_weights/out"
    answer = json.loads(bench.result(bench.submit(model, "save_weights_external", {"name": "out", "path": path})))
    checkpoint = bench.database.read(records.find_checkpoint, path)
    assert checkpoint is not None
    assert answer == {"path": path, "size_bytes": checkpoint.size_bytes, "type": "save_weights_external"}
    config = json.loads((Path(checkpoint.folder) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("Qwen/Qwen3-8B", 4, 32)


def test_an_encrypted_export_is_for_its_recipients_alone(bench: Bench, tmp_path: Path) -> None:
    model = trained(bench)
    ours, theirs, stranger = (pyrage.x25519.Identity.generate() for _ in range(3))
    recipients = [str(ours.to_public()), str(theirs.to_public())]
    plain, sealed = export(bench, model, "plain"), export(bench, model, "sealed", age_encryption_recipients=recipients)
    files = sorted(path.name for path in Path(sealed.folder).iterdir())
    assert files == ["adapter_config.json.age", "adapter_model.safetensors.age", "manifest.json"]
    file = Path(sealed.folder) / "adapter_model.safetensors.age"
    for identity in (ours, theirs):
        pyrage.decrypt_file(str(file), str(tmp_path / "decrypted"), [identity])
        expected = (Path(plain.folder) / "adapter_model.safetensors").read_bytes()
        assert (tmp_path / "decrypted").read_bytes() == expected
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt_file(str(file), str(tmp_path / "stolen"), [stranger])


def test_ssh_keys_are_recipients_too(bench: Bench) -> None:
    assert len(read_recipients([SSH_KEY, f"  {pyrage.x25519.Identity.generate().to_public()}\n"])) == 2
    folder = Path(export(bench, trained(bench), age_encryption_recipients=[SSH_KEY]).folder)
    assert b"ssh-ed25519" in (folder / "adapter_config.json.age").read_bytes()[:200]


@pytest.mark.parametrize("kind", ["age1", "ssh-rsa AAAA", "someone", "", "secret"])
def test_what_is_no_recipient_is_refused_without_repeating_it(kind: str) -> None:
    text = str(pyrage.x25519.Identity.generate()) if kind == "secret" else kind
    with pytest.raises(UserError, match=r"recipients\[1\].*age1… keys") as refusal:
        read_recipients([SSH_KEY, text])
    assert len(text) < 20 or text not in str(refusal.value)


def test_an_encrypted_export_is_neither_loaded_nor_sampled(bench: Bench) -> None:
    model = trained(bench)
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    path = export(bench, model, age_encryption_recipients=[recipient]).path
    other = bench.record_model("b")
    load = bench.submit(other, "load_weights", {"path": path, "optimizer": False, "create": True})
    assert "encrypted to its recipients" in bench.error(load)
    sampler = bench.sampler("s", path, None)
    with pytest.raises(AssertionError, match="upload it again decrypted"):
        bench.greedy(sampler)


def test_an_export_is_trained_on_and_sampled_like_any_checkpoint(bench: Bench) -> None:
    model = trained(bench)
    path = export(bench, model).path
    other = bench.record_model("b")
    bench.result(bench.submit(other, "load_weights", {"path": path, "optimizer": False, "create": True}))
    assert (bench.logprobs(other) == bench.logprobs(model)).all()
    assert bench.greedy(bench.sampler("s", path, None)) == bench.greedy(bench.sampler("t", path, None))


def uploaded(bench: Bench, tmp_path: Path) -> tuple[Path, str]:
    """The folder of an adapter that came from elsewhere, and the model that it was."""
    model = trained(bench)
    folder = Path(shutil.copytree(export(bench, model).folder, tmp_path / "uploaded"))
    (folder / "manifest.json").unlink()
    return folder, model


def submit_import(bench: Bench, folder: Path, name: str = "in", **promised: object) -> str:
    model_id = bench.record_model(name, rank=1)
    path = f"tinker://{model_id}/external_weights/{name}"
    request = {"folder": str(folder), "name": name, "path": path, "promised": PROMISED | promised}
    return bench.submit(model_id, "import_weights", request)


def test_an_imported_adapter_is_a_checkpoint_of_a_closed_model(bench: Bench, tmp_path: Path) -> None:
    folder, model = uploaded(bench, tmp_path)
    path = json.loads(bench.result(submit_import(bench, folder)))["path"]
    imported = bench.database.read(records.find_model, f"{SESSION}:train:in")
    assert imported is not None
    assert (imported.state, imported.spec["rank"], imported.spec["alpha"]) == ("closed", 4, 32.0)
    checkpoint = bench.database.read(records.find_checkpoint, path)
    assert checkpoint is not None
    assert (checkpoint.kind, checkpoint.owner, checkpoint.spec) == ("external", "me", imported.spec)
    shutil.rmtree(folder)
    other = bench.record_model("b")
    bench.result(bench.submit(other, "load_weights", {"path": path, "optimizer": False, "create": True}))
    assert (bench.logprobs(other) == bench.logprobs(model)).all()
    assert len(bench.greedy(bench.sampler("s", path, None))) == 8


def spoil(folder: Path, changes: dict[str, object]) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("changes", "names", "promised", "complaint"),
    [
        ({"use_dora": True}, None, {}, "use_dora is True"),
        ({"use_rslora": True}, None, {}, "use_rslora is True"),
        ({"r": 8}, None, {"rank": 8}, "has shape"),
        ({}, None, {"rank": 8}, "has rank 4; its upload was started for rank 8"),
        ({}, None, {"train_mlp": False}, "train_mlp=false"),
        ({}, ("q_proj", "query"), {}, r"does not fit this model: missing \['base_model"),
        ({}, ("layers.0.", "layers.70."), {}, r"not expected \['base_model.model.model.layers.70"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    bench: Bench,
    tmp_path: Path,
    changes: dict[str, object],
    names: tuple[str, str] | None,
    promised: dict[str, object],
    complaint: str,
) -> None:
    folder, _ = uploaded(bench, tmp_path)
    spoil(folder, changes)
    if names:
        rename(folder, *names)
    before = sorted((bench.folder / "checkpoints").rglob("*"))
    with pytest.raises(UserError, match=complaint):
        raise UserError(bench.error(submit_import(bench, folder, **promised)))
    assert sorted((bench.folder / "checkpoints").rglob("*")) == before
    imported = bench.database.read(records.find_model, f"{SESSION}:train:in")
    assert imported is not None and imported.state == "failed"


def test_an_adapter_that_was_widened_to_fit_keeps_its_promise(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = uploaded(bench, tmp_path)
    (folder / "adopted").mkdir()  # by an engine that died
    trainer = bench.engine._trainer
    monkeypatch.setattr(trainer, "adopt", lambda given, spare: Path(shutil.copytree(given, spare)))
    bench.result(submit_import(bench, folder, rank=2))
    assert "started for rank 4" in bench.error(submit_import(bench, folder, "again", rank=4))


def test_an_import_that_an_engine_died_of_runs_again(bench: Bench, tmp_path: Path) -> None:
    folder, _ = uploaded(bench, tmp_path)
    request = submit_import(bench, folder)
    bench.engine._claim()
    bench.new_engine()
    assert json.loads(bench.result(request))["path"].endswith("/external_weights/in")
