"""Adds an adapter into its base's weights: an ordinary Hugging Face model, which needs no adapter any more.

The sum is computed in fp32 and rounded once, to the dtype of the files. What was written is loaded again and compared
with the adapter on its base before it counts. Knows nothing of checkpoints' paths or of servers.

Shapes: `I` inputs, `O` outputs, `E` experts, `M` targets of the probe.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.models.experts import expert_pair
from tinsmith.models.families import Target, find_targets
from tinsmith.models.loading import adapter_layout, input_groups, load_base, text_part
from tinsmith.models.probes import packed_logprobs, plain_logprobs, probe_prompts
from tinsmith.models.weights import (
    ADAPTER_CONFIG,
    MODEL_FILE,
    LoraWeights,
    adapter_spec,
    load_weights,
    read_adapter,
)

COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "generation_config.json", "*processor_config.json", "LICENSE*"),
)
"""What belongs to a model beside its weights and config.json: patterns of file names."""

EXACT = 1e-4
"""Largest mean |difference of logprobs| that fp32 arithmetic in another order may leave."""

_MOST = 0.15  # on average, whatever the adapter does: a router's choice between equals turns on the last bit
_SHARE = 0.5  # of what the adapter changes; if rounding undoes more, the merged model is not that adapter's


class NotTheSameError(TinsmithError):
    """The merged model does not compute what the adapter does."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written, and how far it is from the adapter on its base: |difference of logprobs| over the probe.

    `effect` is the adapter's own mean |difference| from the base model. All of it is computed in fp32.
    """

    dtype: str
    parameters: int
    untied: bool
    mean_difference: float
    largest_difference: float
    effect: float


def merge(
    base: Path, weights: Path, out: Path, dtype: torch.dtype | None, on_progress: Callable[[str], None]
) -> Merged:
    """Writes the model of a base folder with the weights of a checkpoint's folder into the empty folder `out`.

    `weights` is an adapter, or all weights of a full-parameter model. Without a `dtype` the files have the base's own.
    Needs about 4 bytes of memory for each parameter. Raises ConfigError, UserError, NotTheSameError.
    """
    if "quantization_config" in _config(base):
        raise ConfigError(f"{base} is quantized; merging needs weights in float32, bfloat16 or float16")
    prompts, expected_M, effect = _expected(base, weights, on_progress)
    on_progress("merging")
    module = _load(base, dtype or "auto")
    untied = _merge(module, weights)
    on_progress("writing")
    module.save_pretrained(out, max_shard_size="4GB")
    copy_companions(base, out)
    written, parameters = str(module.dtype).removeprefix("torch."), module.num_parameters()
    del module
    on_progress("loading what was written, and comparing")
    differences_M = (plain_logprobs(_load(out, torch.float32), prompts) - expected_M).abs()
    report = Merged(written, parameters, untied, differences_M.mean().item(), differences_M.max().item(), effect)
    _check(report)
    return report


def copy_companions(base: Path, out: Path) -> None:
    """Copies tokenizer, chat template and the like from a model's folder; what is there already stays."""
    for pattern in COMPANIONS:
        for file in sorted(base.glob(pattern)):
            if file.is_file() and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)


def _expected(base: Path, weights: Path, on_progress: Callable[[str], None]) -> tuple[list[Tensor], Tensor, float]:
    """The probe, its logprobs [M] with the adapter on its base, and how far these are from the base's, on average."""
    device = torch.device("cpu")
    model = load_base(base, dtype=torch.float32, device=device, on_progress=on_progress, quick=False)
    prompts = probe_prompts(model.vocab_size, model.device)
    loaded = load_weights(model, weights)
    if isinstance(loaded, LoraWeights):
        expected_M = packed_logprobs(model, prompts, loaded.adapter)
    else:
        expected_M = packed_logprobs(model, prompts, module=loaded.module)
    return prompts, expected_M, (packed_logprobs(model, prompts) - expected_M).abs().mean().item()


def _load(folder: Path, dtype: torch.dtype | str) -> Any:
    """The model of a folder as it was saved, with whatever else it consists of beside its text part."""
    (name, *_) = _config(folder).get("architectures") or [""]
    own: Any = getattr(transformers, name, None)
    is_model = isinstance(own, type) and issubclass(own, PreTrainedModel)
    module: Any = (own if is_model else AutoModelForCausalLM).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True, use_safetensors=True
    )
    return module.eval().requires_grad_(False)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a model from {folder}: its config.json is missing or no JSON") from error


def _merge(module: Any, weights: Path) -> bool:
    """Changes the module's weights to those of the checkpoint; whether the head was tied to the embedding before."""
    text = text_part(module)
    if not (weights / ADAPTER_CONFIG).exists():
        _replace_all(text, weights / MODEL_FILE)
        return False
    targets = find_targets(text)
    spec = adapter_spec(weights)
    layout = adapter_layout(targets, input_groups(text, targets), spec)
    flat = read_adapter(weights, layout)
    untied = spec.train_unembed and _untie(module, text)
    for index, target in enumerate(targets):
        factors = layout.factors(flat, (index,))
        if factors is not None:
            _add(text, target, factors.pair, spec.alpha / spec.rank)
    return untied


@torch.no_grad()
def _add(text: Any, target: Target, pair: tuple[Tensor, Tensor], scale: float) -> None:
    weight = target.weight(text)
    if not target.experts:
        matrix_a, matrix_b = pair
        weight.copy_(torch.addmm(weight.float(), matrix_b, matrix_a, alpha=scale))
        return
    factors: Any = expert_pair(pair, target.experts)
    weight_EIO = weight if text.get_submodule(target.path.rpartition(".")[0]).is_transposed else weight.transpose(1, 2)
    for weight_IO, a_IR, b_RO in zip(weight_EIO, factors.a_EIR, factors.b_ERO, strict=True):
        weight_IO.copy_(torch.addmm(weight_IO.float(), a_IR, b_RO, alpha=scale))


def _untie(module: Any, text: Any) -> bool:
    """Gives the head weights of its own, if it shares the embedding's: an adapter of the head changes it alone."""
    head = text.get_output_embeddings()
    if head.weight is not text.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (module.config, module.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


@torch.no_grad()
def _replace_all(text: Any, file: Path) -> None:
    """Copies all weights of a full-parameter model; `load_weights` has checked that they fit."""
    own = {**dict(text.named_parameters()), **dict(text.named_buffers())}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            own[name].copy_(stored.get_tensor(name))


def _check(report: Merged) -> None:
    """Raises NotTheSameError if the merged model is further from the adapter than rounding explains, or allows."""
    allowed = EXACT if report.dtype == "float32" else min(_MOST, max(EXACT, _SHARE * report.effect))
    if not report.mean_difference <= allowed:
        raise NotTheSameError(
            f"the merged model's logprobs differ by {report.mean_difference:.3g} on average from the adapter's, which "
            f"differ by {report.effect:.3g} from the base model's; {allowed:.3g} is allowed. {_advice(report)}"
        )


def _advice(report: Merged) -> str:
    if report.dtype == "float32":
        return "Nothing was written"
    return f"Rounding to {report.dtype} hides what was trained; write float32, or export the adapter as it is"
