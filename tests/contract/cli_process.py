"""The `tinker` command line in processes of its own that start quickly: forked from one that has imported the SDK."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tinker.cli.__main__", "tinker", "torch"])


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


def run_tinker(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, streams: Path, typed: str, seconds: float
) -> Ended:
    """Runs `tinker ARGUMENTS` in `folder`; what it reads and prints passes through files in `streams`."""
    streams.mkdir()
    (streams / "0").write_text(typed)
    process = _FORKING.Process(target=_run, args=(list(arguments), dict(environment), folder, streams))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, (streams / "1").read_text(), (streams / "2").read_text())


def _run(arguments: list[str], environment: dict[str, str], folder: Path, streams: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number in range(3):
        descriptor = os.open(streams / str(number), os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, closefd=False)  # a child's is nothing otherwise
    sys.argv = ["tinker", *arguments]
    from tinker.cli.__main__ import main

    main()
