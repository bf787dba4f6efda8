"""Many LoRA adapters trained in one batch: time of forward and backward over the frozen base, ours and PEFT's.

    python -m benchmarks.adapters [--device cpu|cuda] [--rounds N] [--threads N] [--sequences N] [--length N]

Qwen3's architecture with random weights; every side has the same model, tokens, targets and dtype. The frozen base's
backward computes the gradient of every linear layer's input, and of no weight. Adapters have rank 16 (one case: 4 to
128) on every linear layer, the head included; the batch is shared out evenly. The sides take turns; a ratio compares
best rounds with the best of our frozen base. PEFT trains several adapters one after the other (`set_adapter`), or in
one mixed batch (`adapter_names`), which it does in evaluation mode only.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.qwen3 import Case, choose_device, interleaved, load, write_model
from benchmarks.recording import Row, record
from benchmarks.workloads import QWEN3_0_6B, SMALL, Sizes
from tinsmith.models.attention import PackedAttention
from tinsmith.models.head import target_logprobs
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Adapter, Segment
from tinsmith.protocols import ModelSpec

RANK = 16
CROWDS = (1, 8, 64)
MIXED_RANKS = (4, 8, 8, 16, 16, 32, 64, 128)
GOAL = "1.35"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
BASE = "frozen base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    for name in ("sequences", "length", "hidden", "layers", "intermediate", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, help="0: as the device's default", default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype, accelerator = choose_device(arguments.device)
    sizes, sequences, length = (SMALL, 64, 32) if device.type == "cpu" else (QWEN3_0_6B, 16, 1024)
    given = {name: getattr(arguments, name) for name in ("hidden", "layers", "intermediate", "vocabulary")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value})
    batch = random_batch(arguments.sequences or sequences, arguments.length or length, sizes.vocabulary, device)
    record("adapters", measure(sizes, batch, dtype, arguments.rounds), accelerator)


def random_batch(sequences: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """Token numbers [sequences, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (sequences, length), generator=generator).to(device)


