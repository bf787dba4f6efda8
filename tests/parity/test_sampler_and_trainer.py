"""One number from three places: a token's logprob when it is sampled, when a prompt is scored, and in training."""

import numpy as np
import pytest

from tests.parity.conftest import Bases, NewTrainer
from tests.parity.reference import SPECS, Datum, as_call
from tests.parity.sampling_lab import drain, lora, new_sampler, prompt, run, sample, sequences
from tests.parity.training_lab import FULL, add, data_of, outputs
from tests.tiny_families import FAMILIES
from tinsmith.protocols import AdamParams, ModelCall

LENGTHS, SAMPLED = (1, 9, 30), 16


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_scoring_and_training_give_a_token_the_same_logprob(
    family: str, bases: Bases, new_trainer: NewTrainer
) -> None:
    trainer, sampler = new_trainer(family), new_sampler(bases(family), prefill_tokens=24)
    for name, spec in (("lora", SPECS["all"]), ("full", FULL)):
        add(trainer, name, spec)
        outputs(trainer, ModelCall(name, as_call(data_of(3))))
        trainer.optim_step(name, AdamParams(learning_rate=1e-3))
        sampler.publish(name, trainer.snapshot(name))
    sampler.publish("stranger", lora(bases(family), SPECS["attention"], seed=8))
    add(trainer, "stranger", SPECS["mlp"])
    strangers = [sample(f"stranger {length}", prompt(length), "stranger", num_samples=3) for length in (2, 40)]
    for name in ("lora", "full"):
        calls = [sample(f"{name} {n}", prompt(n), name, seed=n, max_tokens=SAMPLED) for n in LENGTHS]
        sampled = run(sampler, *calls, *strangers)[: len(calls)]
        texts = [
            np.array([*call.call.prompt_P, *sequences(output)[0]], np.int32)
            for call, output in zip(calls, sampled, strict=True)
        ]
        for number, text in enumerate(texts):
            sampler.submit(sample(str(number), text, name, max_tokens=1, prompt_logprobs=True))
        scored = drain(sampler)
        data = [Datum(text[:-1].tolist(), text[1:], {"weights": np.ones(len(text) - 1, np.float32)}) for text in texts]
        others = ModelCall("stranger", as_call(data_of(5, (7, 50))))
        [trained, _] = outputs(trainer, ModelCall(name, as_call(data, forward_only=True)), others)
        for number, output in enumerate(sampled):
            ends = trained.target_offsets[number : number + 2]
            in_training = trained.logprobs_M[ends[0] : ends[1]]
            as_prompt = scored[str(number)].extras["prompt_logprobs"][1:]
            np.testing.assert_allclose(as_prompt, in_training, atol=1e-5, rtol=0)
            np.testing.assert_allclose(output.logprobs_S, in_training[-SAMPLED:], atol=1e-5, rtol=0)
