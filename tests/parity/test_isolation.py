"""What a tenant gets does not depend on who else is in the batch, how a batch is cut, or who fails beside it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.parity.conftest import NewTrainer
from tests.parity.reference import SPECS, Datum, as_call, random_datum, warm
from tests.parity.training_lab import FULL, add, gradient
from tinsmith.errors import TinsmithError, UserError
from tinsmith.models.attention import PackedAttention
from tinsmith.models.lora import Segment
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.losses import LOSSES
from tinsmith.wire.packing import TrainCall, TrainOutput

PARAMS = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=0.5)


def random_data(rng: np.random.Generator, lengths: Sequence[int], loss: str) -> list[Datum]:
    signature = LOSSES[loss]
    return [random_datum(rng, length, signature.inputs) for length in lengths]


def tenants() -> dict[str, tuple[ModelSpec, TrainCall]]:
    rng = np.random.default_rng(0)
    specs = [*SPECS.values(), FULL, ModelSpec(rank=16, seed=9), ModelSpec(rank=1, seed=10)]
    calls = {}
    for number, (loss, spec) in enumerate(zip(LOSSES, specs, strict=True)):
        lengths = rng.integers(1, 25, size=number % 3 + 2).tolist()
        calls[loss] = (spec, as_call(random_data(rng, lengths, loss), loss))
    return calls


@pytest.mark.parametrize("budget", [1000, 40, 7])
def test_tenants_of_all_ranks_and_losses_together_end_where_each_ends_alone(
    budget: int, new_trainer: NewTrainer
) -> None:
    together = new_trainer(micro_batch_tokens=budget)
    calls = tenants()
    for model_id, (spec, _) in calls.items():
        add(together, model_id, spec)
    mixed = [ModelCall(model_id, call) for model_id, (_, call) in calls.items()]
    for _ in range(2):
        results = together.forward_backward(mixed)
    grads = {m: gradient(together, m) for m in calls}
    norms = [together.optim_step(model_id, PARAMS)["grad_norm"] for model_id in calls]

    for (model_id, (spec, call)), result, norm in zip(calls.items(), results, norms, strict=True):
        alone = new_trainer(micro_batch_tokens=budget)
        add(alone, model_id, spec)
        for _ in range(2):
            [expected] = alone.forward_backward([ModelCall(model_id, call)])
        np.testing.assert_array_equal(result.logprobs_M, expected.logprobs_M)
        assert result.metrics == expected.metrics
        assert torch.equal(grads[model_id], gradient(alone, model_id)), model_id
        assert alone.optim_step(model_id, PARAMS)["grad_norm"] == norm
        assert torch.equal(together._models[model_id].weights.weights, alone._models[model_id].weights.weights)


def test_a_call_of_one_token_gets_the_same_bits_alone_and_in_company(new_trainer: NewTrainer) -> None:
    rng = np.random.default_rng(8)
    small, large = (as_call(random_data(rng, [length], "cross_entropy")) for length in (1, 40))
    alone, together = new_trainer("wide"), new_trainer("wide")
    for trainer in (alone, together):
        add(trainer, "m", SPECS["all"])
        add(trainer, "neighbour", SPECS["all"])
    [expected] = alone.forward_backward([ModelCall("m", small)])
    _, result = together.forward_backward([ModelCall("neighbour", large), ModelCall("m", small)])
    np.testing.assert_array_equal(result.logprobs_M, expected.logprobs_M)
    assert torch.equal(gradient(together, "m"), gradient(alone, "m"))


@pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["lora", "full"])
def test_chunks_add_up_to_one_call(spec: ModelSpec, new_trainer: NewTrainer) -> None:
    rng = np.random.default_rng(1)
    data = random_data(rng, [5, 11, 3, 20, 8], "ppo")
    trainer = new_trainer(micro_batch_tokens=16)
    add(trainer, "m", spec)
    [whole] = trainer.forward_backward([ModelCall("m", as_call(data, "ppo"))])
    expected = gradient(trainer, "m")
    trainer.discard_gradient("m")
    assert not gradient(trainer, "m").any()

    parts = trainer.forward_backward([ModelCall("m", as_call(part, "ppo")) for part in (data[:2], data[2:])])
    torch.testing.assert_close(gradient(trainer, "m"), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([part.logprobs_M for part in parts]), whole.logprobs_M, atol=1e-6)
    for name in ("loss:sum", "tokens:sum", "clipped_tokens:sum", "kl_sample_train:sum"):
        assert sum(part.metrics[name] for part in parts) == pytest.approx(whole.metrics[name], rel=1e-5, abs=1e-5)
    assert max(part.metrics["ratio:max"] for part in parts) == pytest.approx(whole.metrics["ratio:max"], rel=1e-5)


@pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["lora", "full"])
@pytest.mark.parametrize("budget", [1000, 10])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_call_with_a_loss_that_is_not_finite_fails_alone(
    spec: ModelSpec, budget: int, place: int, new_trainer: NewTrainer
) -> None:
    rng = np.random.default_rng(2)
    good = [as_call(random_data(rng, [4, 9, 6], "cross_entropy")) for _ in range(3)]
    bad_data = random_data(rng, [8, 8, 8], "cross_entropy")
    bad_data[2].inputs["weights"][3] = np.inf
    bad = ModelCall("m", as_call(bad_data))
    trainer, clean = (new_trainer(micro_batch_tokens=budget) for _ in range(2))
    for each in (trainer, clean):
        add(each, "m", spec)
        add(each, "neighbour", SPECS["attention"])
    sound = [ModelCall("m", good[0]), ModelCall("neighbour", good[1]), ModelCall("m", good[2])]
    results = trainer.forward_backward([*sound[:place], bad, *sound[place:]])
    clean.forward_backward(sound)

    assert isinstance(results.pop(place), UserError)
    assert all(isinstance(result, TrainOutput) for result in results)
    for model_id in ("m", "neighbour"):
        assert torch.equal(gradient(trainer, model_id), gradient(clean, model_id))


def test_a_failed_call_alone_leaves_nothing_to_step_on(new_trainer: NewTrainer) -> None:
    data = random_data(np.random.default_rng(3), [8], "cross_entropy")
    data[0].inputs["weights"][:] = np.nan
    trainer = new_trainer()
    add(trainer, "m", SPECS["all"])
    before = trainer._models["m"].weights.weights.clone()
    [result] = trainer.forward_backward([ModelCall("m", as_call(data))])
    assert isinstance(result, UserError)
    assert trainer.optim_step("m", PARAMS) == {"grad_norm": 0.0}
    assert torch.equal(trainer._models["m"].weights.weights, before)


def test_weights_that_are_broken_stay_one_tenants_problem(new_trainer: NewTrainer) -> None:
    call = as_call(random_data(np.random.default_rng(4), [8, 8], "cross_entropy"))
    trainer, clean = new_trainer(), new_trainer()
    for each in (trainer, clean):
        add(each, "broken", ModelSpec(rank=2, seed=0))
        add(each, "sound", SPECS["all"])
    trainer._models["broken"].weights.weights.fill_(float("nan"))
    results = trainer.forward_backward([ModelCall("broken", call), ModelCall("sound", call)])
    clean.forward_backward([ModelCall("sound", call)])
    assert isinstance(results[0], UserError)
    assert "weights have probably diverged" in str(results[0])
    assert torch.equal(gradient(trainer, "sound"), gradient(clean, "sound"))
    assert not gradient(trainer, "broken").any()


def test_a_bad_request_is_refused_without_touching_its_neighbours(new_trainer: NewTrainer) -> None:
    rng = np.random.default_rng(5)
    good = as_call(random_data(rng, [6], "cross_entropy"))
    out_of_range = random_data(rng, [6], "cross_entropy")
    out_of_range[0].tokens[2] = 97
    too_long = as_call(random_data(rng, [257], "cross_entropy"))
    trainer = new_trainer()
    add(trainer, "m", SPECS["all"])
    calls = [ModelCall("nobody", good), ModelCall("m", as_call(out_of_range)), ModelCall("m", too_long)]
    *errors, result = trainer.forward_backward([*calls, ModelCall("m", good)])
    assert all(isinstance(error, UserError) for error in errors)
    assert isinstance(result, TrainOutput)
    for error, offending in zip(errors, ("'nobody'", "to 97", "257"), strict=True):
        assert offending in str(error)


CURSED = 96


@contextmanager
def breaking(trainer: TorchTrainer, model_ids: Sequence[str], where: str) -> Iterator[None]:
    """While this holds, a pass over rows that contain the token `CURSED` runs out of memory, in the first layer."""
    cursed = False

    def notice(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal cursed
        cursed = bool((inputs[0] == CURSED).any())

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3.14 GiB")

    def after_layer(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if cursed:
            run_out() if where == "forward" else output.register_hook(run_out)

    weights = [trainer._models[model_id].weights for model_id in model_ids]
    modules = {id(module): module for module in (getattr(each, "module", trainer._model.module) for each in weights)}
    handles = []
    for module in modules.values():
        handles.append(module.get_input_embeddings().register_forward_pre_hook(notice))
        handles.append(module.model.layers[0].register_forward_hook(after_layer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cursed_call(rng: np.random.Generator, loss: str = "cross_entropy") -> TrainCall:
    data = random_data(rng, [6, 9, 5], loss)
    data[1].tokens[4] = CURSED
    return as_call(data, loss)


def uncursed(rng: np.random.Generator, lengths: Sequence[int]) -> TrainCall:
    data = random_data(rng, lengths, "cross_entropy")
    for datum in data:
        datum.tokens[:] = [token % CURSED for token in datum.tokens]
    return as_call(data)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("budget", [1000, 12])
@pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["lora", "full"])
def test_a_pass_that_runs_out_of_memory_fails_only_the_call_that_did_it(
    spec: ModelSpec, budget: int, where: str, new_trainer: NewTrainer
) -> None:
    rng = np.random.default_rng(11)
    first, second, third = (uncursed(rng, [4, 9, 6]) for _ in range(3))
    bad = ModelCall("m", cursed_call(rng))
    trainer, clean = (new_trainer(micro_batch_tokens=budget) for _ in range(2))
    for each in (trainer, clean):
        add(each, "m", spec)
        add(each, "neighbour", SPECS["attention"])
        add(each, "untouched", SPECS["mlp"])
        each.forward_backward([ModelCall("neighbour", first)])
    sound = [ModelCall("m", first), ModelCall("untouched", second), ModelCall("neighbour", third)]
    with breaking(trainer, ["m", "neighbour"], where):
        before, failed, *after = trainer.forward_backward([sound[0], bad, *sound[1:]])
    expected = clean.forward_backward(sound)

    assert isinstance(failed, TinsmithError)
    assert failed.category == "server"
    assert "OutOfMemoryError: tried to allocate 3.14 GiB" in str(failed)
    for result, reference in zip([before, *after], expected, strict=True):
        assert isinstance(result, TrainOutput)
        np.testing.assert_array_equal(result.logprobs_M, reference.logprobs_M)
        assert result.metrics == reference.metrics
    for model_id in ("m", "neighbour", "untouched"):
        assert torch.equal(gradient(trainer, model_id), gradient(clean, model_id)), model_id


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_call_that_breaks_alone_adds_nothing(accumulated: bool, where: str, new_trainer: NewTrainer) -> None:
    rng = np.random.default_rng(12)
    trainer = new_trainer()
    add(trainer, "m", SPECS["all"])
    if accumulated:
        trainer.forward_backward([ModelCall("m", uncursed(rng, [7]))])
    before = gradient(trainer, "m")
    with breaking(trainer, ["m"], where):
        [failed] = trainer.forward_backward([ModelCall("m", cursed_call(rng))])
    assert isinstance(failed, TinsmithError)
    assert torch.equal(gradient(trainer, "m"), before)
    assert bool(trainer.optim_step("m", PARAMS)["grad_norm"]) == accumulated


@pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["lora", "full"])
def test_forward_only_returns_the_same_and_accumulates_nothing(spec: ModelSpec, new_trainer: NewTrainer) -> None:
    data = random_data(np.random.default_rng(6), [6, 13], "importance_sampling")
    trainer = new_trainer()
    add(trainer, "m", spec)
    calls = [as_call(data, "importance_sampling", forward_only=only) for only in (True, False)]
    [forward] = trainer.forward_backward([ModelCall("m", calls[0])])
    assert trainer.optim_step("m", PARAMS) == {"grad_norm": 0.0}
    [both] = trainer.forward_backward([ModelCall("m", calls[1])])
    np.testing.assert_array_equal(forward.logprobs_M, both.logprobs_M)
    assert forward.metrics == both.metrics


def test_gradient_checkpointing_changes_no_bit(new_trainer: NewTrainer) -> None:
    call = as_call(random_data(np.random.default_rng(7), [6, 13], "cross_entropy"))
    gradients = []
    for checkpointing in (False, True):
        trainer = new_trainer(gradient_checkpointing=checkpointing)
        add(trainer, "m", SPECS["all"])
        trainer.forward_backward([ModelCall("m", call)])
        gradients.append(gradient(trainer, "m"))
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("spec", [SPECS["all"], FULL], ids=["adapter", "full"])
def test_only_passes_of_more_rows_than_memory_holds_are_recomputed(spec: ModelSpec, new_trainer: NewTrainer) -> None:
    trainer = new_trainer(gradient_checkpointing=20)
    add(trainer, "m", spec)
    weights = trainer._models["m"].weights
    layers = (trainer._model if spec.is_lora else weights).module.model.layers  # type: ignore[union-attr]
    recomputed = []
    for length in (20, 21, 20):
        call = as_call(random_data(np.random.default_rng(7), [length], "cross_entropy"))
        [result] = trainer.forward_backward([ModelCall("m", call)])
        assert isinstance(result, TrainOutput)
        recomputed.append([layer.gradient_checkpointing and layer.training for layer in layers])
    assert recomputed == [[False, False], [True, True], [False, False]]


def test_a_recomputed_layer_uses_the_adapters_of_its_own_pass(new_trainer: NewTrainer) -> None:
    model = new_trainer()._model
    model.checkpoint_gradients(True)
    tokens, attention = torch.arange(16), PackedAttention([0, 16])
    gradients = []
    for interrupted in (False, True):
        adapter, stranger = model.new_adapter(SPECS["mlp"]), model.new_adapter(SPECS["mlp"])
        for seed, each in enumerate((adapter, stranger)):
            warm(each, seed)
            each.require_grad()
        hidden_TD = model.hidden(tokens, tokens, [Segment(adapter, 0, 16)], attention)
        if interrupted:
            model.hidden(tokens, tokens, [Segment(stranger, 0, 16)], attention)
        hidden_TD.sum().backward()
        assert not stranger.grad.any()
        gradients.append(adapter.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_a_pass_has_no_more_sequences_than_a_device_can_launch_programs_for(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65,535 in a grid's second dimension, where attention's kernels have the sequences of a batch."""
    trainer = new_trainer(micro_batch_tokens=70_000)
    add(trainer, "m", SPECS["all"])
    sequences: list[int] = []
    monkeypatch.setattr(trainer, "_pass", lambda group, batch: sequences.append(len(batch.cu_seqlens) - 1))
    count = 66_000
    ones, offsets = np.ones(count, np.int32), np.arange(count + 1)
    call = TrainCall("cross_entropy", {}, True, ones, offsets, ones, offsets, 0 * ones, {"weights": np.ones(count)})
    [result] = trainer.forward_backward([ModelCall("m", call)])
    assert isinstance(result, TrainOutput)
    assert sum(sequences) == count and max(sequences) <= 65_535
