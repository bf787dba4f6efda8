"""Runs the recipes of `recipe_list` to their ends against one server of the embedded model: `make recipes`.

Prints a table of what came out, and ends with the number of recipes that failed. Arguments: names of recipes (all, if
none is named); `--write` puts the table into docs/recipes.md; `--keep FOLDER` works there and leaves everything.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.contract import recipe_corpora, recipe_data
from tests.contract.cookbook import Cookbook, Metrics, opened_cookbook
from tests.contract.recipe_list import RECIPES, TOKENIZERS, Recipe
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import CLIENT_ENVIRONMENT, LocalServer

SECONDS = 600.0
EXTRA_PACKAGES = Path(sys.prefix) / "recipes"
TRAINED = "tokens/cumulative/trained"
PAGE = Path("docs/recipes.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Outcome:
    """What one run came to: `words` for the table, and what went wrong, if anything did."""

    recipe: Recipe
    words: str
    failure: str = ""


def main() -> int:
    """Runs what the command line asks for; the number of recipes that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    unknown = set(asked.names) - {recipe.name for recipe in RECIPES}
    if unknown:
        parser.error(
            f"no recipe is called {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in RECIPES)}"
        )
    if asked.names and asked.write:
        parser.error("--write is for a run of all recipes: the page's table is made anew")
    chosen = [recipe for recipe in RECIPES if recipe.name in asked.names or not asked.names]
    os.environ |= CLIENT_ENVIRONMENT
    with ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recipes-")))
        prepare(folder)
        arguments = ["--alias", "*=tiny", "--threads", "1"]
        server = stack.enter_context(LocalServer(folder / "server", folder / "server.log", arguments))
        cookbook = stack.enter_context(opened_cookbook(folder, server.client_environment(), SECONDS))
        outcomes = [told(cookbook, recipe) for recipe in chosen]
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} recipes ran to their ends")
    if asked.write:
        write_table(PAGE, outcomes)
    return failed


def prepare(folder: Path) -> None:
    """The data sets and the tokenizers that the recipes load, at the names by which they ask for them."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe_data.write_all(folder)
    recipe_corpora.write_all(folder)
    for name in TOKENIZERS:
        left_out = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tiny_folder(), folder / name, ignore=left_out, dirs_exist_ok=True)


def told(cookbook: Cookbook, recipe: Recipe) -> Outcome:
    """Runs one recipe, and says on the terminal what came of it."""
    began = time.monotonic()
    outcome = outcome_of(cookbook, recipe)
    state = "FAILED" if outcome.failure else "ok"
    print(f"{recipe.name:26} {state:6} {time.monotonic() - began:5.0f} s  {outcome.words}", flush=True)
    if outcome.failure:
        print(outcome.failure, flush=True)
    return outcome


def outcome_of(cookbook: Cookbook, recipe: Recipe) -> Outcome:
    """Runs one recipe and checks what it promises to leave."""
    extra = str(EXTRA_PACKAGES) if recipe.extra else ""
    code = cookbook.start(recipe.module, recipe.name, recipe.command_line, said=recipe.said, path=extra)
    if code:
        return Outcome(recipe, f"exit code {code}", cookbook.output(recipe.name)[-3000:])
    if recipe.proof:
        printed = cookbook.output(recipe.name)
        found = [line[line.index(recipe.proof) :].strip(" ,") for line in printed.splitlines() if recipe.proof in line]
        return Outcome(recipe, found[-1]) if found else Outcome(recipe, f"never said {recipe.proof!r}", printed[-3000:])
    return outcome_of_training(recipe, cookbook.metrics(recipe.logs))


def outcome_of_training(recipe: Recipe, logged: Metrics) -> Outcome:
    """Checks that a recipe made all its steps, each with a finite value of its metric."""
    values = [entry[recipe.metric] for entry in logged if recipe.metric in entry]
    trained = max((entry.get(TRAINED, 0) for entry in logged), default=0)
    words = f"{len(values)} step{'s' if len(values) != 1 else ''}" + (
        f", {trained:,.0f} tokens trained" if trained else ""
    )
    if len(values) < recipe.steps or not all(map(math.isfinite, values)):
        seen = json.dumps(logged[-1], indent=1) if logged else "nothing"
        return Outcome(recipe, words, f"{recipe.metric} was to be logged {recipe.steps} times; the last entry: {seen}")
    return Outcome(recipe, f"{words}, {recipe.metric} {values[-1]:.4g}")


def write_table(page: Path, outcomes: list[Outcome]) -> None:
    """Puts the outcomes between the page's two marks."""
    rows = [
        f"| {outcome.recipe.name} | `{' '.join((outcome.recipe.module, *outcome.recipe.settings))}` "
        f"| {'**failed**: ' if outcome.failure else ''}{outcome.words} | {outcome.recipe.extra or '–'} |"
        for outcome in outcomes
    ]
    head = ["| recipe | module and settings | outcome | extra packages |", "|---|---|---|---|"]
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + "\n".join([BEGIN, *head, *rows, END]) + after)


if __name__ == "__main__":
    sys.exit(main())
