"""Weights out of a server's data folder: an adapter for PEFT or vLLM, or a merged model, with all that belongs to it.

What is written is complete or not there: it is filled in a folder beside its place and renamed into it.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.engine.exports import readable_folder
from tinsmith.errors import ConfigError, UserError
from tinsmith.manifests import sync
from tinsmith.model_files import model_folder
from tinsmith.served import Served, base_of

if TYPE_CHECKING:
    from tinsmith.models.merging import Merged

FORMS = ("peft", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")

Report = Callable[[str], None]

_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Weights to be exported: their folder, what they are of, and where they are from, for the model card."""

    folder: Path
    base: Served
    base_name: str
    origin: str

    @property
    def is_adapter(self) -> bool:
        return (self.folder / _CONFIG).exists()


def checkpoint_source(path: str, folder: str, base: Served, base_name: str) -> Source:
    """A checkpoint of a server's. Raises UserError if it is encrypted, DamagedCheckpointError."""
    return Source(readable_folder(folder, path), base, base_name, path)


def folder_source(folder: Path, base: str | None) -> Source:
    """An adapter's folder, downloaded perhaps; its base, unless given, is the one that it names. Raises ConfigError."""
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"{folder} is no adapter: it has no {_CONFIG}; give its folder, or a tinker:// path")
    named = base or json.loads((folder / _CONFIG).read_text()).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{folder} does not say of which base model it is; give it with --base")
    return Source(folder, Served(named, base_of(named)), named, folder.name)


def export_adapter(source: Source, out: Path, form: str, report: Report) -> None:
    """Writes an adapter into the new folder `out`. Raises UserError if the form cannot express it."""
    from tinsmith.models.adapter_forms import write_peft, write_vllm
    from tinsmith.models.merging import copy_companions

    if not source.is_adapter:
        raise UserError(f"{source.origin} is a full-parameter model, no adapter; export it with --merged")
    base = model_folder(source.base, report)
    with new_folder(out) as draft:
        if form == "vllm":
            write_vllm(source.folder, draft, source.base_name, json.loads((base / "config.json").read_text()))
        else:
            write_peft(source.folder, draft, source.base_name)
        copy_companions(base, draft)
        (draft / "README.md").write_text(_adapter_card(source, draft, form))


def export_merged(source: Source, out: Path, dtype: str, report: Report) -> "Merged":
    """Writes a whole model into the new folder `out`, verified. Raises NotTheSameError, UserError, ConfigError."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tinsmith.models.merging import merge

    disable_progress_bar()  # type: ignore[no-untyped-call]  # `report` says how it goes

    base = model_folder(source.base, report)
    with new_folder(out) as draft:
        merged = merge(base, source.folder, draft, None if dtype == "auto" else getattr(torch, dtype), report)
        (draft / "README.md").write_text(_model_card(source, merged))
    return merged


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder to be filled, which then appears at `out`, whole; nothing does if filling it fails.

    Raises ConfigError if `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.{secrets.token_hex(4)}.part"
    draft.mkdir()
    try:
        yield draft
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _adapter_card(source: Source, folder: Path, form: str) -> str:
    config = json.loads((folder / _CONFIG).read_text())
    lines = [
        *_front_matter(source, "peft", "adapter", ("tinker", "tinsmith", "lora")),
        "# LoRA adapter",
        "",
        f"- Base model: `{source.base_name}`",
        f"- Rank {config['r']}, alpha {config['lora_alpha']}",
        f"- From `{source.origin}`",
        "",
    ]
    return "\n".join([*lines, *_usage(form, config["r"]), ""])


def _usage(form: str, rank: int) -> list[str]:
    from tinsmith.models.adapter_forms import vllm_rank

    if form == "vllm":
        served = f"vllm serve BASE --enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules NAME=FOLDER"
        return ["```sh", served, "```"]
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)",
        "```",
    ]


def _model_card(source: Source, merged: "Merged") -> str:
    kind = "a LoRA adapter merged into it" if source.is_adapter else "all parameters trained"
    lines = [
        *_front_matter(source, "transformers", "finetune", ("tinker", "tinsmith")),
        "# Fine-tuned model",
        "",
        f"- Base model: `{source.base_name}`, {kind}",
        f"- {merged.parameters / 1e6:,.1f} M parameters in {merged.dtype}",
        f"- From `{source.origin}`",
        f"- Compared after writing: mean |difference of logprobs| {merged.mean_difference:.2g} from what was trained, "
        f"which differs by {merged.effect:.2g} from the base model",
    ]
    if merged.untied:
        lines += ["- The head was trained, so it has weights of its own; in the base it shares the embedding's"]
    return "\n".join([*lines, ""])


def _front_matter(source: Source, library: str, relation: str, tags: tuple[str, ...]) -> list[str]:
    """What the Hugging Face hub reads of a card. A base that is only a folder has no name there."""
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if source.base_name.count("/") == 1:
        lines += [f"base_model: {source.base_name}", f"base_model_relation: {relation}"]
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]
