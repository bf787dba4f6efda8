"""Token choice: the distributions are the right ones, and each row depends on itself alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinsmith.models.head import logits as head_logits
from tinsmith.models.head import target_logprobs
from tinsmith.models.lora import Segment
from tinsmith.sampling.decoding import ALTERNATIVE_STREAM, SAMPLE_STREAM, TokenDistributions, uniforms

DRAWS = 4_000


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def expected_probabilities(row: torch.Tensor, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The textbook definition: temperature, then top-k, then the shortest head of what is left with mass top_p."""
    probabilities = (row.double() / temperature).softmax(-1).numpy()
    order = np.argsort(-probabilities, kind="stable")
    kept = np.zeros_like(probabilities)
    limit = len(order) if top_k == -1 else top_k
    head = probabilities[order[:limit]] / probabilities[order[:limit]].sum()
    before = np.cumsum(head) - head
    chosen = order[:limit][(before < top_p) | (np.arange(limit) == 0)]
    kept[chosen] = probabilities[chosen]
    return kept / kept.sum()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above its mean, cells of few draws put together."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    observed = [*counts[large], counts[~large].sum()]
    wanted = [*expected[large], expected[~large].sum()]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, wanted, strict=True) if e > 0)
    freedom = max(1, len([e for e in wanted if e > 0]) - 1)
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, -1, 1.0), (0.5, -1, 1.0), (1.7, -1, 1.0), (1.0, 7, 1.0), (1.0, -1, 0.8), (0.8, 20, 0.9), (1.0, 1, 0.3)],
)
@pytest.mark.parametrize("vocab", [50, 1300])
def test_many_draws_follow_the_exact_distribution(vocab, temperature, top_k, top_p):
    row = logits(1, vocab)
    probabilities = expected_probabilities(row[0], temperature, top_k, top_p)
    uniform = uniforms([17] * DRAWS, SAMPLE_STREAM, [0] * DRAWS, range(DRAWS))
    distributions = TokenDistributions(row.expand(DRAWS, -1), np.full(DRAWS, temperature))
    tokens = distributions.choose(uniform, np.full(DRAWS, top_k), np.full(DRAWS, top_p))
    counts = np.bincount(tokens.numpy(), minlength=vocab)
    assert not counts[probabilities == 0].any()
    assert chi_square(counts, probabilities) < 5


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(2000, 1.0), (2000, 0.999), (-1, 0.9999), (5000, 0.5), (129, 0.3), (128, 0.9)]
)
def test_cuts_within_and_beyond_the_window_are_exact(top_k: int, top_p: float) -> None:
    row = logits(1, 5000) * 0.1  # nearly flat: most cuts keep thousands of tokens
    probabilities = expected_probabilities(row[0], 1.0, top_k, top_p)
    grid = (np.arange(400) + 0.5) / 400
    distributions = TokenDistributions(row.expand(400, -1), np.ones(400))
    tokens = distributions.choose(grid, np.full(400, top_k), np.full(400, top_p)).numpy()
    quantiles = np.searchsorted(np.cumsum(probabilities), grid, side="right")
    assert not np.bincount(tokens, minlength=5000)[probabilities == 0].any()
    assert (tokens == quantiles).mean() > 0.99  # rounding may move a quantile to the next token


