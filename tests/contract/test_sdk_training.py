"""The SDK trains: every loss and optimizer parameter, any chunking, requests in flight, many tenants at once."""

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.contract.datums import (
    FloatArray,
    logprobs_of,
    policy_loss,
    rollout,
    score,
    supervised,
    tokens,
)
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")


def create(service: tinker.ServiceClient, rank: int = 8, seed: int = 3, **options: bool) -> tinker.TrainingClient:
    return service.create_lora_training_client("tiny", rank=rank, seed=seed, **options).result()


def step(client: tinker.TrainingClient, datums: list[types.Datum], loss: str = "cross_entropy") -> float:
    """One forward_backward and one optim_step; the loss."""
    future = client.forward_backward(datums, loss)
    client.optim_step(ADAM).result()
    return future.result().metrics["loss:sum"]


@pytest.fixture(scope="module")
def client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A model that tests only look at, or train a little."""
    return create(service)


def test_the_server_names_the_models_that_it_serves(server: LocalServer) -> None:
    models = tinker.RestClient(base_url=server.base_url).get_server_capabilities().result().supported_models
    assert any(model.model_name == "tiny" and (model.max_context_length or 0) >= 2048 for model in models)


@pytest.mark.parametrize("rank", [8, 0])
def test_a_model_knows_its_base_its_rank_and_its_tokenizer(service: tinker.ServiceClient, rank: int) -> None:
    client = create(service, rank=rank)
    info = client.get_info()
    assert info.model_id == client.model_id
    assert info.model_data.model_name == "tiny"
    assert info.is_lora == (rank > 0)
    assert (info.lora_rank or 0) == rank
    tokenizer = client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("What is 4 + 7?")) == "What is 4 + 7?"


@pytest.mark.parametrize("rank", [1, 8, 64, 0])
def test_the_loss_falls_for_adapters_of_any_rank_and_for_full_models(service: tinker.ServiceClient, rank: int) -> None:
    client = create(service, rank=rank)
    datums = [supervised(tokens(12, seed)) for seed in range(4)]
    losses = [step(client, datums) for _ in range(6)]
    assert losses[-1] < losses[0] - 1.0
    assert all(later < losses[0] for later in losses[1:])


def test_cross_entropy_is_the_weighted_sum_of_negative_logprobs(client: tinker.TrainingClient) -> None:
    weights = [0.0, 1.0, 0.5, -2.0, 3.0, 1.0]
    output = client.forward_backward([supervised(tokens(7), weights)], "cross_entropy").result()
    (logprobs,) = logprobs_of(output)
    assert logprobs.shape == (6,)
    assert np.all(logprobs < 0)
    assert output.metrics["loss:sum"] == pytest.approx(-float(logprobs @ np.array(weights)), rel=1e-5)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
@pytest.mark.parametrize("configured", [False, True])
def test_a_policy_loss_follows_its_published_formula(
    client: tinker.TrainingClient, loss: str, configured: bool
) -> None:
    given = {
        "importance_sampling": {},
        "dro": {"beta": 0.3},
        "ppo": {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05},
        "cispo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    }[loss]
    config = given if configured else {}
    rng = np.random.default_rng(5)
    sequence = tokens(20, seed=5)
    current = score(client, [supervised(sequence)])
    sampled = (current + rng.normal(0, 0.3, len(current))).astype(np.float32)
    advantages = rng.normal(0, 1, len(current)).astype(np.float32)
    datum = rollout(sequence, sampled, advantages)
    output = client.forward_backward([datum], loss, config or None).result()
    (logprobs,) = logprobs_of(output)
    np.testing.assert_allclose(logprobs, current, atol=1e-5)
    expected = policy_loss(loss, logprobs, sampled, advantages, config)
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_policy_loss_makes_rewarded_tokens_likelier(service: tinker.ServiceClient, loss: str) -> None:
    client = create(service)
    good, bad = tokens(9, seed=1), tokens(9, seed=2)
    extra = {"sequence_ratio_mask": [1.0] * 8} if loss == "gspo" else {}
    before = [score(client, [supervised(sequence)]) for sequence in (good, bad)]
    datums = [
        rollout(sequence, before[place], [advantage] * 8, **extra)
        for place, (sequence, advantage) in enumerate([(good, 1.0), (bad, -1.0)])
    ]
    for _ in range(3):
        step(client, datums, loss)
    after = [score(client, [supervised(sequence)]) for sequence in (good, bad)]
    gains = [float((later - earlier).sum()) for earlier, later in zip(before, after, strict=True)]
    assert gains[0] > max(0.0, gains[1])


def test_spans_of_provenance_change_nothing(client: tinker.TrainingClient) -> None:
    sequence = tokens(10, seed=8)
    datum = rollout(sequence, score(client, [supervised(sequence)]), [1.0] * 9)
    spans = [
        types.PromptProvenanceSpan(sequence_id="s-0", length=4),
        types.SampledProvenanceSpan(sequence_id="s-0", length=5),
    ]
    outputs = [
        client.forward([each], "stable_reinforce").result()
        for each in (datum, datum.with_provenance(model_input=spans, loss_fn_inputs=spans))
    ]
    np.testing.assert_array_equal(logprobs_of(outputs[0])[0], logprobs_of(outputs[1])[0])
    assert outputs[0].metrics["loss:sum"] == outputs[1].metrics["loss:sum"]


def test_several_targets_per_position_add_up(client: tinker.TrainingClient) -> None:
    sequence, columns = tokens(9, seed=4), [tokens(8, seed=seed) for seed in (10, 11, 12)]
    targets, weights = np.array(columns, np.int64).T, np.random.default_rng(0).random((8, 3)).astype(np.float32)
    model_input = types.ModelInput.from_ints(sequence[:-1])
    wide = types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets, "weights": weights})
    output = client.forward([wide], "cross_entropy").result()
    (logprobs,) = logprobs_of(output)
    assert logprobs.shape == (8, 3)
    for place in range(3):
        inputs = {"target_tokens": targets[:, place].copy(), "weights": weights[:, place].copy()}
        narrow = client.forward([types.Datum(model_input=model_input, loss_fn_inputs=inputs)], "cross_entropy")
        np.testing.assert_allclose(logprobs[:, place], logprobs_of(narrow.result())[0], atol=1e-5)
    assert output.metrics["loss:sum"] == pytest.approx(-float((logprobs * weights).sum()), rel=1e-5)


def test_sparse_targets_mean_the_same_as_dense_ones(client: tinker.TrainingClient) -> None:
    targets, weights = torch.zeros(8, 20, dtype=torch.int64), torch.zeros(8, 20)
    targets[2, 1], targets[5, 0] = 77, 78
    weights[2, 1], weights[5, 0] = 0.5, 2.0
    model_input = types.ModelInput.from_ints(tokens(8, seed=4))
    sparse = types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets, "weights": weights})
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = types.Datum(
        model_input=model_input,
        loss_fn_inputs={"target_tokens": targets.numpy(), "weights": weights.numpy()},
    )
    outputs = [client.forward([datum], "cross_entropy").result() for datum in (sparse, dense)]
    assert outputs[0].metrics["loss:sum"] == outputs[1].metrics["loss:sum"]
    np.testing.assert_array_equal(logprobs_of(outputs[0])[0], logprobs_of(outputs[1])[0])


def test_datums_of_different_width_and_length_share_a_request(client: tinker.TrainingClient) -> None:
    narrow = supervised(tokens(5, seed=1))
    targets = np.array([tokens(3, seed=2), tokens(3, seed=3)], np.int64).T.copy()
    inputs = {"target_tokens": targets, "weights": np.ones((3, 2), np.float32)}
    wide = types.Datum(model_input=types.ModelInput.from_ints(tokens(3, seed=9)), loss_fn_inputs=inputs)
    output = client.forward([narrow, wide, supervised(tokens(2, seed=5))], "cross_entropy").result()
    assert [array.shape for array in logprobs_of(output)] == [(4,), (3, 2), (1,)]


def test_forward_adds_nothing_to_the_gradient(service: tinker.ServiceClient) -> None:
    client = create(service)
    datum = supervised(tokens(10))
    before = score(client, [datum])
    client.forward([datum], "cross_entropy").result()
    client.optim_step(ADAM).result()
    np.testing.assert_array_equal(score(client, [datum]), before)


def test_a_step_without_a_gradient_succeeds_and_changes_nothing(service: tinker.ServiceClient) -> None:
    client = create(service)
    datum = supervised(tokens(10))
    before = score(client, [datum])
    for _ in range(2):
        client.optim_step(types.AdamParams(learning_rate=0.1, weight_decay=0.1)).result()
    np.testing.assert_array_equal(score(client, [datum]), before)


def test_a_custom_loss_computed_by_the_client_trains(service: tinker.ServiceClient) -> None:
    client = create(service)
    chosen, rejected = supervised(tokens(9, seed=1)), supervised(tokens(9, seed=2))
    reference = [score(client, [datum]).sum() for datum in (chosen, rejected)]

    def preference(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        margin = (logprobs[0].sum() - reference[0]) - (logprobs[1].sum() - reference[1])
        return -torch.nn.functional.logsigmoid(0.1 * margin), {"margin": margin.detach().item()}

    margins = []
    for _ in range(4):
        output = client.forward_backward_custom([chosen, rejected], preference).result()
        client.optim_step(ADAM).result()
        margins.append(output.metrics["margin"])
    assert margins[0] == pytest.approx(0.0, abs=1e-3)
    assert margins == sorted(margins)
    assert margins[-1] > 0.5


def test_the_optimizer_takes_all_its_parameters(service: tinker.ServiceClient) -> None:
    datum = supervised(tokens(10))
    variants = {
        "plain": {},
        "rate": {"learning_rate": 2e-3},
        "eps": {"eps": 10.0},
        "decay": {"weight_decay": 50.0},
        "clip": {"grad_clip_norm": 1e-4, "eps": 1e-3},
        "unclipped": {"eps": 1e-3},
        "beta1": {"beta1": 0.0},
        "beta2": {"beta2": 0.2},
    }
    results = {}
    for name, changes in variants.items():
        client = create(service)
        for _ in range(3):
            client.forward_backward([datum], "cross_entropy")
            params = types.AdamParams(**({"learning_rate": 1e-3, "eps": 1e-8} | changes))
            metrics = client.optim_step(params).result().metrics or {}
        assert np.isfinite(metrics["grad_norm"])
        assert metrics["grad_norm"] > 0
        results[name] = score(client, [datum])
    for name in ("rate", "eps", "decay", "beta1", "beta2"):
        assert np.abs(results[name] - results["plain"]).max() > 1e-5, f"{name} has no effect"
    assert np.abs(results["clip"] - results["unclipped"]).max() > 1e-5, "grad_clip_norm has no effect"


def test_requests_need_not_wait_for_each_other(service: tinker.ServiceClient) -> None:
    datums = [supervised(tokens(16, seed)) for seed in range(4)]
    patient, hasty = create(service), create(service)
    expected = [step(patient, datums) for _ in range(10)]
    futures = []
    for _ in range(10):
        futures.append(hasty.forward_backward(datums, "cross_entropy"))
        hasty.optim_step(ADAM)
    losses = [future.result().metrics["loss:sum"] for future in futures]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_gradients_add_up_until_the_step(service: tinker.ServiceClient) -> None:
    datums = [supervised(tokens(10, seed)) for seed in range(6)]
    together, apart = create(service), create(service)
    for _ in range(2):
        together.forward_backward(datums, "cross_entropy")
        for datum in datums:
            apart.forward_backward([datum], "cross_entropy")
        together.optim_step(ADAM)
        apart.optim_step(ADAM)
    np.testing.assert_allclose(score(together, datums), score(apart, datums), atol=1e-4)


def many(count: int) -> list[types.Datum]:
    return [supervised(tokens(3, seed)) for seed in range(count)]


def heavy(count: int) -> list[types.Datum]:
    """Datums of about half a megabyte: many targets at every position."""
    rng = np.random.default_rng(3)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens(64, seed)),
            loss_fn_inputs={
                "target_tokens": rng.integers(0, 1000, (64, 640)),
                "weights": rng.random((64, 640)).astype(np.float32) / 640,
            },
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("datums", [many(1100), heavy(12)], ids=["more than 1024 datums", "more than 5 MB"])
def test_a_call_that_the_sdk_splits_gives_what_its_parts_give(
    service: tinker.ServiceClient, datums: list[types.Datum]
) -> None:
    chunked, parts = create(service), create(service)
    output = chunked.forward_backward(datums, "cross_entropy")
    chunked.optim_step(ADAM)
    half = len(datums) // 2
    halves = [parts.forward_backward(part, "cross_entropy") for part in (datums[:half], datums[half:])]
    parts.optim_step(ADAM)
    assert len(output.result().loss_fn_outputs) == len(datums)
    expected = [array for part in halves for array in logprobs_of(part.result())]
    for got, wanted in zip(logprobs_of(output.result()), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    total = sum(part.result().metrics["loss:sum"] for part in halves)
    assert output.result().metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(score(chunked, datums[:8]), score(parts, datums[:8]), atol=1e-3)


def test_tenants_at_once_get_what_each_gets_alone(server: LocalServer) -> None:
    def work(client: tinker.TrainingClient, tenant: int) -> list[object]:
        loss = ("cross_entropy", "importance_sampling", "ppo", "dro")[tenant % 4]
        futures: list[object] = []
        for turn in range(4):
            sequences = [tokens(6 + 3 * tenant, seed=100 * tenant + 10 * turn + place) for place in range(2)]
            if loss == "cross_entropy":
                datums = [supervised(sequence) for sequence in sequences]
            else:
                size = len(sequences[0]) - 1
                datums = [rollout(sequence, [-7.0] * size, [0.5] * size) for sequence in sequences]
            futures += [client.forward_backward(datums, loss), client.optim_step(ADAM)]
        return futures

    def outcome(client: tinker.TrainingClient, futures: list[object]) -> FloatArray:
        for future in futures:
            future.result()  # type: ignore[attr-defined]
        return score(client, [supervised(tokens(20, seed=1))])

    ranks = (4, 16, 0, 32)
    services = [tinker.ServiceClient(base_url=server.base_url) for _ in ranks]
    alone = []
    for tenant, (service, rank) in enumerate(zip(services, ranks, strict=True)):
        client = create(service, rank)
        alone.append(outcome(client, work(client, tenant)))
    clients = [create(service, rank) for service, rank in zip(services, ranks, strict=True)]
    running = [work(client, tenant) for tenant, client in enumerate(clients)]
    together = [outcome(client, futures) for client, futures in zip(clients, running, strict=True)]
    for lonely, social in zip(alone, together, strict=True):
        np.testing.assert_allclose(social, lonely, atol=1e-3)
    for service in services:
        service.close("success").result()


@pytest.mark.parametrize("only", ["train_attn", "train_mlp", "train_unembed"])
def test_a_model_trains_only_the_parts_that_were_asked_for(service: tinker.ServiceClient, only: str) -> None:
    parts = dict.fromkeys(("train_attn", "train_mlp", "train_unembed"), False) | {only: True}
    client = create(service, **parts)
    datums = [supervised(tokens(12, seed)) for seed in range(3)]
    losses = [step(client, datums) for _ in range(4)]
    assert losses[-1] < losses[0]
