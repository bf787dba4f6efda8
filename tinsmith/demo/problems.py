"""One-step arithmetic problems, as questions with worked answers: what the embedded model is taught and tested on.

Knows numbers, names and sentences; nothing of chat layouts, tokens or models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its answer, and the one step that leads there ("3 + 4 = 7"; a bare number for a bare sum)."""

    question: str
    working: str
    answer: int


LARGEST_TERM = 100
"""Sums are of two numbers from 0 to this, both included."""

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Ella",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Kira",
    "Leo",
    "Maya",
    "Nina",
    "Omar",
    "Pia",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
    "Uma",
    "Vera",
    "Will",
    "Zoe",
    "Alice",
    "Bob",
    "Clara",
    "David",
    "Emma",
    "Lena",
    "Max",
    "Natalia",
    "Tom",
    "Weng",
]
THINGS = [
    "apples",
    "books",
    "cards",
    "coins",
    "cookies",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "stickers",
    "stamps",
    "shells",
    "pears",
    "buttons",
    "toys",
    "balloons",
    "cups",
    "candles",
    "oranges",
    "photos",
    "stones",
    "tickets",
    "muffins",
    "beads",
    "keys",
]
BOXES = ["bags", "boxes", "baskets", "jars", "shelves", "trays", "rows", "packs"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLACES = ["garden", "shop", "kitchen", "school", "library", "market", "park", "office"]


def sum_problem(rng: Random) -> Problem:
    """The bare question "What is x + y?"."""
    x, y = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
    return Problem(f"What is {x} + {y}?", str(x + y), x + y)


def word_problem(rng: Random) -> Problem:
    """A story of one or two sentences that one addition, subtraction or multiplication solves."""
    return rng.choices((_addition_story, _subtraction_story, _multiplication_story), weights=(3, 2, 1))[0](rng)


def problem(rng: Random) -> Problem:
    """A bare sum or a story, equally likely."""
    return (sum_problem if rng.random() < 0.5 else word_problem)(rng)


def _addition_story(rng: Random) -> Problem:
    x, y = rng.randint(2, 60), rng.randint(2, 40)
    name, other = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    day, next_day = rng.sample(DAYS, 2)
    question = rng.choice(
        (
            f"{name} has {x} {thing} and {other} has {y} {thing}. How many {thing} do they have altogether?",
            f"{name} has {x} {thing}. {other} gives {name} {y} more. How many {thing} does {name} have now?",
            f"{name} sold {x} {thing} on {day} and {y} {thing} on {next_day}. How many {thing} did {name} sell in all?",
            f"There are {x} {thing} in the {place}. {name} brings {y} more. How many {thing} are there now?",
            f"{name} found {x} {thing} in the {place} and {y} at home. How many {thing} is that in total?",
            f"A book costs {x} dollars and a lamp costs {y} dollars. How much does {name} pay for both?",
        )
    )
    return Problem(question, f"{x} + {y} = {x + y}", x + y)


def _subtraction_story(rng: Random) -> Problem:
    x = rng.randint(5, 80)
    y = rng.randint(1, x - 1)
    name, other = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    question = rng.choice(
        (
            f"{name} had {x} {thing} and gave {y} to {other}. How many {thing} are left?",
            f"{name} bought {x} {thing}. On the way home {name} lost {y}. How many {thing} does {name} still have?",
            f"There were {x} {thing} in the {place}. {name} took {y} of them. How many {thing} remain?",
            f"{name} has {x} dollars and spends {y} dollars. How many dollars are left?",
            f"{name} has {x} {thing} and {other} has {y}. How many more {thing} does {name} have than {other}?",
        )
    )
    return Problem(question, f"{x} - {y} = {x - y}", x - y)


def _multiplication_story(rng: Random) -> Problem:
    x, y = rng.randint(2, 9), rng.randint(2, 9)
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    question = rng.choice(
        (
            f"{name} has {x} {box} with {y} {thing} in each. How many {thing} does {name} have?",
            f"There are {x} {box} of {y} {thing}. How many {thing} are there altogether?",
            f"{name} reads {x} pages a day. How many pages does {name} read in {y} days?",
            f"{name} buys {x} {thing} for {y} dollars each. How much does {name} pay?",
        )
    )
    return Problem(question, f"{x} * {y} = {x * y}", x * y)


def held_out(make: Callable[[Random], Problem], count: int, seed: int = 2026) -> list[Problem]:
    """The `count` problems of one kind that evaluation asks and that no training stream contains."""
    rng = Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        candidate = make(rng)
        found.setdefault(candidate.question, candidate)
    return list(found.values())
