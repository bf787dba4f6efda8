"""docs/compatibility.md: what was exercised, as tables. The part about SDK versions is `make compat`'s."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
VERSIONS = "## SDK versions"
WRITES = "TINSMITH_TEST_WRITE_COMPATIBILITY" in os.environ  # set by `make compat`: the page is written, not compared

INTRODUCTION = """# Compatibility

Every public method of the `tinker` SDK and every `tinker` command, exercised against a running server by
`tests/contract/test_compatibility.py` and `tests/contract/test_tinker_cli.py`. The tables are what those tests found: a
method that is not exercised, or a page that says something else, fails them. *In the client*: no server has a part.
"""


@dataclass(frozen=True)
class Row:
    """One method of one class, or both of its forms (`x` and `x_async`)."""

    owner: str
    method: str
    forms: str
    outcome: str
    note: str


def methods(rows: Iterable[Row]) -> str:
    """The page's part about methods."""
    rows = list(rows)
    parts = [INTRODUCTION.strip(), f"## Methods of tinker 0.38\n\n{_counted(rows)}"]
    for owner in dict.fromkeys(row.owner for row in rows):
        table = [f"| `{row.method}` | {row.forms} | {row.outcome} | {row.note} |" for row in rows if row.owner == owner]
        parts.append("\n".join([f"### {owner}\n", "| method | forms | outcome | note |", "|---|---|---|---|", *table]))
    return "\n\n".join(parts) + "\n"


def _counted(rows: list[Row]) -> str:
    number = sum(2 if row.forms == "sync, async" else 1 for row in rows)
    return f"{number} methods of {len({row.owner for row in rows})} classes."


def commands(notes: Mapping[str, str]) -> str:
    """The page's part about the command line."""
    table = [f"| `tinker {command}` | works | {note} |" for command, note in sorted(notes.items())]
    head = "Each in table and in JSON form, as a process of its own.\n\n| command | outcome | note |\n|---|---|---|\n"
    return "## Commands\n\n" + head + "\n".join(table) + "\n"


def read() -> tuple[str, str]:
    """The committed page: the part that the tests make, and the part about versions."""
    text = PAGE.read_text() if PAGE.exists() else ""
    made, _, versions = text.partition(VERSIONS)
    return made, VERSIONS + versions


def write(made: str, versions: str) -> None:
    PAGE.write_text(made + versions)


def versions_head(steps: list[str]) -> str:
    """What stands above the table of SDK versions."""
    named = ", ".join(f"`{step}`" for step in steps)
    return (
        f"{VERSIONS}\n\nThe main path of a training script with each version's own package:\n{named}.\n"
        "`make compat` repeats it.\n\n| tinker | outcome |\n|---|---|"
    )


def version_row(version: str, steps: list[str]) -> str:
    """A version with which all steps have worked."""
    return f"| {version} | {len(steps)} of {len(steps)} steps |"


def with_version(versions: str, version: str, steps: list[str]) -> str:
    """The part about versions with one more, newest first."""
    rows = {line for line in versions.splitlines() if re.match(r"\| \d", line) and not line.startswith(f"| {version} ")}
    rows.add(version_row(version, steps))
    ordered = sorted(rows, key=lambda row: [int(part) for part in row.split()[1].split(".")], reverse=True)
    return "\n".join([versions_head(steps), *ordered]) + "\n"