def test_greedy_takes_the_maximum_and_reports_at_temperature_one():
    rows = logits(5, 100)
    distributions = TokenDistributions(rows, np.array([0.0, 1.0, 0.0, 0.7, 0.0]))
    tokens = distributions.choose(np.full(5, 0.5), np.full(5, -1), np.ones(5))
    greedy = [0, 2, 4]
    assert torch.equal(tokens[greedy], rows[greedy].argmax(-1))
    expected = rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(distributions.logprobs(tokens)[greedy], expected[greedy])


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 0.3, 1.0, 4.0])
def test_logprobs_are_of_the_scaled_distribution_before_any_cut(temperature):
    rows = logits(3, 200)
    distributions = TokenDistributions(rows, np.full(3, temperature))
    tokens = distributions.choose(np.full(3, 0.3), np.full(3, 2), np.full(3, 0.9))
    expected = (rows.double() / max(temperature, 1e-30)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(distributions.logprobs(tokens).double(), expected, atol=1e-5, rtol=1e-5)


def test_logprobs_have_the_bits_of_the_head_that_trains() -> None:
    """Also beside rows of other temperatures, with every token of a row asked for."""
    hidden = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    weight = logits(500, 16, seed=2)
    segments = [Segment(None, 0, 8)]
    module = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight))
    base = SimpleNamespace(module=module, head_linear=0, spare_columns=None, exact=None)
    rows, tokens = torch.arange(8).repeat_interleave(500), torch.arange(500).repeat(8)
    trained = target_logprobs(base, hidden, segments, rows, tokens).view(8, 500)
    ours = head_logits(base, hidden, segments)
    for temperature in (np.ones(8), np.array([1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 3.0, 1.0])):
        distributions = TokenDistributions(ours, temperature)
        sampled = torch.stack([distributions.logprobs(torch.full((8,), token)) for token in range(500)], 1)
        as_trained = (temperature == 1) | (temperature == 0)
        assert torch.equal(sampled[as_trained], trained[as_trained])


def test_greedy_tells_logits_apart_whose_logprobs_are_equal() -> None:
    row = torch.full((1, 4096), 1.0)
    row[0, 1000] = 1.0 + 2.0**-23
    distributions = TokenDistributions(row, np.zeros(1))
    assert distributions.choose(np.zeros(1), np.array([-1]), np.ones(1)).tolist() == [1000]


def test_a_row_does_not_depend_on_its_neighbours():
    rows = logits(40, 2500)
    temperature = np.resize([0.0, 1.0, 0.5, 1.0], 40)
    top_k = np.resize([-1, -1, 5, 1500, -1], 40)
    top_p = np.resize([1.0, 0.9, 1.0], 40)
    uniform = uniforms([3] * 40, SAMPLE_STREAM, range(40), [0] * 40)
    together = TokenDistributions(rows, temperature)
    tokens = together.choose(uniform, top_k, top_p)
    for row in range(40):
        pick = slice(row, row + 1)
        alone = TokenDistributions(rows[pick], temperature[pick])
        token = alone.choose(uniform[pick], top_k[pick], top_p[pick])
        assert torch.equal(token, tokens[pick])
        assert torch.equal(alone.logprobs(token), together.logprobs(tokens)[pick])


def test_the_top_tokens_are_sorted_and_scaled():
    rows = logits(4, 50)
    ids, logprobs = TokenDistributions(rows, np.full(4, 2.0)).top([1, 3], 6)
    expected, expected_ids = (rows[[1, 3]] / 2).log_softmax(-1).topk(6)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logprobs, expected)


def test_the_last_quantile_never_falls_on_an_impossible_token():
    row = torch.full((1, 1000), -torch.inf)
    row[0, [3, 500]] = torch.tensor([0.0, 1.0])
    for uniform in (0.0, np.nextafter(1.0, 0.0)):
        tokens = TokenDistributions(row, np.ones(1)).choose(np.array([uniform]), np.array([-1]), np.ones(1))
        assert tokens.item() in (3, 500)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_are_noticed_row_by_row(bad):
    rows = logits(3, 100)
    rows[1, 7] = bad
    distributions = TokenDistributions(rows, np.array([1.0, 0.0, 1.0]))
    distributions.choose(np.full(3, 0.5), np.array([-1, 5, 5]), np.array([1.0, 0.9, 0.9]))
    assert distributions.finite_R.tolist() == [True, False, True]


def test_uniform_numbers_are_uniform_and_distinct_in_every_argument():
    numbers = uniforms([1] * 40_000, SAMPLE_STREAM, np.repeat(np.arange(200), 200), np.tile(np.arange(200), 200))
    assert len(np.unique(numbers)) == 40_000
    counts, _ = np.histogram(numbers, 100, (0, 1))
    assert chi_square(counts, np.full(100, 0.01)) < 5
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    base = uniforms([1], SAMPLE_STREAM, [2], [3])
    for other in (
        uniforms([2], SAMPLE_STREAM, [2], [3]),
        uniforms([1], ALTERNATIVE_STREAM, [2], [3]),
        uniforms([1], SAMPLE_STREAM, [3], [2]),
        uniforms([-1], SAMPLE_STREAM, [2], [3]),
    ):
        assert other != base
