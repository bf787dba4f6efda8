"""Makes benchmarks/RESULTS.md from every file in benchmarks/results.

python -m benchmarks.report
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.recording import RESULTS

PAGE = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Made by `python -m benchmarks.report` from `benchmarks/results/*.json`; do not edit. Every number is measured, on the
hardware and commit that stand above it (`+`: with changes that were not committed yet). *Rival* is the best that we
measured of others on comparable hardware: servers for this API in round trips; on a GPU PEFT with `torch.compile` in
training, vLLM in sampling. *Goal* is what we aim at. *Commit*: where a row is of another run than the rest.
"""


def main() -> None:
    sections = [section(path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    PAGE.write_text("\n".join([HEAD, *sections]))
    print(f"{PAGE}: {len(sections)} benchmarks")


def section(name: str, result: dict[str, Any]) -> str:
    """One benchmark: where and how it ran, then its rows."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    pace = f" (ten million additions in Python took {result['pace']} s)" if "pace" in result else ""
    lines = [
        f"## {name.replace('_', ' ').capitalize()}",
        "",
        f"`{result['command']}`, {result['date']}, commit {result['commit']}",
        f"on {result['hardware']}{pace}; {versions}",
        *([f"\n{result['note']}"] if "note" in result else []),
        "",
        *table(result["rows"]),
        "",
    ]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table, with the columns that some row fills."""
    optional = (name for name in ("rival", "goal", "commit") if any(row.get(name) for row in rows))
    columns = ["name", "value", "unit", *optional]
    numeric = ["---:" if name in ("value", "rival", "goal") else "---" for name in columns]
    body = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    return [_line(["" if name == "name" else name for name in columns]), _line(numeric), *map(_line, body)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    text = f"{value:,.6g}" if isinstance(value, (int, float)) else str(value)
    return text.replace("|", "\\|")  # it would end the cell


if __name__ == "__main__":
    main()
