"""From logits to tokens: temperature, top-k, top-p, seeds and log-probabilities, for all rows of a batch at once.

Knows no sequences and no cache. Every row is computed from that row alone, so a token never depends on who shares the
batch. Legend: R rows, V vocabulary, C chunks of the vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Uint64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]

MASK_LOGPROB = -99999.0
"""The log-probability of an empty top-k cell; its token id is 0."""

SAMPLE_STREAM, ALTERNATIVE_STREAM = 0, 1
"""Separate random streams of one seed: for sampled tokens, and for alternatives to prompt tokens."""

_CHUNK = 128  # of the vocabulary, in the first level of the search for a quantile
_WINDOW = 128  # most likely tokens among which top-k and top-p are tried first
LARGEST_INVERSE = 1e30  # of a temperature; beyond it only the maximum has any weight anyway


def _mix(value: Uint64) -> Uint64:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit changes half of the output bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniforms(seeds: Sequence[int], stream: int, major: Sequence[int], minor: Sequence[int]) -> Float64:
    """A number in [0, 1) for each (seed, major, minor), the same on every machine and in every batch.

    For sampled tokens `major` is the sample's index in its request and `minor` the token's position in the sample.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64) + np.uint64(stream + 1) * step)
        state = _mix(state + np.asarray(major, np.uint64) * step + np.uint64(1))
        state = _mix(state + np.asarray(minor, np.uint64) * step + np.uint64(2))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


