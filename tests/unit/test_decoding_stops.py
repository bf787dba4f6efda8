"""Stop strings are found wherever they end, and nowhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinsmith.sampling.stopping import StopStrings, end_of_sequence_tokens

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ċ", "Ċ"), ("U", "s"), ("e", "r"), ("Us", "er"), ("ĊĊ", "User"), ("r", ":"), ("ð", "Ł"), ("x", "Ċ")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens cut through stop strings and through characters."""
    vocab = {token: index for index, token in enumerate([*ALPHABET, *("".join(pair) for pair in MERGES)])}
    inner = Tokenizer(models.BPE(vocab, MERGES))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!")


def ids(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(pieces))


def first_stop(tokenizer: PreTrainedTokenizerFast, strings: list[str], tokens: list[int]) -> int | None:
    stops = StopStrings(tokenizer)
    return next((end for end in range(1, len(tokens) + 1) if stops.found(strings, tokens[:end])), None)


@pytest.mark.parametrize(
    ("pieces", "string", "expected"),
    [
        (["a", "Ċ", "Ċ", "User", ":"], "\n\nUser:", 5),
        (["a", "ĊĊ", "Us", "e", "r:", "b"], "\n\nUser:", 5),
        (["a", "ĊĊUser", ":"], "\n\nUser:", 3),
        (["a", "xĊ", "b"], "\n", 2),  # ends inside a token, which stays whole
        (["a", "r:"], "r", 2),
        (["ð", "Ł", "ĺ", "Ģ", "a"], "😀", 4),
        (["ðŁ", "ĺ", "Ģ"], "😀", 3),
        (["Ã", "©", "a"], "é", 2),
        (["a", "Ġ", "b"], " ", 2),
        (["a", "b", "c"], "d", None),
        (["Ċ", "a", "Ċ", "User", ":"], "\n\nUser:", None),
    ],
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(tokenizer, pieces, string, expected):
    assert first_stop(tokenizer, [string], ids(tokenizer, *pieces)) == expected


@given(data=st.data())
def test_detection_agrees_with_searching_the_whole_text(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, len(ALPHABET) + len(MERGES) - 1), min_size=1, max_size=30))
    text = tokenizer.decode(tokens)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    string = text[start : start + data.draw(st.integers(1, 6))] or "a"
    if "\ufffd" in string:
        return
    by_search = next((end for end in range(1, len(tokens) + 1) if string in tokenizer.decode(tokens[:end])), None)
    assert first_stop(tokenizer, [string], tokens) == by_search


def test_the_end_tokens_come_from_model_and_tokenizer(tokenizer):
    class Generation:
        eos_token_id: int | list[int] | None

    generation = Generation()
    own = tokenizer.eos_token_id
    for configured, expected in ((7, {7, own}), ([7, 8], {7, 8, own}), (None, {own})):
        generation.eos_token_id = configured
        assert end_of_sequence_tokens(generation, tokenizer) == expected
    assert end_of_sequence_tokens(None, tokenizer) == {own}
