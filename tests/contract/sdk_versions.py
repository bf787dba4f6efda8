"""Which versions of the SDK are checked beside the one that is installed, and where `make compat` puts them."""

from pathlib import Path

NEWEST = "0.38.0"
"""The newest that the package index had when this was last looked at; the tests themselves run with it."""

EARLIER = ("0.36.0", "0.35.0")
"""The two minor versions before it (there was no 0.37)."""

ROOT = Path(__file__).parents[2] / ".venv" / "sdk"


def python_of(version: str) -> Path:
    """The interpreter that imports this version."""
    return ROOT / version / "bin" / "python"


if __name__ == "__main__":
    print(*EARLIER)
