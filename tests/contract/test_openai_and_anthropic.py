"""The official clients of OpenAI and Anthropic against a real server: answers, streams, logprobs, errors."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
import tinker
from openai.types import Completion
from tinker import types

from tests.contract.datums import supervised, tokens
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

WORDS = Vocabulary(tiny_folder())
QUESTION: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 16 + 19?"}]
PROMPT = WORDS.encode(WORDS.template.render(QUESTION))
GREEDY = {"temperature": 0.0}  # Anthropic's client does not name it any more
LONG: Any = {"model": "tiny", "prompt": "Hello", "temperature": 0.0}
"""What the model goes on with for thousands of tokens."""


@pytest.fixture(scope="module")
def chats(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/oai/api/v1", api_key="tml-local", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: LocalServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"{server.base_url}/anthropic/api", api_key="tml-local", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(service: tinker.ServiceClient) -> tuple[str, tinker.SamplingClient]:
    """A path of weights that differ from the base model's, and the SDK's sampler of it."""
    training = service.create_lora_training_client("tiny", rank=8).result()
    for _ in range(3):
        training.forward_backward([supervised(tokens(40, seed=3))], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=0.01)).result()
    path = training.save_weights_for_sampler("chat").result().path
    assert path is not None
    return path, service.create_sampling_client(model_path=path).result()


def sdk_sample(client: tinker.SamplingClient, count: int = 1, **params: Any) -> list[types.SampledSequence]:
    response = client.sample(types.ModelInput.from_ints(PROMPT), count, types.SamplingParams(**params)).result()
    return list(response.sequences)


def bytes_of(entries: Sequence[Any]) -> list[bytes]:
    return [bytes(entry.bytes) for entry in entries]


# OpenAI


@pytest.mark.parametrize("weights", ["base", "checkpoint", "both"])
def test_a_chat_samples_what_the_sdk_samples_with_the_same_logprobs(
    chats: openai.OpenAI, service: tinker.ServiceClient, checkpoint: tuple[str, tinker.SamplingClient], weights: str
) -> None:
    path, trained = checkpoint
    model = {"base": "tiny", "checkpoint": path, "both": f"tiny;{path}"}[weights]
    sampling = service.create_sampling_client(base_model="tiny").result() if weights == "base" else trained
    expected = sdk_sample(sampling, 2, seed=5, max_tokens=20, temperature=0.9)
    answer = chats.chat.completions.create(
        model=model, messages=QUESTION, n=2, seed=5, max_tokens=20, temperature=0.9, logprobs=True, top_logprobs=3
    )
    for choice, sequence in zip(answer.choices, expected, strict=True):
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert bytes_of(entries) == [WORDS.token_bytes(token) for token in sequence.tokens]
        np.testing.assert_allclose([entry.logprob for entry in entries], sequence.logprobs or [], atol=1e-5)
        assert choice.message.content == WORDS.decode(sequence.tokens)
        assert choice.finish_reason == sequence.stop_reason
        assert all(len(entry.top_logprobs) == 3 for entry in entries)
        assert all(entry.top_logprobs[0].logprob >= entry.logprob - 1e-5 for entry in entries)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == sum(len(sequence.tokens) for sequence in expected)
    assert answer.usage.prompt_tokens_details is not None


def test_a_stream_is_the_answer_in_pieces(chats: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "n": 2, "seed": 6, "max_tokens": 30}
    asked |= {"logprobs": True, "top_logprobs": 2, "temperature": 1.3}
    whole = chats.chat.completions.create(**asked)
    texts, reasons, usage = ["", ""], ["", ""], None
    entries: list[list[Any]] = [[], []]
    for chunk in chats.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            entries[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    for index, choice in enumerate(whole.choices):
        assert texts[index] == choice.message.content
        assert reasons[index] == choice.finish_reason
        assert choice.logprobs is not None
        assert [entry.token for entry in entries[index]] == [entry.token for entry in choice.logprobs.content or []]
        np.testing.assert_allclose(
            [entry.logprob for entry in entries[index]],
            [entry.logprob for entry in choice.logprobs.content or []],
            atol=1e-5,
        )
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_tokens_come_while_others_are_still_being_sampled(chats: openai.OpenAI) -> None:
    chunks = 0
    with chats.completions.create(**LONG, max_tokens=2000, stream=True) as stream:
        for chunk in stream:
            assert chunk.choices[0].finish_reason is None
            chunks += bool(chunk.choices[0].text)
            if chunks > 5:  # what is left of it is given up
                break
    assert chunks > 5


def test_stop_strings_end_a_text_and_are_not_in_it(chats: openai.OpenAI) -> None:
    whole = chats.completions.create(**LONG, max_tokens=60).choices[0].text
    stop = whole[20:24]
    cut = chats.completions.create(**LONG, max_tokens=60, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    pieces = chats.completions.create(**LONG, max_tokens=60, stop=[stop], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == cut.text


def test_completions_say_every_tokens_logprob_and_place(chats: openai.OpenAI) -> None:
    choice = chats.completions.create(**LONG, max_tokens=9, logprobs=2).choices[0]
    scores = choice.logprobs
    assert scores is not None and scores.tokens and scores.text_offset and scores.top_logprobs
    offsets = scores.text_offset
    assert "".join(scores.tokens) == choice.text
    assert all(choice.text[place:].startswith(token) for place, token in zip(offsets, scores.tokens, strict=True))
    assert all(max(top.values()) >= -5 for top in scores.top_logprobs)


@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_echo_scores_the_prompt_as_the_sdk_does(
    chats: openai.OpenAI, checkpoint: tuple[str, tinker.SamplingClient], as_tokens: bool
) -> None:
    path, trained = checkpoint
    text = "What is 16 + 19? It is 35."
    prompt = WORDS.encode(text)
    expected = trained.compute_logprobs(types.ModelInput.from_ints(prompt)).result()
    asked: Any = {"model": path, "prompt": [prompt, prompt[:4]] if as_tokens else [text, "What is"], "echo": True}
    answer = chats.completions.create(**asked, max_tokens=0, logprobs=2)
    choice, short = answer.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert text.startswith(short.text)
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    scores = choice.logprobs
    assert scores is not None and scores.tokens and scores.token_logprobs and scores.top_logprobs
    assert "".join(scores.tokens) == text
    assert expected[0] is None and scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    np.testing.assert_allclose(scores.token_logprobs[1:], expected[1:], atol=1e-3)
    best = [max(top.values()) for top in scores.top_logprobs[1:]]
    assert all(top >= logprob - 1e-3 for top, logprob in zip(best, scores.token_logprobs[1:], strict=True))


def test_an_echo_is_followed_by_what_is_sampled(chats: openai.OpenAI) -> None:
    said = chats.completions.create(**LONG, max_tokens=5, logprobs=1).choices[0]
    echoed = chats.completions.create(**LONG, max_tokens=5, logprobs=1, echo=True).choices[0]
    assert echoed.text == LONG["prompt"] + said.text
    assert echoed.logprobs is not None and said.logprobs is not None
    assert echoed.logprobs.tokens is not None and "".join(echoed.logprobs.tokens) == echoed.text
    assert echoed.logprobs.token_logprobs is not None and said.logprobs.token_logprobs is not None
    np.testing.assert_allclose(echoed.logprobs.token_logprobs[-5:], said.logprobs.token_logprobs, atol=1e-3)
    assert echoed.logprobs.top_logprobs is not None
    assert len(echoed.logprobs.top_logprobs) == len(echoed.logprobs.tokens)
    plain = chats.completions.create(**LONG, max_tokens=5, echo=True).choices[0]
    assert (plain.text, plain.logprobs) == (echoed.text, None)


def test_an_echo_that_cannot_be_had_is_refused(chats: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0, which needs echo"):
        chats.completions.create(**LONG, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="echo and stream"):
        chats.completions.create(**LONG, max_tokens=1, echo=True, stream=True)
    with pytest.raises(openai.BadRequestError, match="prompt token"):
        chats.completions.create(model="tiny", prompt=[1, 10**6], max_tokens=0, echo=True)
    many: Any = [[1] * 400] * 100
    with pytest.raises(openai.BadRequestError, match=r"would have 1680000 tokens.*1048576 are allowed"):
        chats.completions.create(model="tiny", prompt=many, n=2, max_tokens=0, echo=True, logprobs=20)
    with pytest.raises(openai.BadRequestError, match="would have 1280000 tokens"):
        chats.completions.create(model="tiny", prompt=[[1] * 100] * 100, n=128, max_tokens=0, echo=True)
    with pytest.raises(openai.BadRequestError, match="echo"):
        chats.chat.completions.create(model="tiny", messages=QUESTION, extra_body={"echo": True})


def test_the_client_lists_and_describes_models(chats: openai.OpenAI, checkpoint: tuple[str, Any]) -> None:
    names = [model.id for model in chats.models.list()]
    assert names[0] == "tiny"
    assert checkpoint[0] in names
    assert chats.models.retrieve(checkpoint[0]).id == checkpoint[0]


def test_errors_are_the_clients_own(chats: openai.OpenAI, checkpoint: tuple[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no checkpoint"):
        chats.chat.completions.create(model=f"{checkpoint[0]}-gone", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        chats.chat.completions.create(model="tiny", messages=QUESTION, frequency_penalty=1.0)
    with pytest.raises(openai.BadRequestError, match="4095 are allowed"):
        chats.completions.create(model="tiny", prompt=[1] * 5000, max_tokens=1)


# Anthropic


def test_a_message_and_its_stream_say_the_same(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "system": "Be brief.", "extra_body": GREEDY}
    asked["messages"] = QUESTION[1:]
    message = claude.messages.create(**asked)
    counted = claude.messages.count_tokens(model="tiny", system="Be brief.", messages=QUESTION[1:])
    assert counted.input_tokens == len(PROMPT)
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(PROMPT)
    assert message.stop_reason in ("end_turn", "max_tokens")
    (block,) = message.content
    assert block.type == "text"
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.stop_reason == message.stop_reason
    assert final.usage.output_tokens == usage.output_tokens
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == len(PROMPT)


def test_a_message_ends_at_its_stop_sequence(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "messages": QUESTION[1:], "extra_body": GREEDY}
    (block,) = claude.messages.create(**asked).content
    assert block.type == "text"
    message = claude.messages.create(**asked, stop_sequences=[block.text[1:3]])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", block.text[1:3])
    assert "".join(block.text for block in message.content if block.type == "text") == block.text[:1]


def test_anthropics_client_gets_its_errors_and_models(claude: anthropic.Anthropic, checkpoint: tuple[str, Any]) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no checkpoint"):
        claude.messages.create(model=f"{checkpoint[0]}-gone", max_tokens=3, messages=QUESTION[1:])
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        claude.messages.create(
            model="tiny",
            max_tokens=2000,
            messages=QUESTION[1:],
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
    assert next(model.id for model in claude.models.list()) == "tiny"


def test_both_clients_find_their_routes_under_v1_too(server: LocalServer) -> None:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="tml-local") as client:
        assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2).choices
        assert [model.id for model in client.models.list()]
    with anthropic.Anthropic(base_url=server.base_url, auth_token="tml-local", api_key=None) as client:
        assert client.messages.create(model="tiny", messages=QUESTION[1:], max_tokens=2).usage.output_tokens == 2
        assert [model.id for model in client.models.list()]


def test_the_examples_of_the_documentation_run(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "openai-and-anthropic.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example.replace("http://127.0.0.1:8000", server.base_url), {})
    assert "Usage(" in capsys.readouterr().out


# What happens to a stream when the engine dies


def test_a_stream_outlives_the_engine(tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data", tmp_path / "log.txt", ["--threads", "1"]) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="tml-local", max_retries=0)
        chunks: list[Completion] = []
        stream = client.completions.create(**LONG, max_tokens=600, stream=True)
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 3:
                server.processes()["engine"].kill()
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert "killed by SIGKILL" in server.tail(20_000)
        assert text == client.completions.create(**LONG, max_tokens=600).choices[0].text
        client.close()
