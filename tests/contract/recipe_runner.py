"""Runs the cookbook's recipes as `python -m` would, each in a process of its own, and imports their libraries once.

A program: it reads one JSON order a line ({"module", "arguments", "folder", "input", "log", "path", "seconds"}), forks,
lets the child become the recipe, and answers with the child's exit code. The recipes themselves are never imported
here, only run.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
from typing import Any, NoReturn

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
            become(order)
        print(code_of(child, time.monotonic() + order["seconds"]), flush=True)


def code_of(child: int, deadline: float) -> int:
    """The child's exit code; at the deadline it and all that it started are killed."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.02)


def become(order: dict[str, Any]) -> NoReturn:
    """The recipe's process."""
    os.setpgid(0, 0)
    os.chdir(order["folder"])
    sys.path[0:0] = [place for place in (order["folder"], order["path"]) if place]
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(order["input"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    sys.argv = [order["module"], *order["arguments"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
