"""What ours and rivals are measured with on a GPU: shapes of models, and requests for samples.

Imports neither torch nor Tinsmith, since a rival runs among packages of its own.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's shape."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int


SMALL = Sizes(512, 4, 1536, 4096, heads=8, kv_heads=4, head_dim=64)
QWEN3_0_6B = Sizes(1024, 28, 3072, 151_936, heads=16, kv_heads=8, head_dim=128)
QWEN3_4B = Sizes(2560, 36, 9728, 151_936, heads=32, kv_heads=8, head_dim=128)
SHAPES = {"0.6b": QWEN3_0_6B, "4b": QWEN3_4B}
ADAPTERS, RANK = 8, 32
LONGEST = 2048 + 1024
"""Tokens of the longest request of all loads, prompt and output."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: `samples` of `output` tokens each, by an adapter's number (None: the base model)."""

    prompt: list[int]
    output: int
    samples: int
    adapter: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in order, for a number of adapters that take turns (0: the base model)."""

    vocabulary: int
    adapters: int
    seed: int

    def requests(self, lengths: list[tuple[int, int]], samples: int = 1) -> list[Asked]:
        """With random prompts: other ones for another seed, so that none is in a cache already."""
        rng = random.Random(f"{self.seed} {self.adapters} {len(lengths)} {lengths[0]}")
        return [
            Asked(
                [rng.randrange(100, self.vocabulary - 100) for _ in range(prompt)],
                output,
                samples,
                number % self.adapters if self.adapters else None,
            )
            for number, (prompt, output) in enumerate(lengths)
        ]


def warm_up(load: Load) -> list[Asked]:
    return load.requests([(32, 16)] * 64)


def sampling(load: Load) -> list[Asked]:
    """256 requests of 256 + 512 tokens."""
    return load.requests([(256, 512)] * 256)


def batch1(load: Load) -> list[Asked]:
    """One request of 256 + 512 tokens."""
    return load.requests([(256, 512)])


def ragged(load: Load) -> list[Asked]:
    """512 requests with prompts of 32 to 2,048 tokens and outputs of 16 to 1,024."""
    rng = random.Random(1)
    return load.requests([(rng.randint(32, 2048), rng.randint(16, 1024)) for _ in range(512)])


def groups(load: Load) -> list[Asked]:
    """16 samples of 256 tokens for each of 64 prompts of 1,024 tokens: the rollouts of a step of RL."""
    return load.requests([(1024, 256)] * 64, samples=16)


def rollouts(load: Load) -> list[Asked]:
    """The same by one adapter."""
    return groups(replace(load, adapters=min(1, load.adapters)))


CASES: dict[str, Callable[[Load], list[Asked]]] = {
    "sampling": sampling,
    "batch1": batch1,
    "ragged": ragged,
    "groups": groups,
    "rollouts": rollouts,
}

SEEDS = {"sampling": (1, 2), "batch1": (1, 2)}
"""Of the loads that are short enough to be measured twice; of all others it is (1,)."""


def made(case: str, vocabulary: int, adapters: int) -> list[list[Asked]]:
    """A load's requests, as often as it is measured."""
    return [CASES[case](Load(vocabulary, adapters, seed)) for seed in SEEDS.get(case, (1,))]


def sampled_tokens(requests: list[Asked]) -> int:
    return sum(asked.output * asked.samples for asked in requests)
