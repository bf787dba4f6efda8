"""Every loss of the API as a small pure function of per-token logprobs; sums over positions, never means.

`lp` is the log-probability of a target under the model being trained, `q` the one given with the datum (the sampler's),
`A` its advantage, `r = exp(lp − q)` the importance ratio, `sg` stops the gradient. Differentiable in `lp` only. Knows
no models; which inputs and settings a loss takes stands in `wire/losses.py`.

Metrics are named `name:reduction`. A position counts as sampled if its q or its advantage is not zero: clients fill
prompt positions with zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class LossCase:
    """What a loss sees of a request: `lp` [M], its inputs [M] by name, its settings, and each entry's datum number."""

    lp: Tensor
    inputs: Mapping[str, Tensor]
    config: Mapping[str, float]
    datum_M: Tensor

    @property
    def advantages(self) -> Tensor:
        return self.inputs["advantages"]

    @property
    def ratio(self) -> Tensor:
        return torch.exp(self.lp - self.inputs["logprobs"])

    def threshold(self, side: str) -> Tensor | float:
        """`clip_low_threshold` or `clip_high_threshold`: per token if given so, else from the configuration."""
        name = f"clip_{side}_threshold"
        return self.inputs[name] if name in self.inputs else self.config[name]

    def clip(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(min=self.threshold("low")).clamp(max=self.threshold("high"))


Loss = Callable[[LossCase], tuple[Tensor, Metrics]]


def cross_entropy(case: LossCase) -> tuple[Tensor, Metrics]:
    """−Σ w·lp, for any weights, also negative ones."""
    weights = case.inputs["weights"]
    return -(weights * case.lp).sum(), {"tokens:sum": (weights != 0).sum()}


def importance_sampling(case: LossCase) -> tuple[Tensor, Metrics]:
    """−Σ r·A."""
    ratio = case.ratio
    return -(ratio * case.advantages).sum(), _policy_metrics(case, ratio)


def ppo(case: LossCase) -> tuple[Tensor, Metrics]:
    """−Σ min(r·A, clip(r, low, high)·A), token by token; the thresholds are ratios."""
    ratio = case.ratio
    loss, clipped = _pessimistic(ratio, case)
    return loss, _policy_metrics(case, ratio, clipped)


def cispo(case: LossCase) -> tuple[Tensor, Metrics]:
    """−Σ sg(clip(r, low, high))·A·lp (MiniMax-M1, arXiv 2506.13585)."""
    ratio = case.ratio.detach()
    clipped = case.clip(ratio)
    return -(clipped * case.advantages * case.lp).sum(), _policy_metrics(case, ratio, clipped != ratio)


def dro(case: LossCase) -> tuple[Tensor, Metrics]:
    """−Σ (A·lp − ½β(lp − q)²) (Direct Reward Optimisation, arXiv 2405.19107)."""
    penalty = 0.5 * case.config["beta"] * (case.lp - case.inputs["logprobs"]).square()
    return -(case.advantages * case.lp - penalty).sum(), _policy_metrics(case, case.ratio)


def gspo(case: LossCase) -> tuple[Tensor, Metrics]:
    """GSPO-token (arXiv 2507.18071): PPO's objective with r = s·exp(lp − sg(lp)), s = exp(mean of sg(lp) − q).

    The mean runs over the positions of a datum where `sequence_ratio_mask` is not zero, weighted by it.
    """
    mask = case.inputs["sequence_ratio_mask"]
    fixed = case.lp.detach()
    datum = case.datum_M - case.datum_M[:1]
    sums = torch.zeros(2, len(mask), device=mask.device)
    sums.index_add_(1, datum, torch.stack([mask * (fixed - case.inputs["logprobs"]), mask]))
    log_ratio = sums[0] / torch.where(sums[1] == 0, 1.0, sums[1])
    ratio = torch.exp(log_ratio[datum] + case.lp - fixed)
    loss, clipped = _pessimistic(ratio, case)
    return loss, _policy_metrics(case, ratio, clipped)


def stable_reinforce(case: LossCase) -> tuple[Tensor, Metrics]:
    """−Σ sg(min(r, high))·A·lp + kl_coeff·Σ ½(lp − q)², the second sum over sampled positions.

    Our own definition (the service publishes none): REINFORCE with a truncated importance weight, which corrects for a
    sampler that lags behind without letting a single token's ratio dominate.
    """
    ratio = case.ratio.detach()
    weight = ratio.clamp(max=case.config["clip_high_threshold"])
    penalty = 0.5 * ((case.lp - case.inputs["logprobs"]) * _sampled(case)).square().sum()
    loss = -(weight * case.advantages * case.lp).sum() + case.config["kl_coeff"] * penalty
    return loss, _policy_metrics(case, ratio, weight != ratio)


LOSS_FUNCTIONS: Mapping[str, Loss] = MappingProxyType(
    {loss.__name__: loss for loss in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo, stable_reinforce)}
)


def _pessimistic(ratio: Tensor, case: LossCase) -> tuple[Tensor, Tensor]:
    """−Σ min(r·A, clip(r)·A), and where the clipped side was the smaller one."""
    plain, clipped = ratio * case.advantages, case.clip(ratio) * case.advantages
    return -torch.minimum(plain, clipped).sum(), clipped < plain


def _sampled(case: LossCase) -> Tensor:
    return (case.inputs["logprobs"] != 0) | (case.advantages != 0)


def _policy_metrics(case: LossCase, ratio: Tensor, clipped: Tensor | None = None) -> Metrics:
    sampled = _sampled(case)
    metrics = {
        "tokens:sum": sampled.sum(),
        "kl_sample_train:sum": ((case.inputs["logprobs"] - case.lp.detach()) * sampled).sum(),
        "ratio:max": (ratio.detach() * sampled).amax(),
    }
    if clipped is not None:
        metrics["clipped_tokens:sum"] = (clipped & sampled).sum()
    return metrics
