"""With `deterministic`, a sampled token has the very bits that training gives it, in any company."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.parity.conftest import Bases, Folders, NewTrainer, load
from tests.parity.reference import SPECS, Datum, as_call
from tests.parity.sampling_lab import drain, lora, new_sampler, prompt, run, sample, sequences
from tests.parity.training_lab import FULL, add, data_of, outputs
from tests.tiny_families import FAMILIES, RECURRENT
from tinsmith.backend import load_backend
from tinsmith.config import Settings
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import AdamParams, ModelCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.served import Served
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import SampleOutput

EXACT = [family for family in FAMILIES if family not in RECURRENT]
NAMES = ("lora", "full")
LENGTHS = (1, 70)
SAMPLED = 14


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(trainer: TorchTrainer) -> TorchTrainer:
    """An adapter and a full-parameter model, both one step from the base."""
    for name, spec in zip(NAMES, (SPECS["all"], FULL), strict=True):
        add(trainer, name, spec)
        outputs(trainer, ModelCall(name, as_call(data_of(3))))
        trainer.optim_step(name, AdamParams(learning_rate=1e-3))
    return trainer


def calls_of(name: str) -> list:
    options = {"max_tokens": SAMPLED, "num_samples": 2, "prompt_logprobs": True}
    return [sample(f"{name} {length}", prompt(length), name, seed=length, **options) for length in LENGTHS]


def strangers(sampler: TorchSampler, model: BaseModel) -> list:
    sampler.publish("stranger", lora(model, SPECS["attention"], seed=8))
    return [
        sample(f"stranger {length}", prompt(length), name, num_samples=2, seed=length, max_tokens=17)
        for name, length in (("stranger", 3), ("base", 33), ("stranger", 60))
    ]


def in_training(trainer: TorchTrainer, name: str, prompt_P: np.ndarray, output: SampleOutput) -> list[np.ndarray]:
    """The trainer's logprobs of the prompt with each sample; all in one call, beside a stranger's."""
    data = []
    for tokens in sequences(output):
        whole = [*prompt_P.tolist(), *tokens]
        weights = {"weights": np.ones(len(whole) - 1, np.float32)}
        data.append(Datum(whole[:-1], np.array(whole[1:], np.int32), weights))
    calls = [ModelCall(name, as_call(data, forward_only=True)), ModelCall("lora", as_call(data_of(9, (5, 40))))]
    logprobs_M = outputs(trainer, *calls)[0].logprobs_M
    return np.split(logprobs_M, np.cumsum([len(datum.tokens) for datum in data])[:-1])


def check_bits(trainer: TorchTrainer, model: BaseModel) -> None:
    """Samples with company, preemption and chunks, alone, and their logprobs in training: the same bits."""
    crowded = new_sampler(model, prefill_tokens=20, kv_tokens=256, deterministic=True)
    for name in NAMES:
        crowded.publish(name, trainer.snapshot(name))
    calls = [call for name in NAMES for call in calls_of(name)]
    others = strangers(crowded, model)
    alone = new_sampler(model, deterministic=True)
    for name in NAMES:
        alone.publish(name, trainer.snapshot(name))
    for call, output in zip(calls, run(crowded, *calls, *others), strict=False):
        again = run(alone, call)
        assert sequences(again) == sequences(output)
        assert np.array_equal(again.logprobs_S, output.logprobs_S)
        length = len(call.call.prompt_P)
        rows = in_training(trainer, call.snapshot_id, call.call.prompt_P, output)
        for row, sampled in zip(rows, np.split(output.logprobs_S, 2), strict=True):
            assert np.array_equal(row[length - 1 :], sampled)
            assert np.array_equal(row[: length - 1], output.extras["prompt_logprobs"][1:])


@pytest.mark.parametrize("family", EXACT)
def test_sampled_and_prompt_logprobs_have_the_bits_of_training(
    family: str, new_trainer: NewTrainer, bases: Bases
) -> None:
    check_bits(trained(new_trainer(family, micro_batch_tokens=64, deterministic=True)), bases(family))


def test_they_have_them_too_where_threads_share_the_products(new_trainer: NewTrainer, bases: Bases) -> None:
    trainer = new_trainer("broad", micro_batch_tokens=256, deterministic=True)
    add(trainer, "lora", SPECS["all"])
    sampler = new_sampler(bases("broad"), deterministic=True)
    sampler.publish("lora", trainer.snapshot("lora"))
    call = sample("a", prompt(20), "lora", seed=3, max_tokens=6)
    with threads(2):
        output, _ = run(sampler, call, sample("b", prompt(150), num_samples=3))
        (row,) = in_training(trainer, "lora", call.call.prompt_P, output)
    assert np.array_equal(row[19:], output.logprobs_S)


def test_they_have_them_too_in_bfloat16(folders: Folders) -> None:
    model = load(folders("qwen3-tied"), torch.bfloat16)
    options = {"max_adapters": 4, "max_rank": 32, "gradient_checkpointing": True}
    check_bits(trained(TorchTrainer(model, micro_batch_tokens=64, deterministic=True, **options)), model)


def test_a_deterministic_server_is_made_of_such_a_trainer_and_sampler() -> None:
    trainer, sampler = load_backend(Settings(deterministic=True, device="cpu"), Served("tiny", "tiny"), lambda _: None)
    trainer.add("lora", SPECS["all"])
    call = sample("a", prompt(20), seed=3, num_samples=2, max_tokens=10)
    sampler.submit(call)
    sampler.submit(sample("b", prompt(31), num_samples=5))
    results = drain(sampler)
    row, _ = in_training(trainer, "lora", call.call.prompt_P, results["a"])
    assert np.array_equal(row[19:], results["a"].logprobs_S[:10])
