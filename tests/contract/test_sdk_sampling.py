"""The SDK samples: from the base, from saved and from passing weights, with every option, alone and in company."""

import math
from itertools import pairwise

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoTokenizer

from tests.contract.datums import greedy, score, supervised, tokens
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

PROMPT = types.ModelInput.from_ints(tokens(12, seed=42))
END_OF_TURN = 1277
ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


def options(**given: object) -> types.SamplingParams:
    return types.SamplingParams(**({"max_tokens": 12, "seed": 1, "stop": []} | given))


@pytest.fixture(scope="module")
def base(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model="tiny").result()


@pytest.fixture(scope="module")
def trained(service: tinker.ServiceClient) -> tinker.TrainingClient:
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    train(client)
    return client


def train(client: tinker.TrainingClient, seed: int = 7) -> None:
    """Teaches the model a text after PROMPT, so that its samples differ from the base's."""
    datum = supervised(PROMPT.to_ints() + tokens(12, seed))
    for _ in range(2):
        client.forward_backward([datum], "cross_entropy")
        client.optim_step(ADAM).result()


def taught(service: tinker.ServiceClient, answer: list[int]) -> tinker.SamplingClient:
    """A sampler that knows one thing by heart: `answer` after PROMPT."""
    client = service.create_lora_training_client("tiny", rank=32, seed=3).result()
    datum = supervised(PROMPT.to_ints() + answer, [0.0] * (PROMPT.length - 1) + [1.0] * len(answer))
    for _ in range(40):
        loss = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=3e-3, eps=1e-8)).result()
        if loss.result().metrics["loss:sum"] < 0.1:
            break
    return client.save_weights_and_get_sampling_client().result()


def texts(response: types.SampleResponse) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def draw(client: tinker.SamplingClient, count: int = 1, **given: object) -> list[list[int]]:
    return texts(client.sample(PROMPT, count, options(**given)).result())


def test_samples_have_the_length_asked_for_and_a_logprob_per_token(base: tinker.SamplingClient) -> None:
    response = base.sample(PROMPT, 5, options(max_tokens=9)).result()
    assert len(response.sequences) == 5
    for sequence in response.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs or []) == 9
        assert sequence.stop_reason == "length"
        assert all(logprob <= 0 for logprob in sequence.logprobs or [])
    assert len({sequence.sequence_id for sequence in response.sequences}) == 5
    assert len({tuple(text) for text in texts(response)}) == 5


def test_without_max_tokens_a_sample_runs_to_the_end_of_the_context(base: tinker.SamplingClient) -> None:
    prompt = types.ModelInput.from_ints(tokens(4080, seed=1))
    (sequence,) = base.sample(prompt, 1, types.SamplingParams(stop=[])).result().sequences
    assert 0 < len(sequence.tokens) <= 4096 - 4080
    assert sequence.stop_reason == "length"


def test_temperature_zero_takes_the_likeliest_token(base: tinker.SamplingClient) -> None:
    response = base.sample(PROMPT, 2, greedy(8), topk_sample_logprobs=3).result()
    assert texts(response)[0] == texts(response)[1]
    for sequence in response.sequences:
        for token, best in zip(sequence.tokens, sequence.topk_logprobs or [], strict=True):
            assert best is not None
            assert len(best) == 3
            assert token == best[0][0]
            assert all(first[1] >= second[1] for first, second in pairwise(best))


def test_top_k_one_and_a_tiny_top_p_are_greedy(base: tinker.SamplingClient) -> None:
    best = texts(base.sample(PROMPT, 1, greedy(12)).result())
    assert draw(base, top_k=1) == best
    assert draw(base, top_p=1e-6) == best
    assert draw(base, temperature=5.0) != best


def test_top_k_and_top_p_keep_to_the_likeliest_tokens(base: tinker.SamplingClient) -> None:
    response = base.sample(PROMPT, 1, greedy(1), topk_sample_logprobs=50).result()
    (ranked,) = response.sequences[0].topk_logprobs or []
    assert ranked is not None
    allowed = {token for token, _ in ranked[:5]}
    assert {text[0] for text in draw(base, 64, max_tokens=1, top_k=5, temperature=3.0)} <= allowed
    nucleus, mass = set(), 0.0
    for token, logprob in ranked:
        nucleus.add(token)
        mass += math.exp(logprob)
        if mass > 0.3:
            break
    assert {text[0] for text in draw(base, 64, max_tokens=1, top_p=0.3)} <= nucleus


def test_a_seed_gives_the_same_tokens_whatever_else_runs(base: tinker.SamplingClient) -> None:
    alone = draw(base, 4, seed=11)
    others = [base.sample(PROMPT, 3, options(seed=seed, max_tokens=20)) for seed in range(100, 108)]
    crowded = draw(base, 4, seed=11)
    assert crowded == alone
    assert draw(base, 4, seed=12) != alone
    for other in others:
        other.result()


