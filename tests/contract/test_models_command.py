"""`tinsmith models`: what is checked before a server knows a model by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.store import makers
from tinsmith import serve
from tinsmith.cli import app
from tinsmith.config import Settings
from tinsmith.demo import tiny_folder
from tinsmith.errors import ConfigError, NotFoundError, UserError
from tinsmith.store import records
from tinsmith.store.database import Database

Change = Callable[[Path], None]


def tinsmith(*arguments: str) -> str:
    """What it prints; its error is raised."""
    result = CliRunner().invoke(app, ["models", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def copy_of_tiny(folder: Path, **configuration: object) -> Path:
    shutil.copytree(tiny_folder(), folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | configuration))
    return folder


def test_an_added_model_is_listed_and_served_until_it_is_removed(tmp_path: Path) -> None:
    folder, data = copy_of_tiny(tmp_path / "second"), str(tmp_path / "data")
    printed = tinsmith("add", str(folder), "--dtype", "bfloat16", "--max-context", "512", "--data-dir", data)
    assert "second: Qwen3ForCausalLM, 1.8" in printed
    tinsmith("add", "tiny", "--name", "embedded", "--data-dir", data)
    listed = json.loads(tinsmith("list", "--json", "--data-dir", data))["registered"]
    assert [(row["name"], row["base"], row["dtype"], row["max_context"]) for row in listed] == [
        ("second", str(folder), "bfloat16", 512),
        ("embedded", "tiny", "auto", 0),
    ]
    assert "second" in tinsmith("list", "--data-dir", data)
    served, _ = serve._look_up(Settings(data_dir=Path(data)))
    assert [(model.name, model.base, model.dtype) for model in served] == [
        ("second", str(folder), "bfloat16"),
        ("embedded", "tiny", "auto"),
    ]
    assert "removed second" in tinsmith("remove", "second", "--data-dir", data)
    assert folder.is_dir()
    with pytest.raises(NotFoundError, match="second"):
        tinsmith("remove", "second", "--data-dir", data)


def test_a_model_with_checkpoints_is_removed_only_by_force(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tinsmith("add", "tiny", "--data-dir", str(data))
    database = Database(Settings(data_dir=data).effective_database_url)
    database.write(makers.make_model, "m")
    checkpoint = records.Checkpoint(
        "tinker://m/weights/x", "m", "training", "x", "alice", "tiny", "tiny", {}, "/f", 1, False, {}, 1.0, None
    )
    database.write(records.create_checkpoint, checkpoint)
    database.close()
    with pytest.raises(UserError, match=r"1 checkpoints.*--force"):
        tinsmith("remove", "tiny", "--data-dir", str(data))
    assert "removed tiny" in tinsmith("remove", "tiny", "--force", "--data-dir", str(data))


def remove(pattern: str) -> Change:
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def replace_weights_by_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_the_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (remove("config.json"), "no config.json"),
        (remove("*.safetensors"), "no weights at all"),
        (replace_weights_by_a_pickle, r"only pytorch_model\.bin.*safetensors files only"),
        (cut_the_weights, "no complete safetensors file"),
        (remove("tokenizer*"), "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_by_what_it_lacks(
    tmp_path: Path, change: Change, complaint: str
) -> None:
    change(copy_of_tiny(tmp_path / "model"))
    with pytest.raises(ConfigError, match=complaint):
        tinsmith("add", str(tmp_path / "model"), "--data-dir", str(tmp_path))


REMOTE = {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}


@pytest.mark.parametrize(
    ("configuration", "complaint"),
    [
        ({"model_type": "mystery"}, "mystery"),
        ({"model_type": "t5"}, "T5Config"),
        ({"model_type": "gpt2", "n_embd": 64, "n_head": 2}, "no list of decoder layers"),
        (REMOTE, "code of its own, which is not run.*--trust-remote-code"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_reason_and_its_code_is_not_run(
    tmp_path: Path, configuration: dict[str, object], complaint: str
) -> None:
    folder = copy_of_tiny(tmp_path / "model", **configuration)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\nraise ValueError('unfit code')")
    with pytest.raises(ConfigError, match=complaint):
        tinsmith("add", str(folder), "--data-dir", str(tmp_path))
    assert not (tmp_path / "it-ran").exists()


def test_code_that_comes_with_a_model_runs_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = copy_of_tiny(tmp_path / "model", **REMOTE)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\nraise ValueError('unfit code')")
    with pytest.raises(ConfigError, match="unfit code"):
        tinsmith("add", str(folder), "--trust-remote-code", "--data-dir", str(tmp_path))
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max-context", "5000"], "4096 tokens at most"),
        (["--dtype", "fp8"], "float32, bfloat16"),
        (["--name", "a=b"], "'a=b'"),
        (["--name", "*"], "another --name"),
    ],
)
def test_what_a_model_cannot_be_is_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tinsmith("add", "tiny", *arguments, "--data-dir", str(tmp_path))


def test_a_name_that_is_neither_a_folder_nor_to_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nobody/nothing' is no folder here"):
        tinsmith("add", "nobody/nothing", "--data-dir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"folder nothing of model '\./nothing' does not exist"):
        tinsmith("add", "./nothing", "--data-dir", str(tmp_path))
