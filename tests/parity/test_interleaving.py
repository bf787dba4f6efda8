"""Eight tenants train, sample, save and load in turns on one trainer and one sampler: each ends where it ends alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.conftest import NewTrainer
from tests.parity.reference import as_call, random_datum
from tests.parity.sampling_lab import drain, new_sampler, prompt, sample
from tests.parity.training_lab import add
from tinsmith.errors import TinsmithError, UserError
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.losses import LOSSES
from tinsmith.wire.packing import SampleOutput, TrainCall, TrainOutput

STEPS = 20


@dataclass(frozen=True)
class Tenant:
    """One tenant's settings; everything it ever sends follows from them."""

    number: int
    spec: ModelSpec
    loss: str
    params: AdamParams

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.number}"


def tenants() -> list[Tenant]:
    kinds = [
        ModelSpec(rank=1, seed=1),
        ModelSpec(rank=4, seed=2, train_mlp=False),
        ModelSpec(rank=8, seed=3, train_attn=False),
        ModelSpec(rank=16, seed=4, train_unembed=False),
        ModelSpec(rank=32, seed=5, train_attn=False, train_mlp=False),
        ModelSpec(rank=64, seed=6, train_mlp=False, train_unembed=False),
        ModelSpec(rank=128, seed=7),
        ModelSpec(rank=0, seed=0),
    ]
    made = []
    for number, spec in enumerate(kinds):
        params = AdamParams(
            learning_rate=0.002 * (number + 1),
            weight_decay=0.3 * (number % 3),
            grad_clip_norm=5.0 * (number % 2),
            beta1=0.85 + 0.01 * number,
            eps=1e-8,
        )
        made.append(Tenant(number, spec, [*LOSSES, "cross_entropy"][number], params))
    return made


@dataclass
class Diary:
    """All that a tenant was told, in order."""

    logprobs: list[np.ndarray] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    samples: dict[str, SampleOutput] = field(default_factory=dict)
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class House:
    """A trainer and a sampler on one base model, and the tenants living there."""

    def __init__(self, trainer: TorchTrainer, tenants: Sequence[Tenant], folder: Path) -> None:
        self.trainer = trainer
        self.sampler = new_sampler(trainer._model)
        self.tenants = tenants
        self.folder = folder
        self.diaries = {tenant.name: Diary() for tenant in tenants}
        for tenant in tenants:
            add(trainer, tenant.name, tenant.spec)

    def live(self) -> None:
        """All steps; the order of tenants changes from step to step, and trouble comes with company."""
        order = np.random.default_rng(0)
        for step in range(STEPS):
            turn = [self.tenants[index] for index in order.permutation(len(self.tenants))]
            self._train(turn, step)
            for tenant in turn:
                diary = self.diaries[tenant.name]
                diary.metrics.append(self.trainer.optim_step(tenant.name, tenant.params))
                self._save_or_load(tenant, step)
                self._start_sampling(tenant, step)
                for _ in range(int(order.integers(3))):
                    for end in self.sampler.step():
                        self._note(end.request_id, end.output)
        for name, output in drain(self.sampler).items():
            self._note(name, output)
        for tenant in self.tenants:
            self.diaries[tenant.name].weights = self.trainer._models[tenant.name].weights.weights

    def _train(self, turn: Sequence[Tenant], step: int) -> None:
        calls = [ModelCall(tenant.name, call) for tenant in turn for call in calls_of(tenant, step)]
        trouble = [ModelCall(turn[0].name, call) for call in bad_calls(step)] if len(turn) > 1 else []
        place = step % (len(calls) + 1)
        results = self.trainer.forward_backward([*calls[:place], *trouble, *calls[place:]])
        refused = [results.pop(place) for _ in trouble]
        assert all(isinstance(each, UserError) for each in refused)
        for call, result in zip(calls, results, strict=True):
            assert isinstance(result, TrainOutput), result
            self.diaries[call.model_id].logprobs.append(result.logprobs_M)
            self.diaries[call.model_id].metrics.append(result.metrics)

    def _save_or_load(self, tenant: Tenant, step: int) -> None:
        folder = self.folder / tenant.name
        if step % 7 == tenant.number % 7:
            (folder / str(step)).mkdir(parents=True)
            self.trainer.save(tenant.name, folder / str(step), optimizer=True)
        elif step % 7 == (tenant.number + 3) % 7 and folder.exists():
            last = max(folder.iterdir(), key=lambda each: int(each.name))
            self.trainer.load(tenant.name, last, optimizer=step % 2 == 0)

    def _start_sampling(self, tenant: Tenant, step: int) -> None:
        if step % 5 == tenant.number % 5:
            snapshot = f"{tenant.name}@{step}"
            self.sampler.publish(snapshot, self.trainer.snapshot(tenant.name))
            tokens = prompt(5 + tenant.number, seed=step)
            self.sampler.submit(sample(f"{tenant.name}/{step}", tokens, snapshot, tenant.name, seed=step + 1))

    def _note(self, request_id: str, output: SampleOutput | TinsmithError) -> None:
        assert isinstance(output, SampleOutput), output
        self.diaries[request_id.split("/")[0]].samples[request_id] = output


def calls_of(tenant: Tenant, step: int) -> list[TrainCall]:
    """One or two calls of one to three datums."""
    rng = np.random.default_rng([tenant.number, step])
    inputs = LOSSES[tenant.loss].inputs
    return [
        as_call([random_datum(rng, int(length), inputs) for length in rng.integers(1, 24, count)], tenant.loss)
        for count in rng.integers(1, 4, 1 + step % 2)
    ]


def bad_calls(step: int) -> list[TrainCall]:
    """Not a number, in the inputs; longer than the context; a token that does not exist."""
    rng = np.random.default_rng(step)
    nan, long, unknown = (random_datum(rng, length) for length in (9, 257, 6))
    nan.inputs["weights"][4] = np.nan
    unknown.tokens[2] = 97
    return [as_call([datum]) for datum in (nan, long, unknown)]


def test_eight_tenants_end_where_each_ends_alone(
    new_trainer: NewTrainer, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    options = {"max_rank": 128, "micro_batch_tokens": 100}
    together = House(new_trainer(**options), tenants(), tmp_path / "together")
    together.live()
    assert len({tuple(diary.weights.shape) for diary in together.diaries.values()}) == len(together.tenants)
    for tenant in together.tenants:
        alone = House(new_trainer(**options), [tenant], tmp_path / "alone")
        alone.live()
        [expected], actual = alone.diaries.values(), together.diaries[tenant.name]
        with subtests.test(tenant=tenant.name):
            assert actual.weights.isfinite().all()
            assert torch.equal(actual.weights, expected.weights)
            assert all(np.array_equal(*pair) for pair in zip(actual.logprobs, expected.logprobs, strict=True))
            assert actual.metrics == expected.metrics
            assert len(actual.samples) == STEPS // 5
            for request_id, output in actual.samples.items():
                assert np.array_equal(output.tokens_S, expected.samples[request_id].tokens_S)
                np.testing.assert_allclose(output.logprobs_S, expected.samples[request_id].logprobs_S, atol=1e-5)
