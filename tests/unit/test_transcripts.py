"""What clients read of sampled tokens: the same text in pieces as in one, no broken characters, stops, tool calls."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import Unigram
from transformers import AutoTokenizer

from tinsmith.api.chat.transcripts import Ending, Piece, ToolCall, Transcript
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.demo import tiny_folder

WORDS = Vocabulary(tiny_folder())
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
ADD = ToolCall("add", {"a": 1, "b": [2]})


def read(
    tokens: Sequence[int], *, size: int = 1, stops: Sequence[str] = (), tools: bool = False
) -> tuple[list[Piece], list[str], Ending]:
    """All pieces, neighbouring texts joined; the texts as they came; and the ending."""
    transcript = Transcript(WORDS, stops, tools=tools)
    came: list[Piece] = []
    for begin in range(0, len(tokens), size):
        came += transcript.feed(tokens[begin : begin + size])
    rest, ending = transcript.end(stopped=True)
    pieces: list[Piece] = []
    for piece in came + rest:
        if isinstance(piece, str) and pieces and isinstance(last := pieces[-1], str):
            pieces[-1] = last + piece
        else:
            pieces.append(piece)
    return pieces, [piece for piece in came if isinstance(piece, str)], ending


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """Words with the space before them in the token, which the decoder leaves out where a text begins: as Llama 2's."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁What", "▁is", "▁it", "s"]
    tokenizer = Tokenizer(Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    folder = tmp_path_factory.mktemp("spaced")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Vocabulary(folder)


@pytest.mark.parametrize("size", [1, 100])
def test_a_text_goes_on_with_the_space_of_its_next_word(spaced: Vocabulary, size: int) -> None:
    tokens = spaced.encode("What is it é s")
    assert spaced.decode(tokens) == "What is it é s"
    assert [spaced.token_bytes(token).decode(errors="replace") for token in tokens[:4]] == [" What", " is", " it", " "]
    assert b"".join(map(spaced.token_bytes, tokens)) == " What is it é s".encode()
    for after, expected in ((tokens[:2], " it é s"), ((), "it é s"), (spaced.encode("é")[:-1], "it é s")):
        transcript = Transcript(spaced, after=after)
        pieces: list[Piece] = []
        for begin in range(2, len(tokens), size):
            pieces += transcript.feed(tokens[begin : begin + size])
        assert joined(pieces + transcript.end(stopped=True)[0]) == expected


def test_a_stop_string_may_begin_with_the_space_before_the_first_word(spaced: Vocabulary) -> None:
    tokens = spaced.encode("What is it")
    transcript = Transcript(spaced, [" it"], after=tokens[:2])
    assert transcript.feed(tokens[2:]) == []
    assert transcript.end(stopped=False) == ([], Ending("stop", " it"))


@given(st.lists(st.integers(0, 511), max_size=40), st.integers(1, 7))
@settings(max_examples=150)
def test_text_in_pieces_is_the_text_in_one(tokens: list[int], size: int) -> None:
    assert joined(read(tokens, size=size)[0]) == joined(read(tokens, size=100)[0])


@given(st.text(max_size=30))
@settings(max_examples=150)
def test_no_piece_ends_within_a_character(text: str) -> None:
    tokens = WORDS.encode(text)
    pieces, came, _ = read(tokens)
    assert joined(pieces) == WORDS.decode(tokens)
    assert all("\ufffd" not in part for part in came) or "\ufffd" in text


def test_what_is_no_text_at_all_is_neither_kept_back_for_ever_nor_lost() -> None:
    broken = WORDS.encode("é")[:1] * 20
    pieces, came, _ = read(broken)
    assert came
    assert set(joined(pieces)) == {"\ufffd"}


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_text_ends_before_its_stop_string_however_it_comes(size: int) -> None:
    tokens = WORDS.encode("One, two, three. STOP and more")
    pieces, came, ending = read(tokens, size=size, stops=["ST OP", "STOP", "three!"])
    assert pieces == ["One, two, three. "]
    assert ending == Ending("stop", "STOP")
    assert "S" not in "".join(came)
    assert read(WORDS.encode("It is a STO"), size=size, stops=["STOP"])[0] == ["It is a STO"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tool_calls_are_parsed_and_the_text_before_them_kept(size: int) -> None:
    pieces, came, ending = read(WORDS.encode(f"I add.\n{CALL}\n{CALL}\n"), size=size, tools=True)
    assert pieces == ["I add.", ADD, ADD]
    assert ending == Ending("tool_calls")
    assert "<" not in "".join(came)
    assert read(WORDS.encode(f"I add.\n{CALL}"), size=size)[0] == [f"I add.\n{CALL}"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot JSON</tool_call>",
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "add", "arg',
        'So:\n\n<tool_call>\n{"name"',
        "a < b <tool",
        "It is 3.\n",
    ],
)
def test_what_is_no_tool_call_stays_text(text: str) -> None:
    pieces, _, ending = read(WORDS.encode(text), tools=True)
    assert pieces == [text]
    assert ending == Ending("stop")


def test_tokens_and_texts_are_those_of_transformers() -> None:
    theirs = AutoTokenizer.from_pretrained(tiny_folder())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was ist 2 + 2? 🙂 é"}]
    prompt = WORDS.template.render(messages)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert WORDS.encode(prompt) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    options = {"enable_thinking": False}
    assert WORDS.template.render(messages, options=options).endswith("</think>\n\n")
    for text in (prompt, "naïve 🙂"):
        assert WORDS.encode(text, specials=True) == theirs.encode(text)
        assert WORDS.decode(WORDS.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_the_bytes_of_a_texts_tokens_are_the_texts() -> None:
    text = "naïve 🙂\n and\tmore <|im_end|>"
    assert b"".join(WORDS.token_bytes(token) for token in WORDS.encode(text)) == text.encode()
