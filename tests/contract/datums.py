"""Datums as users build them, from seeded tokens, and the losses' formulas in numpy to check answers with."""

from collections.abc import Sequence

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types

VOCABULARY = 1270
"""Ordinary token ids of the tiny model are below this."""

FloatArray = NDArray[np.float32]


def tokens(count: int, seed: int = 0) -> list[int]:
    """`count` token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def supervised(sequence: Sequence[int], weights: Sequence[float] | None = None) -> types.Datum:
    """Every token of `sequence` behind the first is a target."""
    targets = list(sequence[1:])
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(sequence[:-1])),
        loss_fn_inputs={
            "target_tokens": np.array(targets, np.int64),
            "weights": np.array(weights or [1.0] * len(targets), np.float32),
        },
    )


def rollout(
    sequence: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float], **extra: Sequence[float]
) -> types.Datum:
    """A datum of a policy loss; `extra` are further inputs, per token."""
    inputs = {"logprobs": logprobs, "advantages": advantages, **extra}
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(sequence[:-1])),
        loss_fn_inputs={"target_tokens": np.array(sequence[1:], np.int64)}
        | {name: np.array(values, np.float32) for name, values in inputs.items()},
    )


def logprobs_of(output: types.ForwardBackwardOutput) -> list[FloatArray]:
    """The log-probabilities of each datum's targets, in the shape of the targets."""
    arrays = []
    for record in output.loss_fn_outputs:
        tensor = record["logprobs"]
        arrays.append(np.array(tensor.data, np.float32).reshape(tensor.shape))
    return arrays


def score(client: tinker.TrainingClient, datums: Sequence[types.Datum]) -> FloatArray:
    """The model's log-probabilities of all targets, one after the other; changes nothing."""
    output = client.forward(list(datums), "cross_entropy").result()
    return np.concatenate([array.ravel() for array in logprobs_of(output)])


def policy_loss(
    name: str, logp: FloatArray, sampled: FloatArray, advantages: FloatArray, config: dict[str, float]
) -> float:
    """The loss of one datum by its published formula. Not for losses without one."""
    ratio = np.exp(logp - sampled)
    match name:
        case "importance_sampling":
            terms = ratio * advantages
        case "ppo":
            clipped = np.clip(ratio, config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2))
            terms = np.minimum(ratio * advantages, clipped * advantages)
        case "cispo":
            clipped = np.clip(ratio, config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 4.0))
            terms = clipped * logp * advantages
        case "dro":
            terms = logp * advantages - 0.5 * config.get("beta", 0.05) * (logp - sampled) ** 2
        case _:
            raise ValueError(f"no formula for {name!r}")
    return -float(terms.sum())


def greedy(max_tokens: int, **changes: object) -> types.SamplingParams:
    """Sampling parameters without chance, and without a stop unless `changes` gives one."""
    return types.SamplingParams(**({"max_tokens": max_tokens, "temperature": 0.0, "stop": []} | changes))
