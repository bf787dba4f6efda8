"""Every loss against its formula written down a second time, with gradients by autograd, at the clip bounds too."""

import re

import pytest
import torch
from torch import Tensor

from tinsmith.training.losses import LOSS_FUNCTIONS, LossCase
from tinsmith.wire.losses import LOSSES

LOG_RATIOS = torch.tensor([-0.9, -0.3, 0.0, 0.1, 0.25, 0.7, 1.8, -0.05])
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.3, 1.5, -0.7, 0.0])
DATUMS = torch.tensor([3, 3, 3, 3, 3, 4, 4, 4])
MASK = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0])


def case(loss: str, log_ratios: Tensor = LOG_RATIOS, **config: float) -> LossCase:
    """A case whose probabilities and sampler's probabilities differ by exactly these ratios."""
    count = len(log_ratios)
    inputs = {
        "weights": ADVANTAGES[:count],
        "advantages": ADVANTAGES[:count],
        "logprobs": torch.full((count,), -2.0),
        "sequence_ratio_mask": MASK[:count],
    }
    chosen = {name: inputs[name] for name in LOSSES[loss].inputs}
    return LossCase((log_ratios - 2.0).requires_grad_(), chosen, LOSSES[loss].config | config, DATUMS[:count])


def reference(loss: str, case: LossCase) -> Tensor:
    """The formulas of the API's documentation, a position at a time."""
    c, lp, total = case.config, case.lp, torch.zeros(())
    for i in range(len(lp)):
        given = {name: values[i] for name, values in case.inputs.items()}
        if loss == "cross_entropy":
            total = total - given["weights"] * lp[i]
            continue
        q, advantage = given["logprobs"], given["advantages"]
        r = torch.exp(lp[i] - q)
        if loss == "gspo":
            inside = [j for j in range(len(lp)) if case.datum_M[j] == case.datum_M[i] and MASK[j] > 0]
            s = torch.stack([lp[j].detach() - case.inputs["logprobs"][j] for j in inside]).mean().exp()
            r = s * torch.exp(lp[i] - lp[i].detach())
        low, high = (given.get(f"clip_{end}_threshold", c.get(f"clip_{end}_threshold")) for end in ("low", "high"))
        if loss == "importance_sampling":
            total = total - r * advantage
        elif loss in ("ppo", "gspo"):
            total = total - torch.minimum(r * advantage, torch.clamp(r, low, high) * advantage)
        elif loss == "cispo":
            total = total - torch.clamp(r, low, high).detach() * lp[i] * advantage
        elif loss == "dro":
            total = total - (lp[i] * advantage - 0.5 * c["beta"] * (lp[i] - q) ** 2)
        elif loss == "stable_reinforce":
            total = total - min(r.item(), high) * advantage * lp[i] + c["kl_coeff"] * 0.5 * (lp[i] - q) ** 2
    return total


def assert_as_in_reference(loss: str, case: LossCase) -> None:
    value, _ = LOSS_FUNCTIONS[loss](case)
    expected = reference(loss, case)
    torch.testing.assert_close(value, expected)
    [gradient] = torch.autograd.grad(value, case.lp)
    [expected_gradient] = torch.autograd.grad(expected, case.lp)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_gradient_follow_the_formula(loss: str) -> None:
    assert_as_in_reference(loss, case(loss))


def test_every_loss_of_the_api_is_there() -> None:
    assert set(LOSS_FUNCTIONS) == set(LOSSES)


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo", "stable_reinforce"])
def test_settings_change_the_loss(loss: str) -> None:
    changed = case(loss, clip_high_threshold=1.05)
    assert_as_in_reference(loss, changed)
    assert LOSS_FUNCTIONS[loss](changed)[0].item() != LOSS_FUNCTIONS[loss](case(loss))[0].item()


@pytest.mark.parametrize("loss", ["dro", "stable_reinforce"])
def test_the_penalty_coefficient_counts(loss: str) -> None:
    assert_as_in_reference(loss, case(loss, **{"beta" if loss == "dro" else "kl_coeff": 3.0}))


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
@pytest.mark.parametrize("bound", [0.8, 1.2])
@pytest.mark.parametrize("nudge", [-1e-3, 0.0, 1e-3])
def test_the_gradient_at_a_clip_bound_is_the_formulas(loss: str, bound: float, nudge: float) -> None:
    ratios = torch.tensor([bound + nudge] * 4)
    at_bound = case(loss, ratios.log(), clip_low_threshold=0.8, clip_high_threshold=1.2)
    assert_as_in_reference(loss, at_bound)


