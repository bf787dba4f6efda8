"""`tinsmith bench` measures through the engine's own interfaces, and leaves nothing behind."""

import json

from typer.testing import CliRunner

from tinsmith.cli import app

SMALL = ["--adapters", "2", "--rank", "4", "--requests", "3", "--prompt", "5", "--output", "4", "--device", "cpu"]


def test_every_number_is_there_and_positive() -> None:
    result = CliRunner().invoke(app, ["bench", "tiny", *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["unit"] for row in rows] == ["tokens/s", "ms", "tokens/s", "tokens/s", "ms/token"]
    assert rows[0]["name"] == "training, 2 adapters, 1 x 9 tokens each"
    assert all(row["value"] > 0 for row in rows)


def test_the_table_has_a_line_for_each() -> None:
    result = CliRunner().invoke(app, ["bench", *SMALL])
    assert result.exit_code == 0, result.output
    assert len([line for line in result.stdout.splitlines() if line.endswith(("tokens/s", "ms", "ms/token"))]) == 5


def test_what_the_model_cannot_take_is_refused_with_the_numbers() -> None:
    result = CliRunner().invoke(app, ["bench", *SMALL, "--prompt", "100000"])
    assert result.exit_code != 0
    assert "100000 + 4 tokens do not fit" in str(result.exception)
