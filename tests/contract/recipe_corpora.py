"""Data sets for the recipes that only `make recipes` runs, beside those of `recipe_data`: from seeds, no network.

Each function writes one data set at the name that its recipe loads, or at the path that its command line names.
"""

import csv
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

from tests.contract.recipe_data import write_rows

HELD_BACK = 1024  # rows that several recipes set aside for tests before they train on the rest
ROWS = 64
SPLIT = datetime(2025, 10, 20, tzinfo=UTC)  # where the forecasting recipes divide their markets
FRUITS = ("apples", "pears", "plums", "cherries", "grapes", "figs")
LANGUAGES = {
    "en": "the cat is in the garden and the dog is on the street",
    "de": "der Hund ist nicht im Garten und die Katze schläft",
    "es": "el gato no está en la casa y el perro es grande",
    "fr": "le chat est dans la maison et le chien est très grand",
}


def write_all(folder: Path) -> None:
    """Every data set, below `folder`."""
    writers: tuple[Callable[[Path], None], ...] = (
        _write_chats,
        _write_problems,
        _write_preferences,
        _write_thoughts,
        _write_science,
        _write_tools,
        _write_markets,
        _write_articles,
        _write_sentences,
    )
    for write in writers:
        write(folder)


def _configs(folder: Path, splits: dict[str, list[str]]) -> None:
    """A card that names each configuration's splits, all at CONFIG/SPLIT.jsonl."""
    lines = ["---", "configs:"]
    for name, parts in splits.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for part in parts for line in (f"  - split: {part}", f"    path: {name}/{part}.jsonl")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _sums(seed: int, count: int) -> Iterator[tuple[str, int]]:
    rng = Random(seed)
    for _ in range(count):
        x, y = rng.randint(0, 99), rng.randint(0, 99)
        yield f"What is {x} + {y}?", x + y


def _chat(rng: Random) -> dict[str, object]:
    fruit, count = rng.choice(FRUITS), rng.randint(2, 9)
    question, reply = f"How many {fruit}?", f"There are {count} {fruit}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def _write_chats(folder: Path) -> None:
    rng = Random(11)
    write_rows(folder / "chats.jsonl", [_chat(rng) for _ in range(ROWS)])
    tulu = folder / "allenai/tulu-3-sft-mixture/data/train.jsonl"
    write_rows(tulu, [_chat(rng) for _ in range(HELD_BACK + ROWS)])


def _write_problems(folder: Path) -> None:
    """Four sets of sums with their answers in boxes, as sets of mathematical problems have them."""
    math = folder / "EleutherAI/hendrycks_math"
    _configs(math, {"algebra": ["train", "test"], "geometry": ["train", "test"]})
    for seed, part in enumerate(("algebra/train", "algebra/test", "geometry/train", "geometry/test")):
        rows = [{"problem": problem, "solution": rf"\boxed{{{answer}}}"} for problem, answer in _sums(seed, ROWS)]
        write_rows(math / f"{part}.jsonl", rows)
    tests = [{"problem": f"{problem} ", "solution": rf"\boxed{{{answer}}}"} for problem, answer in _sums(5, 8)]
    write_rows(folder / "HuggingFaceH4/MATH-500/test.jsonl", tests)
    polaris = [{"problem": problem, "answer": str(answer)} for problem, answer in _sums(6, ROWS)]
    write_rows(folder / "POLARIS-Project/Polaris-Dataset-53K/data/train.jsonl", polaris)
    deep = [{"question": problem, "final_answer": str(answer)} for problem, answer in _sums(7, ROWS)]
    write_rows(folder / "zwhe99/DeepMath-103K/data/train.jsonl", deep)


