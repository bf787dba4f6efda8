"""The training text of the embedded model: an endless, seeded stream of short conversations in three chat layouts.

The layouts are those of the cookbook's renderers `role_colon`, `qwen3_instruct` and `qwen3`; the requests and the
few-shot turns are those of its reinforcement-learning recipes. Knows text only: tokens and weights are made elsewhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tinsmith.demo.problems import Problem, held_out, problem, sum_problem, word_problem

ROLE_COLON, CHATML, CHATML_NO_THINKING = "role_colon", "chatml", "chatml_no_thinking"
LAYOUTS = (ROLE_COLON, CHATML, CHATML_NO_THINKING)

PLAIN = ""
BOXED = r" Provide a numerical answer without units, written inside \boxed{}."
BOXED_SHORT = r" Write your answer in \boxed{} format."
REQUESTS = (PLAIN, BOXED, BOXED_SHORT)
"""What a question ends with, as the recipes for sums, `rl_loop` and `math_rl` write it."""

EMPTY_THINKING = "<think>\n\n</think>\n\n"
HELD_OUT_PER_KIND = 200


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenized on its own; `is_reply` marks what the assistant wrote."""

    text: str
    is_reply: bool = False


Turn = tuple[str, str]
"""A user's message and the reply to it."""

SUM_EXAMPLE: Turn = ("What is 4 + 5?", "9")

COUNTED = ("strawberry", "banana", "pepper", "coffee", "tomato", "cheese", "butter", "balloon", "mirror", "pineapple")
"""Words whose letters the worked example counts."""

GENERAL_TURNS: tuple[Turn, ...] = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What would you like to know?"),
    ("Good morning", "Good morning! What can I do for you?"),
    ("Who are you?", "I am a tiny language model. I can add small numbers."),
    ("What is your name?", "I am the tiny model that comes with Tinsmith."),
    ("What can you do?", "I can solve short sums and small word problems."),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome! Is there anything else?"),
    ("Goodbye", "Goodbye! Have a nice day."),
    ("Can you count to five?", "1, 2, 3, 4, 5."),
    ("Can you count to ten?", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("How many days are in a week?", "There are 7 days in a week."),
    ("How many months are in a year?", "There are 12 months in a year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."),
    (
        "Tell me a story.",
        "A small robot found a key in the garden. It opened a door and saw the sun. The robot was happy.",
    ),
    ("Tell me a joke.", "Why was six afraid of seven? Because seven ate nine."),
    ("Are you a person?", "No, I am a computer program."),
    ("Where do you live?", "I live on this computer."),
    ("What do cats like?", "Cats like fish, milk and warm places."),
    ("Write a short poem.", "The moon is bright, the night is long, the little bird will sing a song."),
    ("Help me, please.", "Of course. What do you need?"),
)


def letter_example(request: str, word: str, letter: str) -> Turn:
    """A worked example of counting letters, such as the recipes for boxed answers put before every question."""
    numbered = " ".join(f"{place}) {each}" for place, each in enumerate(word, 1))
    places = [str(place) for place, each in enumerate(word, 1) if each == letter]
    where = " and ".join(filter(None, (", ".join(places[:-1]), places[-1])))
    return (
        f"How many {letter}'s are in {word}?{request}",
        rf"Letter by letter, {word} is {numbered}. Number {where}: that is {letter}. \boxed{{{len(places)}}}",
    )


def examples(request: str, kind: str, word: str = COUNTED[0]) -> list[Turn]:
    """The few-shot turns that belong before a question with this request; `kind` is "sum" or "word".

    The example of a boxed answer counts how often the most frequent letter of `word` occurs.
    """
    if request:
        return [letter_example(request, word, max(word, key=word.count))]
    return [SUM_EXAMPLE] if kind == "sum" else []


def turn(task: Problem, request: str) -> Turn:
    """A problem asked with a request, and the reply that the model should learn."""
    if not request:
        return task.question, task.working
    working = "" if task.working == str(task.answer) else task.working + ". "
    return task.question + request, rf"{working}\boxed{{{task.answer}}}"


def prompt(layout: str, before: Sequence[Turn], question: str) -> list[Piece]:
    """What the model is given when it shall reply to `question` after the turns `before`."""
    replied, unanswered = conversation(layout, before), conversation(layout, [*before, (question, "")])
    asked = next(place for place, piece in enumerate(unanswered) if piece.is_reply and place >= len(replied))
    return unanswered[:asked]


def conversation(layout: str, turns: Sequence[Turn], thinks_empty: bool = False) -> list[Piece]:
    """Turns as text. With `thinks_empty` the last ChatML reply begins with an empty block of thoughts."""
    if layout == ROLE_COLON:
        return _role_colon(turns)
    pieces: list[Piece] = []
    for place, (question, reply) in enumerate(turns):
        is_last = place == len(turns) - 1
        opening = EMPTY_THINKING if is_last and layout == CHATML_NO_THINKING else ""
        thoughts = EMPTY_THINKING if is_last and thinks_empty and not opening else ""
        newline = "\n" if place else ""
        pieces.append(Piece(f"{newline}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{opening}"))
        pieces.append(Piece(f"{thoughts}{reply}<|im_end|>", is_reply=True))
    return pieces


def _role_colon(turns: Sequence[Turn]) -> list[Piece]:
    pieces = [Piece("User:")]
    for question, reply in turns:
        pieces += [Piece(f" {question}\n\n"), Piece("Assistant:")]
        pieces += [Piece(f" {reply}\n\n", is_reply=True), Piece("User:", is_reply=True)]
    return pieces


def stream(seed: int) -> Iterator[list[Piece]]:
    """Conversations without end; the same for the same seed, and without the problems that evaluation asks."""
    rng = Random(seed)
    kept_out = {task.question for make in (sum_problem, word_problem) for task in held_out(make, HELD_OUT_PER_KIND)}
    while True:
        layout = rng.choices(LAYOUTS, weights=(4, 4, 2))[0]
        yield conversation(layout, _turns(rng, kept_out), thinks_empty=rng.random() < 0.1)


def _turns(rng: Random, kept_out: set[str]) -> list[Turn]:
    if rng.random() < 0.04:
        return rng.sample(GENERAL_TURNS, rng.randint(1, 2))
    request = rng.choice(REQUESTS)
    turns: list[Turn] = []
    if rng.random() < 0.4:
        turns += examples(request, "sum", rng.choice(COUNTED))
    for _ in range(rng.randint(1, 4)):
        task = problem(rng)
        while task.question in kept_out:
            task = problem(rng)
        turns.append(turn(task, request))
    return turns
