"""Datums that share rows, with targets alike or of their own: the head's rows are hardly more than those before it."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import reference
from tests.parity.conftest import NewTrainer
from tests.parity.reference import SPECS, Datum, as_call
from tests.parity.test_shared_prefixes import samples
from tests.parity.training_lab import FULL, add, gradient, outputs
from tinsmith.models.head import target_logprobs
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training import trainer as trainer_module
from tinsmith.training.trainer import TorchTrainer

pytestmark = reference.PEFTS_WARNINGS


@pytest.mark.parametrize("alike", [True, False], ids=["targets alike", "targets of their own"])
@pytest.mark.parametrize("spec", [SPECS["attention"], SPECS["all"], FULL], ids=["frozen head", "trained head", "full"])
def test_targets_of_their_own_in_a_shared_prompt_do_not_multiply_the_rows_of_the_head(
    spec: ModelSpec, alike: bool, new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes memory and time for the whole vocabulary. Results are those of each datum alone."""
    data = samples([1] * 12)
    if alike:
        data = [Datum(each.tokens, np.append(each.tokens[1:], each.targets[-1]), each.inputs) for each in data]
    together, apart = (new_trainer(micro_batch_tokens=1024) for _ in range(2))
    for trainer in (together, apart):
        add(trainer, "m", spec)
    alone = [outputs(apart, ModelCall("m", as_call([datum])))[0].logprobs_M for datum in data]
    before, within = [], []

    def hidden(trainer: TorchTrainer, *args: Any) -> torch.Tensor:
        before.append(hidden_of(trainer, *args))
        return before[-1]

    def logprobs(model: BaseModel, hidden_TD: torch.Tensor, *args: Any) -> torch.Tensor:
        within.append(len(hidden_TD))
        return target_logprobs(model, hidden_TD, *args)

    hidden_of = TorchTrainer._hidden
    monkeypatch.setattr(TorchTrainer, "_hidden", hidden)
    monkeypatch.setattr(trainer_module, "target_logprobs", logprobs)
    [shared] = outputs(together, ModelCall("m", as_call(data)))
    assert sum(within) <= 1.25 * sum(map(len, before)) < as_call(data).num_tokens
    np.testing.assert_allclose(shared.logprobs_M, np.concatenate(alone), atol=1e-5)
    assert (gradient(together, "m") - gradient(apart, "m")).norm() < 1e-5 * gradient(apart, "m").norm()