def test_without_a_seed_samples_differ_from_call_to_call(base: tinker.SamplingClient) -> None:
    assert draw(base, seed=None) != draw(base, seed=None)


def test_sampling_stops_at_a_token_and_returns_it(base: tinker.SamplingClient) -> None:
    (free,) = texts(base.sample(PROMPT, 1, greedy(8)).result())
    last = free.index(free[3])
    response = base.sample(PROMPT, 1, greedy(8, stop=[free[3]])).result()
    assert texts(response) == [free[: last + 1]]
    assert response.sequences[0].stop_reason == "stop"


def test_sampling_stops_at_a_text_and_returns_it(service: tinker.ServiceClient) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    text = "Ada has 3 apples.\n\nUser: and Ben?"
    sampler = taught(service, tokenizer.encode(text))
    (free,) = texts(sampler.sample(PROMPT, 1, greedy(len(tokenizer.encode(text)))).result())
    assert tokenizer.decode(free) == text
    for stop in ("\n\nUser:", ["zebra", "\n\nUser:"], ["apples", "\n\nUser:"]):
        response = sampler.sample(PROMPT, 1, greedy(40, stop=stop)).result()
        found = tokenizer.decode(response.sequences[0].tokens)
        assert found == ("Ada has 3 apples" if "apples" in stop else "Ada has 3 apples.\n\nUser:")
        assert response.sequences[0].stop_reason == "stop"


def test_the_end_of_turn_stops_by_default_and_not_with_an_empty_list(service: tinker.ServiceClient) -> None:
    answer = [*tokens(2, seed=5), END_OF_TURN, *tokens(3, seed=6)]
    sampler = taught(service, answer)
    stopped = sampler.sample(PROMPT, 1, greedy(6, stop=None)).result().sequences[0]
    assert (stopped.tokens, stopped.stop_reason) == (answer[:3], "stop")
    endless = sampler.sample(PROMPT, 1, greedy(6)).result().sequences[0]
    assert (endless.tokens, endless.stop_reason) == (answer, "length")


def test_logprobs_belong_to_the_distribution_at_the_temperature_asked_for(base: tinker.SamplingClient) -> None:
    wide = base.sample(PROMPT, 1, options(max_tokens=1), topk_sample_logprobs=8).result().sequences[0]
    sharp = base.sample(PROMPT, 1, options(max_tokens=1, temperature=0.5), topk_sample_logprobs=8).result().sequences[0]
    plain, scaled = dict((wide.topk_logprobs or [])[0] or []), dict((sharp.topk_logprobs or [])[0] or [])
    first, second = list(plain)[:2]
    assert scaled[first] - scaled[second] == pytest.approx(2 * (plain[first] - plain[second]), abs=1e-3)


def test_the_sampler_scores_prompts_as_the_trainer_does(trained: tinker.TrainingClient) -> None:
    sampler = trained.save_weights_and_get_sampling_client().result()
    sequence = tokens(50, seed=9)
    logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(sequence)).result()
    assert logprobs[0] is None
    np.testing.assert_allclose(logprobs[1:], score(trained, [supervised(sequence)]), atol=1e-4)


def test_sampled_logprobs_are_the_trainers(trained: tinker.TrainingClient) -> None:
    sampler = trained.save_weights_and_get_sampling_client().result()
    (sequence,) = sampler.sample(PROMPT, 1, options(max_tokens=20)).result().sequences
    whole = PROMPT.to_ints() + sequence.tokens
    expected = score(trained, [supervised(whole)])[PROMPT.length - 1 :]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)


def test_only_the_last_prompt_logprobs_are_given_when_asked(base: tinker.SamplingClient) -> None:
    whole = base.compute_logprobs(PROMPT).result()
    last = base.compute_logprobs(PROMPT, prompt_logprobs_last_n=3).result()
    assert last[:-3] == [None] * (PROMPT.length - 3)
    np.testing.assert_allclose(last[-3:], whole[-3:], atol=1e-5)


def test_the_likeliest_prompt_tokens_come_in_order(base: tinker.SamplingClient) -> None:
    response = base.sample(
        PROMPT, 1, options(max_tokens=1), include_prompt_logprobs=True, topk_prompt_logprobs=4
    ).result()
    rows, logprobs = response.topk_prompt_logprobs or [], response.prompt_logprobs or []
    assert len(rows) == PROMPT.length
    assert rows[0] is None
    for token, logprob, row in zip(PROMPT.to_ints()[1:], logprobs[1:], rows[1:], strict=True):
        assert row is not None
        assert len(row) == 4
        assert all(first[1] >= second[1] for first, second in pairwise(row))
        assert logprob is not None
        assert logprob <= row[0][1] + 1e-5
        assert dict(row).get(token, logprob) == pytest.approx(logprob, abs=1e-5)


