"""Twenty thousand sampled tokens have the frequencies that the model gives them, whatever cuts the distribution."""

import numpy as np
import pytest

from tests.parity.conftest import Bases, Folders
from tests.parity.reference import PEFTS_WARNINGS, SPECS
from tests.parity.sampling_lab import VOCAB, all_logprobs, lora, new_sampler, prompt, reference, sample

pytestmark = PEFTS_WARNINGS

DRAWS = 20_000
START = prompt(9)  # a block and a token: all samples but the first find the block, and decode at once
CUTS = {
    "temperature": (0.7, -1, 1.0),
    "top-k": (1.0, 9, 1.0),
    "top-p": (1.0, -1, 0.8),
    "all": (1.4, 30, 0.9),
}
"""Temperature, top-k, top-p."""


def cut(probabilities: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The textbook definition: the k likeliest, renormalised, and of these the shortest head of mass top-p."""
    order = np.argsort(-probabilities, kind="stable")[: top_k if top_k > 0 else None]
    head = probabilities[order] / probabilities[order].sum()
    before = np.cumsum(head) - head
    kept = np.zeros_like(probabilities)
    kept[order[before < top_p]] = head[before < top_p]
    return kept / kept.sum()


def deviation(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above its mean; rare tokens are one cell."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed, wanted = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, wanted, strict=True) if e > 0)
    freedom = sum(e > 0 for e in wanted) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_twenty_thousand_tokens_follow_the_exact_distribution(
    bases: Bases, folders: Folders, subtests: pytest.Subtests
) -> None:
    """All cases in one sampler, against the adapter's distribution; each row of a batch has its own parameters."""
    model = bases("qwen3-tied")
    weights = lora(model, SPECS["all"])
    sampler = new_sampler(model, kv_tokens=16_384, max_running=1024)
    sampler.publish("x", weights)
    for name, (temperature, top_k, top_p) in CUTS.items():
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampler.submit(sample(name, START, "x", name, num_samples=DRAWS, max_tokens=1, seed=7, **options))
    outputs = {}
    while sampler.load:
        outputs |= {finished.request_id: finished.output for finished in sampler.step()}
    module = reference(folders("qwen3-tied"), weights)
    for name, (temperature, top_k, top_p) in CUTS.items():
        with subtests.test(name):
            scaled = all_logprobs(module, START.tolist(), temperature)[-1].exp().numpy()
            expected = cut(scaled, top_k, top_p)
            counts = np.bincount(outputs[name].tokens_S, minlength=VOCAB)
            assert counts.sum() == DRAWS
            assert not counts[expected == 0].any()
            assert deviation(counts, expected) < 4
            logprobs = np.log(scaled)[outputs[name].tokens_S]
            np.testing.assert_allclose(outputs[name].logprobs_S, logprobs, atol=1e-5, rtol=0)
