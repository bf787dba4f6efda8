"""A training script's main path with earlier versions of the SDK, each in an environment of its own (`make compat`)."""

import json
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from tests.contract import compatibility_page as page
from tests.contract import sdk_main_path
from tests.contract.sdk_versions import EARLIER, NEWEST, python_of
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

SCRIPT = Path(sdk_main_path.__file__)
STEPS = [step.__name__ for step in sdk_main_path.STEPS]


def worked(python: str | Path, server: LocalServer) -> dict[str, bool]:
    """What of the main path works with this interpreter's SDK."""
    result = subprocess.run(
        [python, str(SCRIPT), server.base_url], capture_output=True, text=True, timeout=110, cwd=server.data_dir
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, bool] = json.loads(result.stdout.splitlines()[-1])
    assert all(found.values()), result.stderr
    return found


@pytest.mark.parametrize("version", EARLIER)
def test_an_earlier_sdk_works(version: str, server: LocalServer) -> None:
    if not (python := python_of(version)).exists():
        pytest.skip(f"tinker {version} is not installed; `make compat` installs it")
    assert list(worked(python, server)) == STEPS
    _record(version)


def test_the_installed_sdk_works(server: LocalServer) -> None:
    assert list(worked(sys.executable, server)) == STEPS
    if installed("tinker") == NEWEST:
        _record(NEWEST)


def test_the_page_has_a_row_for_every_version() -> None:
    _, versions = page.read()
    for version in (NEWEST, *EARLIER):
        assert page.version_row(version, STEPS) in versions.splitlines(), "run `make compat`"


def _record(version: str) -> None:
    """Adds the version to the page, if `make compat` asks for that."""
    if page.WRITES:
        made, versions = page.read()
        page.write(made, page.with_version(versions, version, STEPS))