def test_named_tokens_are_scored_at_named_places(base: tinker.SamplingClient) -> None:
    sequence = PROMPT.to_ints()
    ids = torch.full((len(sequence) - 1, 2), -1, dtype=torch.int64)
    ids[4, 0], ids[9, 1] = sequence[5], 17
    for target in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        response = base.sample(
            PROMPT, 1, options(max_tokens=1), include_prompt_logprobs=True, target_prompt_logprobs=target
        ).result()
        assert response.target_prompt_logprobs is not None
        scores = response.target_prompt_logprobs.to_torch().to_dense()
        assert scores.shape == ids.shape
        assert float(scores[4, 0]) == pytest.approx((response.prompt_logprobs or [])[5], abs=1e-5)
        assert float(scores[9, 1]) < 0
        assert float(scores[0, 0]) == 0.0


def test_alternatives_to_prompt_tokens_are_drawn_with_their_logprobs(base: tinker.SamplingClient) -> None:
    response = base.sample(PROMPT, 1, options(max_tokens=1), prompt_alt_tokens_k=3).result()
    assert response.prompt_alt_tokens is not None
    drawn, logprobs = response.prompt_alt_tokens.tokens.to_torch(), response.prompt_alt_tokens.logprobs.to_torch()
    assert drawn.shape == logprobs.shape == (PROMPT.length - 1, 3)
    assert bool((logprobs <= 0).all())
    changed = [*PROMPT.to_ints()[:5], int(drawn[4, 0])]
    again = base.compute_logprobs(types.ModelInput.from_ints(changed)).result()
    assert float(logprobs[4, 0]) == pytest.approx(again[5], abs=1e-4)


def test_a_saved_sampler_is_the_same_by_path_and_directly(
    service: tinker.ServiceClient, trained: tinker.TrainingClient, base: tinker.SamplingClient
) -> None:
    direct = trained.save_weights_and_get_sampling_client().result()
    path = trained.save_weights_for_sampler("named").result().path
    by_path = service.create_sampling_client(model_path=path).result()
    assert by_path.get_base_model() == "tiny"
    assert draw(by_path, 2) == draw(direct, 2) != draw(base, 2)


def test_snapshots_stay_as_they_were_while_training_goes_on(
    service: tinker.ServiceClient, base: tinker.SamplingClient
) -> None:
    untrained = draw(base, 2)
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    early = client.save_weights_and_get_sampling_client().result()
    named = client.save_weights_for_sampler("early").result().path
    train(client)
    late = client.save_weights_and_get_sampling_client().result()
    trained = draw(late, 2)
    train(client, seed=8)
    assert draw(early, 2) == untrained != trained
    assert draw(service.create_sampling_client(model_path=named).result(), 2) == untrained
    assert draw(late, 2) == trained
    before = score(client, [supervised(PROMPT.to_ints())])
    draw(early, 2)
    np.testing.assert_array_equal(score(client, [supervised(PROMPT.to_ints())]), before)


def test_inflight_samplers_follow_the_model(service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    first = client.save_weights_and_get_sampling_client(kind="inflight").result()
    untrained = draw(first)
    train(client)
    second = client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert draw(second) != untrained
    assert draw(first) == draw(second)


def test_full_models_are_sampled_too(service: tinker.ServiceClient, base: tinker.SamplingClient) -> None:
    client = service.create_lora_training_client("tiny", rank=0).result()
    before = client.save_weights_and_get_sampling_client().result()
    for _ in range(2):
        client.forward_backward([supervised(PROMPT.to_ints() + tokens(12, seed=7))], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3, eps=1e-8)).result()
    after = client.save_weights_and_get_sampling_client().result()
    assert draw(before, 2) == draw(base, 2) != draw(after, 2)


def test_a_sampler_can_be_handed_to_another_process(
    server: LocalServer, base: tinker.SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", server.base_url)
    copy = tinker.SamplingClient.from_sampler_handle(base.get_sampler_handle())
    assert draw(copy) == draw(base)


def test_many_requests_of_many_lengths_run_at_once(base: tinker.SamplingClient) -> None:
    prompts = [types.ModelInput.from_ints(tokens(2 + 7 * place, seed=place)) for place in range(40)]
    futures = [base.sample(prompt, 1 + place % 3, greedy(1 + place % 9)) for place, prompt in enumerate(prompts)]
    for place, future in enumerate(futures):
        assert [len(text) for text in texts(future.result())] == [1 + place % 9] * (1 + place % 3)
