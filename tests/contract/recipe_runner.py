"""Runs the cookbook's recipes as `python -m` would, each in a process of its own, and imports their libraries once.

A program: it reads one JSON order a line ({"module", "arguments", "folder", "log"}), forks, lets the child become the
recipe, and answers with the child's exit code. The recipes themselves are never imported here, only run.
"""

import importlib
import json
import os
import runpy
import sys
from typing import NoReturn

LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "tinker",
    "tinker_cookbook.rl.train",
    "tinker_cookbook.supervised.train",
    "tinker_cookbook.preference.train_dpo",
    "tinker_cookbook.recipes.math_rl.math_env",
    "tinker_cookbook.recipes.math_rl.arithmetic_env",
)


def main() -> None:
    """Takes orders until its input ends."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            become(order["module"], order["arguments"], order["folder"], order["log"])
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(module: str, arguments: list[str], folder: str, log: str) -> NoReturn:
    """The recipe's process."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
