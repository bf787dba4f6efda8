"""Prompts as a part of their completions: which numbers their tokens have, and where they are in the text."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing

from tinsmith.api.chat.echoes import Echo, joined
from tinsmith.api.chat.generation import Ask
from tinsmith.api.chat.openai import _check_echoed
from tinsmith.api.chat.openai_answers import TextWriter
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.demo import tiny_folder
from tinsmith.errors import UserError
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress

WORDS = Vocabulary(tiny_folder())
NOTHING = np.empty(0, np.int32)


def told(tokens: list[int], top_ids: list[list[int]], top_logprobs: list[list[float]]) -> Any:
    """What an answer says of a sample's tokens."""
    writer = TextWriter("tiny", WORDS, logprobs=True)
    part = Progress("", 0, 0, tokens, [-1.0] * len(tokens), top_ids, top_logprobs)
    return writer.news(0, part, [])[0].choices[0].logprobs  # type: ignore[attr-defined]


def test_a_token_has_the_same_logprob_by_itself_as_among_the_likeliest() -> None:
    """By that, evaluations tell whether a model would have written it."""
    prompt = [5, 6, 7]
    own = np.array([np.nan, -0.1, -2.0], np.float32)
    near = np.nextafter(own, np.float32(0))
    extras = {
        "prompt_logprobs": own,
        "topk_prompt_ids": np.array([[0, 0], [6, 9], [9, 7]], np.int32),
        "topk_prompt_logprobs": np.array([[-99999, -99999], [near[1], -3], [-0.5, near[2]]], np.float32),
    }
    output = SampleOutput(NOTHING, NOTHING.astype(np.float32), np.zeros(2, np.int64), np.zeros(1, np.int8), 0, extras)
    sampled = Progress("", 0, 0, [8], [-1.0], [[8, 5]], [[-1.0, -2.0]])
    sample = joined(Echo(None, prompt).scored(output), sampled)
    assert sample.tokens == [5, 6, 7, 8]
    assert sample.logprobs[1:] == [own[1], own[2], -1.0]
    assert sample.top_ids == [[], [6, 9], [9, 7], [8, 5]]
    assert sample.top_logprobs == [[], [own[1], -3], [-0.5, own[2]], [-1.0, -2.0]]


def test_tokens_begin_where_their_characters_do() -> None:
    text = "aéz\U0001f600!"
    tokens = WORDS.encode(text)
    assert len(tokens) > len(text), "some characters take several tokens here"
    before = b""
    for token, offset in zip(tokens, told(tokens, [], []).text_offset, strict=True):
        assert offset == len(before.decode(errors="ignore"))
        before += WORDS.token_bytes(token)


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """Of a tokenizer that puts a token and a space before every text, as Llama 2's."""
    tokenizer = Tokenizer(Unigram([(word, -1.0) for word in ("<unk>", "<s>", "▁", "▁What", "▁is", "▁it")], 0))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("beginning")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Vocabulary(folder)


@pytest.mark.parametrize(
    ("text", "expected"), [("What is it", [0, 0, 4, 7]), ("is", [0, 0]), (" is it", [0, 0, 3]), (None, [0, 3, 8, 11])]
)
def test_what_a_tokenizer_puts_before_a_text_takes_no_place(
    beginning: Vocabulary, text: str | None, expected: list[int]
) -> None:
    tokens = beginning.encode(text or "What is it", specials=True)
    front = Echo(text, tokens).front(beginning)
    writer = TextWriter("tiny", beginning, logprobs=True, fronts=[front, front])
    for index in range(2):
        part = Progress("", index, 0, tokens, [-1.0] * len(tokens), [], [])
        scores: Any = writer.news(index, part, [])[0]
        assert scores.choices[0].logprobs.text_offset == expected


def test_of_likely_tokens_with_the_same_text_the_likeliest_is_told() -> None:
    first, second = WORDS.encode("é")
    scores = told([first], [[first, second]], [[-0.25, -4.0]])
    assert scores.top_logprobs == [{"\ufffd": -0.25}]


@pytest.mark.parametrize(("tokens", "samples", "top"), [(2**20 + 1, 1, 0), (10_000, 105, 0), (10_000, 1, 104)])
def test_an_answer_repeats_no_more_than_it_can_hold(tokens: int, samples: int, top: int) -> None:
    _check_echoed([Ask([1] * 9_000, samples=116, top_logprobs=0)])
    with pytest.raises(UserError, match="1048576 are allowed"):
        _check_echoed([Ask([1] * tokens, samples=samples, top_logprobs=top)])
