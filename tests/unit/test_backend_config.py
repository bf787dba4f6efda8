"""SkyRL's keys: what becomes of them, and what is refused."""

import json
from pathlib import Path

import pytest

from tinsmith.backend_config import check_tensor_parallel, merge, translate
from tinsmith.config import load_settings
from tinsmith.errors import ConfigError

PUBLISHED = {
    "trainer.placement.policy_num_gpus_per_node": 1,
    "trainer.placement.policy_num_nodes": 1,
    "generator.num_inference_engines": 1,
    "generator.inference_engine_tensor_parallel_size": 1,
    "trainer.micro_forward_batch_size_per_gpu": 4,
    "trainer.micro_train_batch_size_per_gpu": 2,
    "generator.gpu_memory_utilization": 0.5,
}


def test_the_seven_published_keys_become_settings() -> None:
    expected = {"train_micro_batch_size": 2, "memory_fraction": 0.5}
    assert translate(json.dumps(PUBLISHED)) == expected
    assert load_settings(None, {}, expected).memory_fraction == 0.5


def test_their_newer_spelling_and_nested_objects_mean_the_same() -> None:
    nested = {
        "trainer": {"placement": {"policy_num_nodes": 1}, "micro_train_batch_size_per_gpu": 2},
        "generator": {
            "inference_engine": {"num_engines": 1, "tensor_parallel_size": 1, "gpu_memory_utilization": 0.5},
        },
    }
    assert translate(json.dumps(nested)) == {"train_micro_batch_size": 2, "memory_fraction": 0.5}


def test_the_options_of_the_jax_backend_are_settings_of_the_same_name() -> None:
    given = {"max_lora_adapters": 4, "max_lora_rank": 16, "tensor_parallel_size": 1, "train_micro_batch_size": 8}
    assert translate(json.dumps(given)) == {"max_lora_adapters": 4, "max_lora_rank": 16, "train_micro_batch_size": 8}


@pytest.mark.parametrize(
    "key", [key for key in PUBLISHED if "num" in key or "parallel" in key] + ["tensor_parallel_size"]
)
def test_more_than_one_device_is_refused_with_what_is_possible(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key} is 4, but this version computes on one device.*1 is what is possible"
    ):
        translate(json.dumps({key: 4}))
    check_tensor_parallel(1)
    with pytest.raises(ConfigError, match="tensor-parallel-size is 4"):
        check_tensor_parallel(4)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"trainer.colour": 1}', r"'trainer\.colour' is not known; known are trainer\.placement"),
        ('{"trainer": {"colour": 1}}', r"'trainer\.colour' is not known"),
        ('{"trainer.policy.optimizer_config.lr": 1e-5}', "comes with every optim_step"),
        ('{"trainer.algorithm.policy_loss_type": "ppo"}', "comes with every forward_backward"),
        ('{"trainer.policy.model.lora.rank": 8}', "comes with create_model"),
        ('{"max_lora_rank": "8"}', "max_lora_rank is '8'; expected a whole number"),
        ('{"max_lora_rank": true}', "whole number"),
        ('{"trainer.micro_train_batch_size_per_gpu": 0}', "at least 1"),
        ('{"generator.gpu_memory_utilization": 1.2}', "at most 1"),
        ('{"max_lora_rank": 8, "max_lora_rank": 9}', "'max_lora_rank' is given more than once"),
        (
            '{"generator.gpu_memory_utilization": 0.5, "generator.inference_engine.gpu_memory_utilization": 0.6}',
            "another key for the same says 0.5",
        ),
        ("max_lora_rank=8", "no JSON"),
        ("[1]", "JSON object"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        translate(text)


def test_options_and_keys_may_agree_but_not_contradict_each_other() -> None:
    assert merge({"max_lora_rank": 8, "port": 1}, {"max_lora_rank": 8}) == {"max_lora_rank": 8, "port": 1}
    with pytest.raises(ConfigError, match="--max-lora-rank is 8, but backend-config says 16"):
        merge({"max_lora_rank": 8}, {"max_lora_rank": 16})


def test_every_key_is_in_the_page_on_migration() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    assert [key for key in PUBLISHED if f"`{key}`" not in page] == []
