"""What scripts do with what they sample: prefixes met again, distributions to learn from, texts of many bytes."""

import numpy as np
import pytest
import tinker
from tinker import types
from transformers import AutoTokenizer

from tests.contract.datums import greedy, logprobs_of, supervised, tokens
from tinsmith.demo import tiny_folder

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

PROMPT = types.ModelInput.from_ints(tokens(60, seed=77))


def test_a_prefix_that_was_met_before_is_reported_and_answered_as_before(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="tiny").result()
    first, again = (sampler.sample(PROMPT, 1, greedy(5)).result() for _ in range(2))
    longer = types.ModelInput.from_ints(PROMPT.to_ints() + tokens(30, seed=5))
    other = service.create_lora_training_client("tiny", rank=4).result().save_weights_and_get_sampling_client().result()
    assert first.prompt_cache_hit_tokens == 0
    assert again.prompt_cache_hit_tokens == 48  # whole blocks of 16 tokens
    assert again.sequences[0].tokens == first.sequences[0].tokens
    assert sampler.sample(longer, 1, greedy(1)).result().prompt_cache_hit_tokens == 48
    assert other.sample(PROMPT, 1, greedy(1)).result().prompt_cache_hit_tokens == 0


def test_a_teachers_likeliest_tokens_are_targets_of_cross_entropy_as_they_come(service: tinker.ServiceClient) -> None:
    student = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    teacher = student.save_weights_and_get_sampling_client().result()
    response = teacher.sample(PROMPT, 1, greedy(1), include_prompt_logprobs=True, topk_prompt_logprobs=3).result()
    rows = (response.topk_prompt_logprobs or [])[1:]
    ids = np.array([[token for token, _ in row or []] for row in rows], np.int64)
    logprobs = np.array([[logprob for _, logprob in row or []] for row in rows], np.float32)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(PROMPT.to_ints()[:-1]),
        loss_fn_inputs={"target_tokens": ids, "weights": np.exp(logprobs)},
    )
    output = student.forward_backward([datum], "cross_entropy").result()
    [scored] = logprobs_of(output)
    assert scored.shape == (PROMPT.length - 1, 3)
    np.testing.assert_allclose(scored, logprobs, atol=1e-4)
    assert output.metrics["loss:sum"] == pytest.approx(-float((np.exp(logprobs) * scored).sum()), rel=1e-4)


def test_a_stop_text_of_several_bytes_ends_a_sample_at_its_last_byte(service: tinker.ServiceClient) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    text = "Zoë ate 3 🍎🍏 and ran"
    answer = tokenizer.encode(text)
    assert len(tokenizer.encode("🍏")) > 1, "this test is about characters that several tokens make"
    client = service.create_lora_training_client("tiny", rank=32, seed=3).result()
    datum = supervised(PROMPT.to_ints()[:8] + answer, [0.0] * 7 + [1.0] * len(answer))
    for _ in range(40):
        loss = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=3e-3, eps=1e-8)).result()
        if loss.result().metrics["loss:sum"] < 0.1:
            break
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(PROMPT.to_ints()[:8])
    for stop, expected in (("🍏", "Zoë ate 3 🍎🍏"), (["ë"], "Zoë"), (["zebra", "ë ate"], "Zoë ate")):
        sequence = sampler.sample(prompt, 1, greedy(60, stop=stop)).result().sequences[0]
        assert (tokenizer.decode(sequence.tokens), sequence.stop_reason) == (expected, "stop")
