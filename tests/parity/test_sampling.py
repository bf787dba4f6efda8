"""What the sampler returns, against forward passes of Hugging Face and PEFT modules over the finished text."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.parity.conftest import Bases, Folders, load
from tests.parity.reference import PEFTS_WARNINGS, SPECS
from tests.parity.sampling_lab import (
    VOCAB,
    all_logprobs,
    expected_logprobs,
    full,
    lora,
    new_sampler,
    prompt,
    reference,
    run,
    sample,
    sequences,
)
from tests.tiny_families import FAMILIES
from tinsmith.sampling.decoding import SAMPLE_STREAM, uniforms

pytestmark = PEFTS_WARNINGS

TOLERANCE = 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_those_of_a_forward_pass_whoever_shares_the_batch(
    family: str, bases: Bases, folders: Folders
) -> None:
    model = bases(family)
    weights = {
        "base": None,
        "all": lora(model, SPECS["all"]),
        "attention": lora(model, SPECS["attention"], seed=8),
        "full": full(model),
        "other-full": full(model, seed=6),
    }
    sampler = new_sampler(model, prefill_tokens=24)
    for name, own in weights.items():
        if own is not None:
            sampler.publish(name, own)
    calls = [
        sample(
            f"{name}-{length}", prompt(length), name, seed=length, temperature=temperature, num_samples=3, max_tokens=34
        )
        for name in weights
        for length, temperature in ((1, 1.0), (13, 1.3), (37, 0.6))
    ]
    modules = {name: reference(folders(family), own) for name, own in weights.items()}
    for call, output in zip(calls, run(sampler, *calls), strict=True):
        for index, tokens in enumerate(sequences(output)):
            assert len(tokens) == 34
            expected = expected_logprobs(modules[call.snapshot_id], call.call.prompt_P, tokens, call.call.temperature)
            start = index * 34
            np.testing.assert_allclose(output.logprobs_S[start : start + 34], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["qwen3-tied", "mistral-window"])
def test_greedy_sampling_is_hugging_faces_generate(family: str, bases: Bases, folders: Folders) -> None:
    module = AutoModelForCausalLM.from_pretrained(folders(family), dtype=torch.float32).eval()
    sampler = new_sampler(bases(family))
    calls = [sample(str(length), prompt(length), temperature=0.0, max_tokens=40) for length in (1, 8, 30)]
    for call, output in zip(calls, run(sampler, *calls), strict=True):
        inputs = torch.from_numpy(call.call.prompt_P.astype(np.int64))[None]
        expected = module.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
        assert output.tokens_S.tolist() == expected[0, inputs.shape[1] :].tolist()
        logprobs = expected_logprobs(module, call.call.prompt_P, output.tokens_S.tolist(), 1.0)
        np.testing.assert_allclose(output.logprobs_S, logprobs, atol=TOLERANCE, rtol=0)


def test_a_sample_can_be_recomputed_from_its_seed(bases: Bases, folders: Folders) -> None:
    output = run(new_sampler(bases("qwen3-tied")), sample("a", prompt(9), seed=77, num_samples=3, max_tokens=25))
    module = reference(folders("qwen3-tied"), None)
    for index, tokens in enumerate(sequences(output)):
        table = all_logprobs(module, [*prompt(9).tolist(), *tokens])[8:-1].exp().numpy().cumsum(-1)
        uniform = uniforms([77] * 25, SAMPLE_STREAM, [index] * 25, range(25))
        assert [
            int(np.searchsorted(row, value, side="right")) for row, value in zip(table, uniform, strict=True)
        ] == tokens


def test_top_tokens_of_sampled_positions_are_of_the_scaled_distribution(bases: Bases, folders: Folders) -> None:
    sampler = new_sampler(bases("qwen3-tied"))
    calls = [
        sample("wide", prompt(9), topk_sample_logprobs=5, temperature=0.7, top_p=0.5, num_samples=2),
        sample("narrow", prompt(9), topk_sample_logprobs=1, temperature=0.0),
        sample("none", prompt(9)),
    ]
    wide, narrow, none = run(sampler, *calls)
    assert not none.extras
    module = reference(folders("qwen3-tied"), None)
    for output, k, temperature in ((wide, 5, 0.7), (narrow, 1, 1.0)):
        for index, tokens in enumerate(sequences(output)):
            table = all_logprobs(module, [*prompt(9).tolist(), *tokens], temperature)[8:-1]
            values, ids = table.topk(k)
            rows = slice(index * 12, index * 12 + 12)
            assert output.extras["topk_sample_ids"][rows].tolist() == ids.tolist()
            np.testing.assert_allclose(output.extras["topk_sample_logprobs"][rows], values, atol=TOLERANCE, rtol=0)


def cross_examine(request_id: str, tokens: np.ndarray, snapshot: str, **options: object) -> object:
    """A call that asks everything that can be asked of a prompt."""
    targets = np.random.default_rng(4).integers(-1, VOCAB, (len(tokens), 3))
    targets[0] = -1
    asked = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 4,
        "prompt_alt_tokens_k": 2,
        "target_prompt_tokens": targets,
        "max_tokens": 1,
    }
    return sample(request_id, tokens, snapshot, **(asked | options))


@pytest.mark.parametrize("warm_cache", [False, True])
@pytest.mark.parametrize("last_n", [None, 1, 7])
def test_prompt_scores_are_those_of_a_forward_pass(
    warm_cache: bool, last_n: int | None, bases: Bases, folders: Folders
) -> None:
    model = bases("qwen3-tied")
    weights = {"base": None, "all": lora(model, SPECS["all"]), "full": full(model)}
    sampler = new_sampler(model, prefill_tokens=20)
    for name, own in weights.items():
        if own is not None:
            sampler.publish(name, own)
    tokens = prompt(45)
    if warm_cache:
        run(sampler, *(sample(f"warm-{name}", tokens, name) for name in weights))
    calls = [cross_examine(name, tokens, name, prompt_logprobs_last_n=last_n, temperature=0.8) for name in weights]
    for call, output in zip(calls, run(sampler, *calls), strict=True):
        table = all_logprobs(reference(folders("qwen3-tied"), weights[call.snapshot_id]), tokens.tolist())[:-1]
        first = 1 if last_n is None else 45 - last_n
        extras = output.extras
        own = table.gather(1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0].numpy()
        assert np.isnan(extras["prompt_logprobs"][:first]).all()
        np.testing.assert_allclose(extras["prompt_logprobs"][first:], own[first - 1 :], atol=TOLERANCE, rtol=0)
        values, ids = table.topk(4)
        assert (extras["topk_prompt_ids"][:first] == 0).all()
        assert (extras["topk_prompt_logprobs"][:first] == -99999.0).all()
        assert extras["topk_prompt_ids"][first:].tolist() == ids[first - 1 :].tolist()
        np.testing.assert_allclose(extras["topk_prompt_logprobs"][first:], values[first - 1 :], atol=TOLERANCE)
        targets = torch.from_numpy(call.call.target_prompt_tokens[1:])
        expected = table.gather(1, targets.clamp(min=0)).masked_fill(targets < 0, 0.0)
        np.testing.assert_allclose(extras["target_prompt_logprobs"][1:], expected, atol=TOLERANCE, rtol=0)
        assert (extras["target_prompt_logprobs"][0] == 0).all()
        alternatives = table.gather(1, torch.from_numpy(extras["alt_tokens"]))
        assert extras["alt_tokens"].shape == (44, 2)
        np.testing.assert_allclose(extras["alt_logprobs"], alternatives, atol=TOLERANCE, rtol=0)


def test_alternatives_follow_the_distribution_at_the_requests_temperature(bases: Bases, folders: Folders) -> None:
    draws, temperature = 90, 0.5
    output = run(
        new_sampler(bases("qwen3-tied")),
        sample("a", prompt(30), prompt_alt_tokens_k=draws, temperature=temperature, max_tokens=1),
    )
    table = all_logprobs(reference(folders("qwen3-tied"), None), prompt(30).tolist(), temperature)[:-1]
    drawn = table.gather(1, torch.from_numpy(output.extras["alt_tokens"]))
    entropy = -(table.exp() * table).sum(-1)
    variance = (table.exp() * (table + entropy[:, None]) ** 2).sum(-1)
    difference = (drawn.mean() + entropy.mean()).item()
    assert abs(difference) < 5 * (variance.sum().item() / draws) ** 0.5 / 29
    assert all(len(set(row)) > 1 for row in output.extras["alt_tokens"].tolist()[:3])


def test_scoring_a_suffix_leaves_the_prefix_to_the_cache(bases: Bases) -> None:
    sampler = new_sampler(bases("qwen3-tied"))
    tokens = prompt(50)
    assert run(sampler, sample("first", tokens)).cache_hit_tokens == 0
    assert run(sampler, sample("again", tokens)).cache_hit_tokens == 48
    assert run(sampler, sample("all", tokens, prompt_logprobs=True)).cache_hit_tokens == 0
    assert run(sampler, sample("top", tokens, topk_prompt_logprobs=1)).cache_hit_tokens == 0
    suffix = sample("suffix", tokens, prompt_logprobs=True, prompt_logprobs_last_n=9)
    assert run(sampler, suffix).cache_hit_tokens == 40
    targets = np.full((50, 1), -1)
    targets[30] = 5
    assert run(sampler, sample("one", tokens, target_prompt_tokens=targets)).cache_hit_tokens == 24


def test_bfloat16_logprobs_stay_close_to_a_forward_pass(folders: Folders) -> None:
    sampler = new_sampler(load(folders("qwen3-tied"), torch.bfloat16))
    output = run(sampler, sample("a", prompt(20), num_samples=4, max_tokens=30))
    module = AutoModelForCausalLM.from_pretrained(folders("qwen3-tied"), dtype=torch.bfloat16).eval()
    expected = [expected_logprobs(module, prompt(20), tokens, 1.0) for tokens in sequences(output)]
    assert np.abs(output.logprobs_S - np.concatenate(expected)).mean() < 0.05


def test_a_long_prompt_does_not_stop_others_from_decoding(bases: Bases) -> None:
    sampler = new_sampler(bases("qwen3-tied"), prefill_tokens=16)
    sampler.submit(sample("short", prompt(5), max_tokens=8))
    sampler.step()
    sampler.submit(sample("long", prompt(200), tenant="b", max_tokens=1))
    sampler.submit(sample("short-too", prompt(6), tenant="c", max_tokens=1))
    finished = []
    while sampler.load:
        finished.append([done.request_id for done in sampler.step()])
        sampler.check()
    assert finished.index(["short-too"]) == 0
    assert finished.index(["short"]) == 6
    assert finished[-1] == ["long"] and len(finished) >= 200 // 16
