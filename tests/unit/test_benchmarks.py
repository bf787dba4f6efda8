"""The benchmarks run: tiny sizes, all kinds of rows; what they measure is no matter here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import adapters, sampling_cpu, training_memory
from benchmarks.training_memory import Problem
from benchmarks.workloads import Sizes

TINY = Sizes(32, 2, 64, 97, heads=4, kv_heads=2, head_dim=16)
BEST_OF = 2  # one pause of the machine makes no ratio that rounds to nothing
PROBLEM = Problem("cpu", tokens=48, vocabulary=97, hidden=32)

# transformers' own, while PEFT asks a module about its checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_adapters_are_compared_with_the_base_and_with_peft() -> None:
    batch = adapters.random_batch(8, 4, TINY.vocabulary, torch.device("cpu"))
    rows = adapters.measure(TINY, batch, torch.float32, rounds=BEST_OF)
    names = [row.name for row in rows]
    assert all(row.value > 0 for row in rows)
    assert "ours, 8 adapters of ranks 4 to 128: ratio to the frozen base" in names
    assert "PEFT, 8 adapters, mixed batch: best" in names


def test_every_side_of_the_adapters_comparison_computes_the_same_gradients(tmp_path: Path) -> None:
    """One adapter of ours, of PEFT's in turn, and in PEFT's mixed batch, from the same weights."""
    tokens_NL = adapters.random_batch(4, 5, TINY.vocabulary, torch.device("cpu"))
    model = adapters.load(adapters.write_model(tmp_path, TINY, torch.float32), torch.float32, tokens_NL.device)
    peft = adapters.peft_model(tmp_path, tokens_NL.device, torch.float32, 1)
    [ours] = adapters.new_adapters(model, [adapters.RANK])
    layout = ours.layout.named_views(ours.weights)
    theirs = {_our_name(name): value for name, value in peft.named_parameters() if "lora_" in name}
    for name, value in theirs.items():
        torch.nn.init.normal_(layout[name], std=0.1)
        value.data.copy_(layout[name])
    adapters.train_ours(model, [ours], tokens_NL)
    for train in (adapters.train_peft_in_turn, adapters.train_peft_mixed):
        for value in theirs.values():
            value.grad = None
        adapters.train_all(peft)
        train(peft, tokens_NL, 1)
        for name, gradient in ours.layout.named_views(ours.require_grad()).items():
            torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-3, rtol=1e-3)


def test_memory_of_the_loss_and_of_a_whole_step_is_measured() -> None:
    rows = training_memory.measure(PROBLEM, [32], 1, lambda problem: 1 + training_memory.resident_extra(problem))
    names = [row.name for row in rows]
    assert "loss, hidden 32, with an adapter on the head: memory, ours / plain" in names
    assert "whole step, gradient checkpointing on: extra memory" in names


@pytest.mark.parametrize("adapter", [False, True])
def test_both_sides_of_the_loss_compute_the_same(adapter: bool, tmp_path: Path) -> None:
    inputs = training_memory.loss_inputs(replace(PROBLEM, adapter=adapter), tmp_path)
    if inputs.adapter is not None:
        torch.nn.init.normal_(inputs.adapter.weights, std=0.1)
    gradients = []
    for loss in (training_memory.plain_loss, training_memory.our_loss):
        inputs.clear()
        loss(inputs)
        gradients.append(inputs.hidden_TD.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_sampling_is_compared_with_generate_for_every_number_of_requests(tmp_path: Path) -> None:
    shape = sampling_cpu.SHAPE | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    folder = sampling_cpu.write_model(tmp_path, shape)
    load = sampling_cpu.Load((1, 3), prompt=4, sampled=3, adapters=2, group=2, group_prompt=20)
    rows = {row.name: row for row in sampling_cpu.throughput(folder, "bfloat16", load, rounds=BEST_OF)}
    assert all(row.value > 0 for row in rows.values())
    assert rows["bfloat16, 1 requests: ours / generate"].goal == "1.5"
    assert "bfloat16, 3 requests: adapters / base" in rows
    assert "bfloat16, prompt of 20 tokens: first tokens of 2 samples / of one" in rows


def _our_name(parameter: str) -> str:
    return parameter.replace(".0.weight", ".weight").replace("model.lm_head", "model.model.unembed_tokens")