class TokenDistributions:
    """The next-token distribution of each row at its own temperature (0 stands for greedy, reported at 1).

    `finite_R` is False for rows whose logits hold NaN or infinity; whatever else is said of those is meaningless.
    """

    def __init__(
        self, logits_RV: Tensor, temperature_R: Float64, log_softmax: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`logits_RV` is fp32; temperatures are ≥ 0. `log_softmax` of [R, V], instead of torch's."""
        self._greedy_R = temperature_R == 0
        divisors_R = np.where(self._greedy_R, 1.0, temperature_R)
        if (divisors_R != 1.0).any():
            logits_RV = _divided(logits_RV, divisors_R)
        self._logits_RV = logits_RV  # for the maximum: logprobs can be equal where these are not
        self._logprobs_RV = logits_RV.log_softmax(-1) if log_softmax is None else log_softmax(logits_RV)
        self._weights_RV = self._logprobs_RV.exp()
        self._sums_RC = _chunk_sums(self._weights_RV)
        self._total_R = self._sums_RC.sum(-1)
        self.finite_R: NDArray[np.bool_] = torch.isfinite(self._total_R).cpu().numpy()

    def choose(self, uniform_R: Float64, top_k_R: NDArray[np.int64], top_p_R: Float64) -> Tensor:
        """Tokens [R] by inverting each row's cumulative distribution at `uniform_R`; greedy rows take the maximum.

        top-k (-1: off) cuts the distribution at the row's temperature; top-p cuts what top-k left, renormalised.
        Tokens as likely as the last one kept are kept, too.
        """
        if self._greedy_R.all():
            return self._logits_RV.argmax(-1)
        tokens_R = self.draw(uniform_R)
        vocab = self._logprobs_RV.shape[-1]
        limits_R = np.where(top_k_R > 0, np.minimum(top_k_R, vocab), vocab)
        cut = np.flatnonzero(~self._greedy_R & ((limits_R < vocab) | (top_p_R < 1.0)))
        if len(cut):
            weights_RV = self._cut_weights(cut, limits_R[cut], top_p_R[cut])
            tokens_R[cut] = _draw(weights_RV, _chunk_sums(weights_RV), uniform_R[cut])
        if self._greedy_R.any():
            greedy = np.flatnonzero(self._greedy_R)
            tokens_R[greedy] = self._logits_RV[greedy].argmax(-1)
        return tokens_R

    def draw(self, uniform_R: Float64) -> Tensor:
        """Tokens [R] from the uncut distributions, also for greedy rows."""
        return _draw(self._weights_RV, self._sums_RC, uniform_R)

    def logprobs(self, tokens_R: Tensor) -> Tensor:
        """Log-probabilities [R] (fp32) of one token per row, in the distribution before any cut.

        At temperature 1 they have the bits that `models.head` computes from the same logits.
        """
        return self._logprobs_RV.gather(-1, tokens_R[:, None])[:, 0]

    def top(self, rows: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [len(rows), k] of the most likely tokens of some rows, descending."""
        values, ids = self._logprobs_RV[rows].topk(k)
        return ids, values

    def _cut_weights(self, rows: NDArray[np.int64], limits: NDArray[np.int64], top_p: Float64) -> Tensor:
        """Weights [len(rows), V] of some rows after top-k and top-p: 0 where cut."""
        device = self._logprobs_RV.device
        index = torch.from_numpy(rows).to(device)
        limit = torch.from_numpy(limits).to(device)[:, None]
        part = torch.from_numpy(top_p).to(device)[:, None]
        logprobs, total = self._logprobs_RV[index], self._total_R[index, None]
        few = logprobs.topk(min(_WINDOW, logprobs.shape[-1])).values
        least, found = _last_kept(few, logprobs.shape[-1], total, limit, part)
        others = (~found).nonzero()[:, 0]
        if len(others):
            everything = logprobs[others].sort(dim=-1, descending=True).values
            least[others], _ = _last_kept(everything, logprobs.shape[-1], total[others], limit[others], part[others])
        return self._weights_RV[index] * (logprobs >= least[:, None])


def _divided(logits_RV: Tensor, divisors_R: Float64) -> Tensor:
    """Logits by temperature; at 1 as they are, otherwise less their maximum first, so that none overflows."""
    inverse_R = np.minimum(1.0 / np.maximum(divisors_R, 1 / LARGEST_INVERSE), LARGEST_INVERSE)
    inverse_R1 = torch.from_numpy(inverse_R.astype(np.float32)).to(logits_RV.device)[:, None]
    most_R1 = logits_RV.amax(-1, keepdim=True)
    return (logits_RV - torch.where(inverse_R1 == 1, 0.0, most_R1)).mul_(inverse_R1)


def _chunk_sums(weights_RV: Tensor) -> Tensor:
    """Sums [R, C] in float64 of a row's consecutive chunks."""
    padded_RV = F.pad(weights_RV, (0, -weights_RV.shape[-1] % _CHUNK))
    return padded_RV.unflatten(-1, (-1, _CHUNK)).sum(-1).double()


def _draw(weights_RV: Tensor, sums_RC: Tensor, uniform_R: Float64) -> Tensor:
    """Tokens [R] by weight: finds the chunk first, then the token in it."""
    device, vocab = weights_RV.device, weights_RV.shape[-1]
    target_R = torch.from_numpy(uniform_R).to(device) * sums_RC.sum(-1)
    chunk_R, before_R = _invert(sums_RC, target_R)
    ids_Rc = chunk_R[:, None] * _CHUNK + torch.arange(_CHUNK, device=device)
    inner_Rc = weights_RV.gather(-1, ids_Rc.clamp(max=vocab - 1)) * (ids_Rc < vocab)
    offset_R, _ = _invert(inner_Rc.double(), target_R - before_R)
    # Only a row that is not finite can end beyond the vocabulary.
    return (chunk_R * _CHUNK + offset_R).clamp(max=vocab - 1)


def _last_kept(values: Tensor, vocab: int, total: Tensor, limit: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """The logprob of each row's last kept token, and whether it is among `values`, the row's highest, sorted."""
    ranks = torch.arange(values.shape[-1], device=values.device)
    weights = values.double().exp() * (ranks < limit)
    mass = weights.sum(-1, keepdim=True)
    within = limit <= values.shape[-1]
    goal = part * torch.where(within, mass, total)
    found = within | ((limit == vocab) & (mass >= goal))
    before = weights.cumsum(-1) - weights
    kept = ((before < goal) & (ranks < limit)).sum(-1, keepdim=True)
    return values.gather(-1, kept.clamp(min=1) - 1)[:, 0], found[:, 0]


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index [R] where the cumulative sum of `weights` (float64) exceeds `target`, and the sum before it.

    Rounding can put the target at or past the end; it is then moved back, so that no index of weight 0 is chosen.
    """
    cumulative = weights.cumsum(-1)
    end = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end))).clamp(min=0)
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=weights.shape[-1] - 1)
    before = (cumulative - weights).gather(-1, index)
    return index[:, 0], before[:, 0]
