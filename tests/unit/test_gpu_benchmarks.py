"""What the GPU benchmarks consist of, as far as that needs no GPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import rival_vllm, rl_step_gpu, sampling_gpu
from benchmarks.recording import Row
from benchmarks.sampling_profile import Step, summary, write_profile
from benchmarks.workloads import CASES, LONGEST, QWEN3_4B, Load, sampled_tokens
from tinsmith.demo import tiny_folder
from tinsmith.models.loading import load_base
from tinsmith.sampling.sampler import TorchSampler

LOAD = Load(1000, adapters=8, seed=1)


def test_loads_are_as_large_as_they_say_and_no_request_is_longer_than_the_longest() -> None:
    tokens = {name: sampled_tokens(make(LOAD)) for name, make in CASES.items()}
    assert tokens["sampling"] == 256 * 512
    assert tokens["groups"] == tokens["rollouts"] == 64 * 16 * 256
    assert max(len(asked.prompt) + asked.output for make in CASES.values() for asked in make(LOAD)) <= LONGEST
    assert {asked.adapter for asked in CASES["ragged"](LOAD)} == set(range(8))
    assert {asked.adapter for asked in CASES["rollouts"](LOAD)} == {0}
    assert {asked.adapter for asked in CASES["rollouts"](Load(1000, adapters=0, seed=1))} == {None}


def test_another_seed_is_another_prompt() -> None:
    prompts = {tuple(CASES["batch1"](Load(1000, 8, seed))[0].prompt) for seed in (1, 1, 2)}
    assert len(prompts) == 2


def test_the_best_of_the_rivals_results_stands_beside_the_row_of_that_name(tmp_path: Path) -> None:
    results = [("sampling", 10.0, 1000), ("sampling", 5.0, 1000), ("batch1", 2.0, 500), ("start", 40.0, 0)]
    said = [
        {"size": "4b", "mode": "lora", "case": case, "seconds": seconds, "tokens": tokens}
        for case, seconds, tokens in results
    ]
    (tmp_path / "log").write_text("noise\n" + "\n".join(f"RESULT {json.dumps(line)}" for line in said))
    values = sampling_gpu.rival_values([tmp_path / "log"])
    assert values == {"sampling 4b lora8": 200, "batch1 4b lora": 4.0}
    row = sampling_gpu.compared(Row("batch1 4b lora", 3.0, "ms/token"), values)
    assert (row.rival, row.goal) == ("4", "3.5")
    assert sampling_gpu.compared(Row("ragged 4b lora8", 1, "tokens/s"), {"ragged 4b lora8": 1000}).goal == "1200"
    assert sampling_gpu.compared(Row("groups 4b base", 1, "tokens/s"), values).rival == ""


def test_the_rivals_adapter_has_the_size_of_ours() -> None:
    from benchmarks.qwen3 import random_base
    from tinsmith.protocols import ModelSpec

    tiny = rival_vllm.Sizes(32, 2, 64, 97, heads=4, kv_heads=2, head_dim=16)
    ours = random_base(tiny, torch.float32, torch.device("cpu")).layout(ModelSpec(4, 0, train_unembed=False))
    theirs = sum(4 * sum(shape) for shape in rival_vllm.linears(tiny).values()) * tiny.layers
    assert theirs == sum(np.prod(shape) for shape in ours.shapes)
    assert rival_vllm.config_of(QWEN3_4B)["hidden_size"] == 2560


def test_steps_are_added_up_by_kind_and_by_how_many_ran() -> None:
    steps = [Step(1.0, 64, 0, 1), Step(0.5, 0, 8, 8), Step(0.25, 0, 8, 9), Step(2.0, 32, 4, 8)]
    rows = [line.split() for line in summary(steps)[1:]]
    assert rows == [
        ["prompts", "and", "tokens", "16", "1", "2.00", "32", "4", "2000.00"],
        ["prompts", "only", "2", "1", "1.00", "64", "0", "1000.00"],
        ["tokens", "only", "16", "2", "0.75", "0", "16", "375.00"],
    ]


def test_a_profile_shows_the_kernels_of_each_kind_of_step(tmp_path: Path) -> None:
    model = load_base(tiny_folder(), dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda _: None)
    sampler = TorchSampler(model, AutoTokenizer.from_pretrained(tiny_folder()), kv_tokens=4096, max_running=4)
    calls = sampling_gpu.calls_of(Load(1000, adapters=0, seed=1).requests([(2100, 5), (20, 9)]))
    write_profile(sampler, calls, tmp_path / "profile.txt")
    text = (tmp_path / "profile.txt").read_text()
    assert sampler.load == 0
    assert "\ntokens only\n" in text
    assert "aten::" in text


def test_a_group_becomes_data_whose_advantages_cancel_out() -> None:
    data = rl_step_gpu.group_data([5, 6, 7], [([2, 4], [-0.5, -1.0]), ([1, 2], [-0.25, -2.0])])
    assert [datum.model_input.to_ints() for datum in data] == [[5, 6, 7, 2], [5, 6, 7, 1]]
    first, second = ({name: value.data for name, value in datum.loss_fn_inputs.items()} for datum in data)
    assert list(first["target_tokens"]) == [6, 7, 2, 4]
    assert list(first["logprobs"]) == [0, 0, -0.5, -1.0]
    assert list(first["advantages"]) == [0, 0, 0.25, 0.25]
    assert list(second["advantages"]) == [0, 0, -0.25, -0.25]


def test_the_rivals_step_is_the_sum_of_its_parts() -> None:
    step = rl_step_gpu.Seconds(publish=0.5, rollouts=10.0, data=0.5, train=20.0, sampled=1000, trained=5000)
    row = next(rl_step_gpu.step_rows("4b", step, (13.0, 26.0)))
    assert (row.value, row.rival, row.goal) == (31.0, "39.00", "30.0")
    assert next(rl_step_gpu.step_rows("4b", step, (13.0, 0))).rival == ""


def test_rivals_seconds_are_those_of_the_same_number_of_tokens(tmp_path: Path) -> None:
    step = rl_step_gpu.Seconds(0, 0, 0, 0, sampled=1000, trained=5000)
    line = {"size": "4b", "mode": "lora", "case": "rollouts", "seconds": 4.0, "tokens": 2000}
    (tmp_path / "sampling").write_text(f"RESULT {json.dumps(line)}\n")
    (tmp_path / "training").write_text("warnings\n[250.0, 96.1]\n")
    assert rl_step_gpu.rival_seconds("4b", step, [tmp_path / "sampling"], tmp_path / "training") == pytest.approx(
        (2, 20)
    )
    assert rl_step_gpu.rival_seconds("4b", step, [], None) == (0, 0)