def test_ppo_stops_only_moves_away_from_the_sampler() -> None:
    def gradient(ratio: float, advantage: float) -> float:
        one = LossCase(
            torch.tensor([ratio]).log().requires_grad_(),
            {"logprobs": torch.zeros(1), "advantages": torch.tensor([advantage])},
            LOSSES["ppo"].config,
            torch.zeros(1, dtype=torch.int64),
        )
        return torch.autograd.grad(LOSS_FUNCTIONS["ppo"](one)[0], one.lp)[0].item()

    assert gradient(1.3, 1.0) == 0
    assert gradient(0.7, -1.0) == 0
    assert gradient(1.3, -1.0) > 0
    assert gradient(0.7, 1.0) < 0


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_thresholds_per_token_override_the_settings(loss: str) -> None:
    base = case(loss)
    low, high = torch.linspace(0.5, 0.99, 8), torch.linspace(1.01, 2.0, 8)
    inputs = dict(base.inputs) | {"clip_low_threshold": low, "clip_high_threshold": high}
    assert_as_in_reference(loss, LossCase(base.lp, inputs, base.config, base.datum_M))
    only_high = dict(base.inputs) | {"clip_high_threshold": high}
    assert_as_in_reference(loss, LossCase(base.lp, only_high, base.config, base.datum_M))


def test_gspo_without_any_masked_in_position_has_ratio_one() -> None:
    base = case("gspo")
    inputs = dict(base.inputs) | {"sequence_ratio_mask": torch.zeros(8)}
    value, _ = LOSS_FUNCTIONS["gspo"](LossCase(base.lp, inputs, base.config, base.datum_M))
    torch.testing.assert_close(value, -ADVANTAGES.sum())


def test_stable_reinforce_leaves_positions_alone_that_nobody_sampled() -> None:
    lp = torch.tensor([-5.0, -1.0], requires_grad=True)
    inputs = {"logprobs": torch.tensor([0.0, -1.5]), "advantages": torch.tensor([0.0, 0.0])}
    config = LOSSES["stable_reinforce"].config | {"kl_coeff": 1.0}
    value, metrics = LOSS_FUNCTIONS["stable_reinforce"](LossCase(lp, inputs, config, torch.zeros(2, dtype=torch.int64)))
    [gradient] = torch.autograd.grad(value, lp)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.5]))
    assert metrics["tokens:sum"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_metric_names_have_one_colon_and_a_reduction_that_the_client_knows(loss: str) -> None:
    _, metrics = LOSS_FUNCTIONS[loss](case(loss))
    assert "tokens:sum" in metrics
    for name in metrics:
        assert re.fullmatch(r"[a-z_]+:(mean|sum|min|max|slack|hash2|unique)", name)


@pytest.mark.parametrize(("loss", "clipped"), [("ppo", 3), ("cispo", 4), ("stable_reinforce", 3)])
def test_clipped_tokens_are_counted(loss: str, clipped: int) -> None:
    low = {"clip_low_threshold": 0.5} if loss == "cispo" else {}
    _, metrics = LOSS_FUNCTIONS[loss](case(loss, clip_high_threshold=1.2, **low))
    assert metrics["clipped_tokens:sum"] == clipped
    assert metrics["tokens:sum"] == 8


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo", "stable_reinforce"])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("bound", ["clip_low_threshold", "clip_high_threshold"])
def test_a_ratio_exactly_at_a_bound_is_not_clipped_yet(loss: str, advantage: float, bound: str) -> None:
    """The ratio is 1 to the bit, and so is the bound: the gradient is that of the ratio, the formula's limit."""
    config = LOSSES[loss].config | ({bound: 1.0} if bound in LOSSES[loss].config else {})
    inputs = {
        "logprobs": torch.full((3,), -2.0),
        "advantages": torch.full((3,), advantage),
        "sequence_ratio_mask": torch.ones(3),
    }
    lp = torch.full((3,), -2.0, requires_grad=True)
    chosen = {name: inputs[name] for name in LOSSES[loss].inputs}
    value, metrics = LOSS_FUNCTIONS[loss](LossCase(lp, chosen, config, torch.zeros(3, dtype=torch.int64)))
    [gradient] = torch.autograd.grad(value, lp)
    assert gradient.tolist() == [-advantage] * 3
    assert metrics["clipped_tokens:sum"] == 0
