"""How a tenant's datums travel (calls, micro-batches, company, recomputation) does not change its gradient."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.parity.conftest import NewTrainer
from tests.parity.reference import SPECS, Datum, as_call, random_datum
from tests.parity.training_lab import FULL, add, gradient, outputs
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.losses import LOSSES
from tinsmith.wire.packing import TrainCall, TrainOutput

KINDS = pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["lora", "full"])
LENGTHS = (7, 1, 20, 3, 12, 5, 16, 9)
cheap = settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def datums(loss: str, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [random_datum(rng, length, LOSSES[loss].inputs) for length in lengths]


def trainer_of(new_trainer: NewTrainer, spec: ModelSpec, family: str = "qwen3-tied", **options: object) -> TorchTrainer:
    """With the model `m` of this kind, and two strangers."""
    trainer = new_trainer(family, **options)
    for model_id, each in {"m": spec, "stranger": SPECS["all"], "other": SPECS["attention"]}.items():
        add(trainer, model_id, each)
    return trainer


def take_gradient(trainer: TorchTrainer, *calls: ModelCall) -> torch.Tensor:
    """What the calls add to `m`; nobody's gradient is left."""
    outputs(trainer, *calls)
    taken = gradient(trainer, "m")
    for model_id in trainer._models:
        trainer.discard_gradient(model_id)
    return taken


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-6 of the gradient's norm."""
    difference = torch.linalg.vector_norm((actual - expected).double())
    assert difference <= 1e-6 * torch.linalg.vector_norm(expected.double())


def company(rng: np.random.Generator, most: int) -> list[ModelCall]:
    """A few calls of strangers, some that only run forward."""
    calls = []
    for number in range(rng.integers(0, 4)):
        data = [random_datum(rng, int(length)) for length in rng.integers(1, most, rng.integers(1, 4))]
        call = as_call(data, forward_only=bool(rng.random() < 0.2))
        calls.append(ModelCall("stranger" if number % 2 else "other", call))
    return calls


@KINDS
@cheap
@given(
    loss=st.sampled_from(sorted(LOSSES)),
    ends=st.sets(st.integers(1, len(LENGTHS) - 1)),
    budget=st.integers(1, 200),
    checkpointing=st.booleans(),
    deterministic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_gradient_is_the_same_however_the_datums_travel(
    spec: ModelSpec,
    loss: str,
    ends: set[int],
    budget: int,
    checkpointing: bool,
    deterministic: bool,
    seed: int,
    new_trainer: NewTrainer,
) -> None:
    data = datums(loss, seed)
    whole = trainer_of(new_trainer, spec, micro_batch_tokens=1000)
    expected = take_gradient(whole, ModelCall("m", as_call(data, loss)))
    trainer = trainer_of(
        new_trainer,
        spec,
        micro_batch_tokens=budget,
        gradient_checkpointing=checkpointing,
        deterministic=deterministic,
    )
    rng = np.random.default_rng(seed)
    calls: list[ModelCall] = []
    for first, last in itertools.pairwise([0, *sorted(ends), len(data)]):
        calls += [*company(rng, 30), ModelCall("m", as_call(data[first:last], loss))]
    assert expected.any()
    assert_same(take_gradient(trainer, *calls), expected)


@KINDS
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_eight_datums_in_chunks_give_what_one_call_gives(spec: ModelSpec, chunks: int, new_trainer: NewTrainer) -> None:
    data = datums("cross_entropy", 3)
    trainer = trainer_of(new_trainer, spec, micro_batch_tokens=30)
    expected = take_gradient(trainer, ModelCall("m", as_call(data)))
    size = len(data) // chunks
    parts = [ModelCall("m", as_call(data[start : start + size])) for start in range(0, len(data), size)]
    assert_same(take_gradient(trainer, *parts), expected)
    for part in parts[:-1]:
        trainer.forward_backward([part])
    assert_same(take_gradient(trainer, parts[-1]), expected)


@KINDS
def test_weights_twice_as_large_give_exactly_twice_the_gradient(spec: ModelSpec, new_trainer: NewTrainer) -> None:
    trainer = trainer_of(new_trainer, spec)
    data = datums("cross_entropy", 4)
    single = take_gradient(trainer, ModelCall("m", as_call(data)))
    for datum in data:
        datum.inputs["weights"] *= 2
    assert torch.equal(take_gradient(trainer, ModelCall("m", as_call(data))), 2 * single)


@KINDS
@pytest.mark.parametrize("loss", LOSSES)
def test_a_datum_twice_counts_twice(spec: ModelSpec, loss: str, new_trainer: NewTrainer) -> None:
    trainer = trainer_of(new_trainer, spec)
    data = datums(loss, 5, lengths=[9])
    single = take_gradient(trainer, ModelCall("m", as_call(data, loss)))
    assert_same(take_gradient(trainer, ModelCall("m", as_call(data * 2, loss))), 2 * single)


@KINDS
def test_a_negated_weight_takes_the_gradient_back(spec: ModelSpec, new_trainer: NewTrainer) -> None:
    trainer = trainer_of(new_trainer, spec)
    data = datums("cross_entropy", 6)
    call = ModelCall("m", as_call(data))
    norm = torch.linalg.vector_norm(take_gradient(trainer, call))
    negated = [Datum(datum.tokens, datum.targets, {"weights": -datum.inputs["weights"]}) for datum in data]
    left = take_gradient(trainer, call, ModelCall("m", as_call(negated)))
    assert torch.linalg.vector_norm(left) <= 1e-6 * norm


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("family", ["qwen3-tied", "wide", "broad"])
def test_a_deterministic_trainer_gives_the_same_bits_in_any_company(family: str, new_trainer: NewTrainer) -> None:
    rng = np.random.default_rng(8)
    trainer = trainer_of(new_trainer, SPECS["all"], family, micro_batch_tokens=1024, deterministic=True)
    for length in (1, 48):
        call = ModelCall("m", as_call([random_datum(rng, length)]))
        expected = take_gradient(trainer, call)
        for _ in range(3):
            crowd = [*company(rng, 200), ModelCall("stranger", large_call(rng))]
            crowd.insert(int(rng.integers(len(crowd) + 1)), call)
            assert torch.equal(take_gradient(trainer, *crowd), expected)


def large_call(rng: np.random.Generator) -> TrainCall:
    """So many rows that products of them are computed in another order."""
    return as_call([random_datum(rng, 200), random_datum(rng, 230)])


def test_a_deterministic_trainer_gives_the_same_bits_when_a_call_had_to_be_repeated(new_trainer: NewTrainer) -> None:
    trainer = trainer_of(new_trainer, SPECS["all"], "wide", micro_batch_tokens=16, deterministic=True)
    call = ModelCall("m", as_call(datums("ppo", 9), "ppo"))
    expected = take_gradient(trainer, call)
    broken = iter([False, False, True])

    def break_once(*_: object) -> None:
        if next(broken, False):
            raise torch.OutOfMemoryError("for a moment")

    layer = trainer._model.module.model.layers[0]
    with layer.register_forward_hook(break_once):
        [failed] = trainer.forward_backward([call])
    assert not isinstance(failed, TrainOutput)
    assert torch.equal(take_gradient(trainer, call), expected)