def _write_preferences(folder: Path) -> None:
    """Yes is liked better than no."""
    _configs(folder / "nvidia/HelpSteer3", {"preference": ["train", "validation"]})
    for part in ("train", "validation"):
        rows = [
            {
                "context": [{"role": "user", "content": problem}],
                "response1": "Yes" if answer % 2 else "No",
                "response2": "No" if answer % 2 else "Yes",
                "overall_preference": -1 if answer % 2 else 1,
            }
            for problem, answer in _sums(8, ROWS)
        ]
        write_rows(folder / f"nvidia/HelpSteer3/preference/{part}.jsonl", rows)
    pairs = [
        {"instruction": problem, "chosen_response": "Yes", "rejected_response": "No"}
        for problem, _ in _sums(9, HELD_BACK + ROWS)
    ]
    write_rows(folder / "argilla/ultrafeedback-binarized-preferences/data/train.jsonl", pairs)


def _write_thoughts(folder: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": problem}, {"from": "gpt", "value": f"So it is {answer}."}]}
        for problem, answer in _sums(10, 2 * ROWS)
    ]
    write_rows(folder / "open-thoughts/OpenThoughts3-1.2M/data/train.jsonl", rows)


def _write_science(folder: Path) -> None:
    rng = Random(12)
    rows: list[dict[str, object]] = []
    for _ in range(ROWS):
        mass, place = rng.randint(1, 99), rng.randrange(4)
        texts = [str(mass + shift - place) for shift in range(4)]
        question = f"Which number is {mass}?"
        about = {"domain": "Chemistry", "details": {"level": "L3"}, "type": "mcq-4-choices"}
        choices = {"label": list("ABCD"), "text": texts}
        rows.append({**about, "question": question, "choices": choices, "answerKey": "ABCD"[place]})
    write_rows(folder / "hicai-zju/SciKnowEval/test.jsonl", rows)


def _write_tools(folder: Path) -> None:
    rng = Random(13)
    rows = [{"instruction": f"Buy {(fruit := rng.choice(FRUITS))}.", "output": f"buy({fruit})"} for _ in range(ROWS)]
    write_rows(folder / "tangqiaoyu/ToolAlpaca/data/train.jsonl", rows)


def _write_markets(folder: Path) -> None:
    """Questions with a known end, half of them closed before the day that divides them, half opened after it."""
    columns = ("submission_id", "event_ticker", "title", "snapshot_time", "close_time", "market_outcome")
    with (folder / "markets.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*columns, "category", "markets", "sources"])
        table.writeheader()
        for place in range(ROWS):
            opened = SPLIT + timedelta(days=place + 1 if place % 2 else -place - 10)
            outcome = place // 2 % 2
            table.writerow(
                {
                    "submission_id": f"submission-{place}",
                    "event_ticker": f"EVENT-{place}",
                    "title": f"Price of {FRUITS[place % len(FRUITS)]}",
                    "snapshot_time": opened.isoformat(),
                    "close_time": (opened + timedelta(days=2)).isoformat(),
                    "market_outcome": json.dumps({"It rises": outcome}),
                    "category": "markets",
                    "markets": json.dumps(["It rises"]),
                    "sources": json.dumps([{"title": "News", "summary": "up" if outcome else "down", "ranking": 1}]),
                }
            )


def _write_articles(folder: Path) -> None:
    articles = folder / "Salesforce/wikitext"
    _configs(articles, {"wikitext-103-raw-v1": ["train"]})
    rng = Random(14)
    words = ("the", "river", "until", "later", "after", "stone", "their", "bridge", "when", "many", "old", "town")
    rows = [{"text": " ".join(rng.choice(words) for _ in range(200)) + "\n"} for _ in range(ROWS)]
    write_rows(articles / "wikitext-103-raw-v1/train.jsonl", rows)


def _write_sentences(folder: Path) -> None:
    sentences = folder / "tinker_cookbook/example_data/multilingual.txt"
    sentences.parent.mkdir(parents=True, exist_ok=True)
    sentences.write_text("".join(f"{sentence}\n" for sentence in LANGUAGES.values()))
    rows = [
        {"messages": [{"role": "user", "content": sentence}, {"role": "assistant", "content": language}]}
        for language, sentence in list(LANGUAGES.items()) * 8
    ]
    write_rows(folder / "languages.jsonl", rows)
