"""`tinsmith export`, run as a command on a server's data folder: adapters and models with all that belongs to them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.unit.test_engine import Bench, lesson
from tinsmith.cli import app
from tinsmith.demo import tiny_folder
from tinsmith.errors import ConfigError, NotFoundError, UserError
from tinsmith.exporting import new_folder
from tinsmith.store import records

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "data").mkdir()
    bench = Bench(tmp_path / "data")
    yield bench
    bench.close()


def saved(bench: Bench, kind: str = "weights", rank: int = 4, **options: object) -> tuple[str, str]:
    """A trained model and the path of its checkpoint."""
    model = bench.create("a", rank)
    lesson(bench, model, range(3))
    path = f"tinker://{model}/{kind}/out"
    job = {"weights": "save_weights", "external_weights": "save_weights_external"}[kind]
    bench.result(bench.submit(model, job, {"name": "out", "path": path, **options}))
    return model, path


def tinsmith(bench: Bench, *arguments: object) -> str:
    """What the command says; what it raises is raised."""
    database = ["--database-url", f"sqlite:///{bench.folder / 'db.sqlite'}"]
    result = CliRunner().invoke(app, ["export", *map(str, arguments), *database])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def logprobs(module: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        scores = module(input_ids=TOKENS[:, :-1]).logits[0].float().log_softmax(-1)
    return scores.gather(1, TOKENS[0, 1:, None])[:, 0].tolist()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


TOKENIZER = {path.name for path in tiny_folder().glob("*tokenizer*")}


def test_an_exported_adapter_is_complete_and_peft_computes_with_it_what_we_do(bench: Bench, tmp_path: Path) -> None:
    model, path = saved(bench)
    tinsmith(bench, path, tmp_path / "out")
    assert TOKENIZER
    assert files(tmp_path / "out") >= {"adapter_config.json", "adapter_model.safetensors", "README.md"} | TOKENIZER
    module = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(module, tmp_path / "out").eval()
    assert logprobs(adapted) == pytest.approx(bench.logprobs(model).tolist(), abs=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert path in card and "base_model:" not in card


@pytest.mark.parametrize("rank", [4, 0])
def test_a_merged_model_is_complete_and_verified(bench: Bench, tmp_path: Path, rank: int) -> None:
    model, path = saved(bench, rank=rank)
    said = tinsmith(bench, path, tmp_path / "out", "--merged", "--dtype", "float32")
    assert "M parameters in float32; compared with what was trained: mean" in said
    assert files(tmp_path / "out") >= {"config.json", "model.safetensors", "README.md"} | TOKENIZER
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert logprobs(module) == pytest.approx(bench.logprobs(model).tolist(), abs=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(TOKENS[0])
    assert "mean |difference of logprobs|" in (tmp_path / "out" / "README.md").read_text()


def test_a_merged_model_has_the_bases_dtype_unless_told_otherwise(bench: Bench, tmp_path: Path) -> None:
    _, path = saved(bench)
    assert "in bfloat16" in tinsmith(bench, path, tmp_path / "out", "--merged")


def test_an_adapter_that_was_downloaded_is_exported_too(bench: Bench, tmp_path: Path) -> None:
    model, path = saved(bench)
    tinsmith(bench, path, tmp_path / "adapter", "--base", tiny_folder())
    tinsmith(bench, tmp_path / "adapter", tmp_path / "out", "--merged", "--dtype", "float32")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert logprobs(module) == pytest.approx(bench.logprobs(model).tolist(), abs=1e-4)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    model, sealed = saved(bench, "external_weights", age_encryption_recipients=[recipient])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    before = files(tmp_path)
    refused = [
        ((sealed, "out"), UserError, "encrypted"),
        ((f"tinker://{model}/weights/none", "out"), NotFoundError, "has no checkpoint"),
        ((tmp_path / "full", "out"), ConfigError, "no adapter"),
        ((sealed, "full", "--form", "gguf"), ConfigError, "peft, vllm"),
        ((sealed, "out", "--merged", "--form", "vllm"), ConfigError, "a merged model has none"),
        ((sealed, "out", "--dtype", "float32"), ConfigError, "of a merged model"),
    ]
    for (checkpoint, out, *options), error, complaint in refused:
        with pytest.raises(error, match=complaint):
            tinsmith(bench, checkpoint, tmp_path / out, *options)
    path = f"tinker://{model}/weights/plain"
    bench.result(bench.submit(model, "save_weights", {"name": "plain", "path": path}))
    with pytest.raises(ConfigError, match="exists already"):
        tinsmith(bench, path, tmp_path / "full")
    with pytest.raises(UserError, match="vLLM cannot apply this adapter of the LM head"):
        tinsmith(bench, path, tmp_path / "out", "--form", "vllm")
    assert files(tmp_path) == before


def test_a_full_model_is_no_adapter(bench: Bench, tmp_path: Path) -> None:
    _, path = saved(bench, rank=0)
    with pytest.raises(UserError, match="export it with --merged"):
        tinsmith(bench, path, tmp_path / "out")


def fill_half(out: Path) -> None:
    with new_folder(out) as draft:
        (draft / "file").write_text("half")
        assert not out.exists()
        raise RuntimeError("halfway")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"):
        fill_half(tmp_path / "a" / "out")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with new_folder(tmp_path / name) as draft:
            (draft / "file").write_text("whole")
        assert files(tmp_path / name) == {"file"}


def test_a_model_card_names_a_base_that_the_hub_knows(bench: Bench, tmp_path: Path) -> None:
    _, path = saved(bench)
    bench.database.write(records.update_checkpoint, path, base_name="Qwen/Qwen3-8B")
    tinsmith(bench, path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: Qwen/Qwen3-8B\nbase_model_relation: adapter\n" in card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-8B"
