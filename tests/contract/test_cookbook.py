"""The cookbook's recipes, unmodified, run to their ends against the tiny model and learn."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

from tests.contract.all_recipes import outcome_of, prepare
from tests.contract.cookbook import Cookbook, Metrics, opened_cookbook
from tests.contract.recipe_list import RECIPES
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

MODEL = "model_name=Qwen/Qwen3-8B-Base"


@pytest.fixture(scope="module")
def cookbook(server: LocalServer, workplace: Path) -> Iterator[Cookbook]:
    prepare(workplace)
    with opened_cookbook(workplace, server.client_environment()) as opened:
        yield opened


def column(metrics: Metrics, name: str) -> list[float]:
    return [entry[name] for entry in metrics if name in entry]


@pytest.mark.parametrize("rank", [32, 0])
def test_sl_loop_learns(cookbook: Cookbook, rank: int) -> None:
    settings = ["batch_size=8", "max_steps=10", "save_every=4", f"lora_rank={rank}", "learning_rate=1e-3"]
    losses = column(cookbook.run("sl_loop", f"sl-{rank}", MODEL, *settings), "train_mean_nll")
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("loss", ["stable_reinforce", "importance_sampling"])
def test_rl_loop_learns_sums(cookbook: Cookbook, loss: str) -> None:
    chosen = [] if loss == "stable_reinforce" else [f"loss_fn={loss}"]
    settings = ["batch_size=8", "group_size=8", "max_steps=15", "max_tokens=12", "learning_rate=1e-3"]
    rewards = column(cookbook.run("rl_loop", f"rl-{loss}", MODEL, *settings, *chosen), "reward/total")
    assert len(rewards) == 15
    assert mean(rewards[-5:]) >= mean(rewards[:5]) + 0.25


def test_rl_loop_trains_full_models(cookbook: Cookbook) -> None:
    settings = ["batch_size=2", "group_size=4", "max_steps=3", "max_tokens=8", "lora_rank=0", "save_every=2"]
    assert len(cookbook.run("rl_loop", "rl-full", MODEL, *settings)) == 3


def test_math_rl_runs_its_sums(cookbook: Cookbook) -> None:
    settings = ["env=arithmetic", "groups_per_batch=8", "group_size=4", "max_steps=3", "eval_every=0", "save_every=2"]
    metrics = cookbook.run("math_rl.train", "math", MODEL, *settings, "behavior_if_log_dir_exists=delete")
    assert column(metrics, "progress/batch") == [0, 1, 2]
    assert all(abs(difference) < 1e-4 for difference in column(metrics, "optim/kl_sample_train_v1"))


def test_chat_sl_resumes_where_it_was_interrupted(cookbook: Cookbook) -> None:
    settings = [MODEL, "batch_size=8", "learning_rate=1e-3", "save_every=2", "eval_every=2", "lr_schedule=constant"]
    cookbook.run("chat_sl.train", "chat", *settings, "max_steps=3")
    checkpoints = cookbook.folder / "chat/checkpoints.jsonl"
    unfinished, final = checkpoints.read_text().splitlines()
    assert "final" in final
    checkpoints.write_text(unfinished + "\n")
    resumed = cookbook.run("chat_sl.train", "chat", *settings, "max_steps=6", "behavior_if_log_dir_exists=resume")
    losses = dict(zip(column(resumed, "step"), column(resumed, "train_mean_nll"), strict=True))
    assert sorted(losses) == [0, 1, 2, 3, 4, 5]
    assert losses[5] < losses[3] < losses[0]


def test_dpo_widens_the_margin(cookbook: Cookbook) -> None:
    settings = [MODEL, "dataset=hhh", "batch_size=8", "max_steps=5", "learning_rate=1e-3", "lr_schedule=constant"]
    metrics = cookbook.run("preference.dpo.train", "dpo", *settings, "behavior_if_log_dir_exists=delete")
    margins = column(metrics, "margin")
    assert len(margins) == 5
    assert abs(margins[0]) < 0.01
    assert margins[-1] > 0.1
    assert column(metrics, "accuracy")[-1] == 1.0


def test_off_policy_distillation_learns_the_teachers_likeliest_tokens(cookbook: Cookbook) -> None:
    lesson = [MODEL, "batch_size=8", "learning_rate=1e-3", "max_steps=5", "lr_schedule=constant", "eval_every=0"]
    cookbook.run("chat_sl.train", "teacher", *lesson, "behavior_if_log_dir_exists=delete")
    teacher = json.loads((cookbook.folder / "teacher/checkpoints.jsonl").read_text().splitlines()[-1])
    settings = [f"teacher={teacher['sampler_path']}", "steps=5"]
    metrics = cookbook.run("tests.contract.distill_off_policy", "distilled", *settings)
    losses = column(metrics, "train/loss:sum")
    assert len(losses) == 5
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sdft", "decisions-forecasting"])
def test_recipes_of_the_page_make_their_steps(cookbook: Cookbook, name: str) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    outcome = outcome_of(cookbook, recipe)
    assert not outcome.failure, f"{outcome.words}; its output ends:\n{outcome.failure}"
