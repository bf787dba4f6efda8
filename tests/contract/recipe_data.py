"""Data sets under the names that the cookbook's recipes load, as local folders: written from seeds, no network."""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

TRAIN, TEST = 400, 16
DISTINCT_SUMS = 8
PREFERENCES_TEST, PREFERENCES_SCORED = 1024, 32  # rows that the recipe takes; pairs among them
GSM8K_README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train.jsonl
  - split: test
    path: main/test.jsonl
---
"""


def write_all(folder: Path) -> None:
    """Every data set, each at its name below `folder`."""
    _write_gsm8k(folder / "openai/gsm8k")
    _write_no_robots(folder / "HuggingFaceH4/no_robots/data")
    _write_preferences(folder / "Anthropic/hh-rlhf")


def _write_gsm8k(folder: Path) -> None:
    """A few sums, again and again, in GSM8K's form: the answer follows four hash signs."""
    rng = Random(1)
    terms = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(DISTINCT_SUMS)]
    rows = [{"question": f"What is {x} + {y}?", "answer": f"{x} + {y} = {x + y}\n#### {x + y}"} for x, y in terms]
    for split, count in (("train", TRAIN), ("test", TEST)):
        write_rows(folder / "main" / f"{split}.jsonl", itertools.islice(itertools.cycle(rows), count))
    (folder / "README.md").write_text(GSM8K_README)


def _write_no_robots(folder: Path) -> None:
    """Instructions with replies that the tiny model has not seen: prices in words."""
    for split, count, seed in (("train", TRAIN, 3), ("test", TEST, 4)):
        rng = Random(seed)
        write_rows(folder / f"{split}.jsonl", (_instruction(rng, place) for place in range(count)))


def _instruction(rng: Random, place: int) -> dict[str, object]:
    fruit, price = rng.choice(("apples", "pears", "plums", "cherries")), rng.randint(2, 9)
    question = f"What do {price} baskets of {fruit} cost at the market?"
    reply = f"At the market, {price} baskets of {fruit} cost {price * 3} silver coins."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"prompt": question, "prompt_id": str(place), "messages": messages, "category": "Open QA"}


def _write_preferences(folder: Path) -> None:
    """Short requests; the chosen reply is polite, the rejected one is not. The recipe skips rows without a choice."""
    for split, count, pairs, seed in (("train", TRAIN, TRAIN, 5), ("test", PREFERENCES_TEST, PREFERENCES_SCORED, 6)):
        rng = Random(seed)
        rows = [_preference(rng) for _ in range(count)]
        rows[pairs:] = [{"chosen": row["chosen"], "rejected": row["chosen"]} for row in rows[pairs:]]
        write_rows(folder / f"{split}.jsonl", rows)


def _preference(rng: Random) -> dict[str, str]:
    asked = f"\n\nHuman: {rng.randint(0, 99)}?\n\nAssistant:"
    return {"chosen": f"{asked} Yes", "rejected": f"{asked} No"}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