def measure(sizes: Sizes, tokens_NL: Tensor, dtype: torch.dtype, rounds: int) -> list[Row]:
    """All rows, for adapters that the batch has at least one sequence for."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name), sizes, dtype)
        cases = _our_cases(load(folder, dtype, tokens_NL.device), tokens_NL)
        cases |= _peft_cases(folder, tokens_NL, dtype)
    times = interleaved(cases, rounds)
    tokens = f"{tokens_NL.shape[0]} x {tokens_NL.shape[1]} tokens"
    return [Row(tokens, tokens_NL.numel(), "tokens"), *_rows(times)]


def _rows(times: dict[str, list[float]]) -> Iterator[Row]:
    base = min(times[BASE])
    for name, values in times.items():
        yield Row(f"{name}: best", round(min(values), 2), "ms")
        yield Row(f"{name}: median", round(median(values), 2), "ms")
        if name != BASE:
            goal = GOAL if name.startswith("ours") else ""
            yield Row(f"{name}: ratio to the frozen base", round(min(values) / base, 3), "times", goal=goal)


def _our_cases(model: BaseModel, tokens_NL: Tensor) -> dict[str, Case]:
    cases = {BASE: Case(partial(train_ours, model, [], tokens_NL))}
    for count in CROWDS:
        if count <= len(tokens_NL):
            name = f"ours, {count} adapter{'s' * (count > 1)} of rank {RANK}"
            cases[name] = Case(partial(train_ours, model, new_adapters(model, [RANK] * count), tokens_NL))
    if len(MIXED_RANKS) <= len(tokens_NL):
        name = f"ours, {len(MIXED_RANKS)} adapters of ranks {min(MIXED_RANKS)} to {max(MIXED_RANKS)}"
        cases[name] = Case(partial(train_ours, model, new_adapters(model, MIXED_RANKS), tokens_NL))
    return cases


def new_adapters(model: BaseModel, ranks: Sequence[int]) -> list[Adapter]:
    """Adapters on all linear layers, ready to train."""
    adapters = [model.new_adapter(ModelSpec(rank=rank, seed=seed)) for seed, rank in enumerate(ranks)]
    for adapter in adapters:
        adapter.require_grad()
    return adapters


def train_ours(model: BaseModel, adapters: Sequence[Adapter], tokens_NL: Tensor) -> None:
    """One packed forward and backward of everybody's sequences; without adapters, of the base."""
    count, length = tokens_NL.shape
    segments = [Segment(None, 0, count * length)]
    if adapters:
        parts = [(part * count // len(adapters)) * length for part in range(len(adapters) + 1)]
        segments = [Segment(*each) for each in zip(adapters, parts, parts[1:], strict=False)]
    positions_T = torch.arange(length, device=tokens_NL.device).repeat(count)
    attention = PackedAttention(range(0, count * length + 1, length))
    hidden_TD = model.hidden(tokens_NL.flatten(), positions_T, segments, attention)
    target_logprobs(model, hidden_TD, segments, None, _targets(tokens_NL).flatten()).sum().backward()


def _targets(tokens_NL: Tensor) -> Tensor:
    return tokens_NL.roll(-1, 1)


def _peft_cases(folder: Path, tokens_NL: Tensor, dtype: torch.dtype) -> dict[str, Case]:
    crowds = [count for count in CROWDS if count <= len(tokens_NL)]
    model = peft_model(folder, tokens_NL.device, dtype, crowds[-1])
    cases = {"transformers, frozen base": Case(partial(train_plain_base, model, tokens_NL))}
    for count in crowds:
        name = f"PEFT, {count} adapter{'s, one after the other' * (count > 1)}"
        cases[name] = Case(partial(train_peft_in_turn, model, tokens_NL, count))
        if count > 1:
            run = partial(train_peft_mixed, model, tokens_NL, count)
            cases[f"PEFT, {count} adapters, mixed batch"] = Case(run, prepare=partial(train_all, model))
    return cases


def peft_model(folder: Path, device: torch.device, dtype: torch.dtype, adapters: int) -> PeftModel:
    """Adapters "0", "1", … of the same kind as ours on transformers' own module."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=LINEARS, ensure_weight_tying=False)
    model: Any = get_peft_model(module, config, adapter_name="0", autocast_adapter_dtype=False)
    for index in range(1, adapters):
        model.add_adapter(str(index), config, autocast_adapter_dtype=False)
    return model


def train_plain_base(model: PeftModel, tokens_NL: Tensor) -> None:
    """The frozen module without adapters, as transformers runs it."""
    with model.disable_adapter():
        embedded_NLD = model.get_input_embeddings()(tokens_NL).requires_grad_(True)
        _backward(model(inputs_embeds=embedded_NLD, use_cache=False).logits, tokens_NL)


def train_peft_in_turn(model: PeftModel, tokens_NL: Tensor, adapters: int) -> None:
    """Every adapter's own forward and backward of its share of the batch."""
    model.train()
    for index, part_NL in enumerate(tokens_NL.tensor_split(adapters)):
        model.set_adapter(str(index))
        _backward(model(input_ids=part_NL, use_cache=False).logits, part_NL)


def train_peft_mixed(model: PeftModel, tokens_NL: Tensor, adapters: int) -> None:
    """One forward and backward of the whole batch, every row with its adapter."""
    names = [str(row * adapters // len(tokens_NL)) for row in range(len(tokens_NL))]
    _backward(model(input_ids=tokens_NL, adapter_names=names, use_cache=False).logits, tokens_NL)


def train_all(model: PeftModel) -> None:
    """Makes every adapter trainable at once, in evaluation mode."""
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _backward(logits_NLV: Tensor, tokens_NL: Tensor) -> None:
    logprobs_NLV = logits_NLV.float().log_softmax(-1)
    logprobs_NLV.gather(2, _targets(tokens_NL)[..., None]).sum().backward()


if __name__ == "__main__":
    main()
