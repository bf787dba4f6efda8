"""The embedded model: its files, its tokenizer, its template, and that it answers sums with numbers."""

from functools import cache
from itertools import islice
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinsmith.demo import tiny_folder
from tinsmith.demo.corpus import BOXED, CHATML, CHATML_NO_THINKING, LAYOUTS, conversation, prompt, stream, turn
from tinsmith.demo.grading import Format, formats, grade
from tinsmith.demo.problems import held_out, problem, sum_problem, word_problem

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder())


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32).eval()


def encode(texts: list[str]) -> list[int]:
    return [token for text in texts for token in tokenizer().encode(text, add_special_tokens=False)]


def answer(form: Format, question: str, new_tokens: int = 24) -> str:
    """The greedy reply to one question."""
    prompt_1T = torch.tensor([encode(form.prompt(question))])
    reply_1T = model().generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=new_tokens, do_sample=False
    )
    return str(tokenizer().decode(reply_1T[0, prompt_1T.shape[1] :]))


def test_the_folder_is_complete_and_small() -> None:
    assert sorted(file.name for file in tiny_folder().iterdir()) == sorted(FILES)
    assert sum(file.stat().st_size for file in tiny_folder().iterdir()) < 8 * 2**20


def test_the_model_is_a_qwen3_of_one_to_three_million_parameters_in_bf16() -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype="auto")
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    assert loaded.config.tie_word_embeddings
    assert loaded.config.vocab_size == len(tokenizer())
    assert loaded.dtype == torch.bfloat16
    assert 1e6 < loaded.num_parameters() < 3e6


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"])
def test_control_tokens_are_single_tokens(token: str) -> None:
    assert len(encode([token])) == 1
    assert tokenizer().decode(encode([token])) == token


def test_every_digit_is_a_token_of_its_own() -> None:
    assert [tokenizer().decode([token]) for token in encode(["What is 47 + 103?"])] == [
        *("What", " is"),
        *(" 4", "7", " +"),
        *(" 1", "0", "3", "?"),
    ]


@pytest.mark.parametrize("text", ["Ünïcode 漢字 🎈\t\r\n\n  x", "User: a\n\nAssistant: b\n\nUser:", "a  <think>\n"])
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert tokenizer().decode(encode([text])) == text


def test_pieces_meet_at_token_boundaries() -> None:
    for pieces in islice(stream(5), 50):
        texts = [piece.text for piece in pieces]
        assert encode(texts) == encode(["".join(texts)])


def test_a_reply_to_a_sum_and_its_end_fit_the_five_tokens_that_the_arithmetic_recipe_allows() -> None:
    assert len(encode([" 200\n\nUser:"])) == 5
    assert len(encode(["200<|im_end|>"])) == 4


@pytest.mark.parametrize(("layout", "options"), [(CHATML, {}), (CHATML_NO_THINKING, {"enable_thinking": False})])
def test_the_chat_template_writes_what_the_model_was_trained_on(layout: str, options: dict[str, bool]) -> None:
    before = [("What is 4 + 5?", "9")]
    messages = [
        {"role": "user", "content": "What is 4 + 5?"},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    rendered = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert rendered == "".join(piece.text for piece in prompt(layout, before, "What is 1 + 1?"))


@pytest.mark.parametrize("form", [form for form in formats() if form.kind == "sum"], ids=lambda form: form.name)
def test_greedy_replies_to_sums_are_numbers_in_the_form_asked_for(form: Format) -> None:
    for question in ("What is 2 + 3?", "What is 20 + 30?", "What is 47 + 38?"):
        said, stop, _ = answer(form, question).partition(form.stop.strip())
        assert stop, f"the reply {said!r} does not end with {form.stop!r}"
        number = said.strip().removeprefix(r"\boxed{").removesuffix("}")
        assert number.isdecimal(), said
        assert (r"\boxed{" in said) == bool(form.request)


def test_the_model_adds_better_than_it_guesses() -> None:
    form = Format(CHATML, "sum", BOXED, has_example=True)
    problems = form.problems(30)
    right = sum(grade(answer(form, task.question), form, task.answer).is_right for task in problems)
    assert right >= 10


def test_the_stream_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first = list(islice(stream(3), 20))
    assert first == list(islice(stream(3), 20))
    assert first != list(islice(stream(4), 20))


def test_the_stream_never_asks_what_the_examination_asks() -> None:
    examined = {task.question for make in (sum_problem, word_problem) for task in held_out(make, 200)}
    asked = "".join(piece.text for pieces in islice(stream(7), 3_000) for piece in pieces)
    found = [question for question in examined if question in asked]
    assert found == []


def test_worked_answers_are_right() -> None:
    rng = Random(11)
    for _ in range(500):
        task = problem(rng)
        left, _, right = task.working.partition(" = ")
        assert int(right or left) == task.answer
        if right:
            x, sign, y = left.split()
            assert {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[sign] == task.answer
            assert task.answer >= 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_is_what_precedes_the_last_reply(layout: str) -> None:
    rng = Random(1)
    turns = [turn(sum_problem(rng), BOXED) for _ in range(2)]
    asked = "".join(piece.text for piece in prompt(layout, turns[:1], turns[1][0]))
    whole = "".join(piece.text for piece in conversation(layout, turns))
    assert whole.startswith(asked)
    assert whole[len(asked) :].strip().startswith(turns[1][1])


def test_grades_read_the_last_number_in_the_form_asked_for() -> None:
    plain, boxed = Format("role_colon", "sum", "", False), Format(CHATML, "word", BOXED, False)
    assert grade(" 4 + 5 = 9\n\nUser:", plain, 9).is_right
    assert not grade(" 8\n\nUser: 9", plain, 9).is_right
    assert not grade("9<|im_end|>", boxed, 9).is_right
    assert grade(r"4 + 5 = 9. \boxed{9}<|im_end|>", boxed, 9).is_right
    assert not grade(r"\boxed{9}", boxed, 9).is_ended
