"""Every `tinker` command, run as a process against a real server, in table and in JSON form."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import tinker
from tinker.cli.__main__ import main_cli as tinker_cli

from tests.contract.cli_cases import COMMANDS, Command
from tests.contract.cli_process import run_tinker
from tests.contract.datums import greedy, supervised, tokens
from tests.contract.fake_hub import FakeHub, fake_hub
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]

PROJECT = "cli"
FORMS = ("table", "json")
SECONDS = 120


class Made:
    """What the commands are about, and where they run."""

    def __init__(self, server: LocalServer, folder: Path, hub: FakeHub) -> None:
        self.client = tinker.ServiceClient(base_url=server.base_url, project_id=PROJECT)
        self.rest = tinker.RestClient(base_url=server.base_url)
        self.training = self.client.create_lora_training_client("tiny", rank=4, seed=1).result()
        self.training.forward_backward([supervised(tokens(8))], "cross_entropy").result()
        sampler = self.client.create_sampling_client(base_model="tiny").result()
        sampler.sample(tinker.ModelInput.from_ints(tokens(4)), 1, greedy(1)).result()
        self.state = str(self.training.save_state("state").result().path)
        self.folder, self.hub = folder, hub
        (folder / "home").mkdir()
        self.environment = dict(os.environ) | {
            "TINKER_BASE_URL": server.base_url,
            "HOME": str(folder / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_token",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "COLUMNS": "400",
        }

    def save_spare(self, name: str) -> str:
        """The path of a published checkpoint."""
        path = str(self.training.save_state(name).result().path)
        self.rest.publish_checkpoint_from_tinker_path(path).result()
        return path

    def names(self, form: str, spare: str) -> dict[str, str]:
        """What stands for the names in braces."""
        begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        return {
            "run": str(self.training.model_id),
            "session": str(self.client.holder.get_session_id()),
            "state": self.state,
            "spare": spare,
            "project": PROJECT,
            "form": form,
            "out": str(self.folder),
            "begin": (begin - timedelta(hours=1)).isoformat().replace("+00:00", "Z"),
            "end": (begin + timedelta(hours=2)).isoformat().replace("+00:00", "Z"),
        }


@pytest.fixture(scope="module")
def made(server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with fake_hub() as hub:
        made = Made(server, tmp_path_factory.mktemp("cli"), hub)
        yield made
        made.client.close("success").result()


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[str]:
    """The full names of all commands."""
    if not isinstance(command, click.Group):
        return [" ".join(path)]
    context = click.Context(command)
    found = []
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        found += leaves(child, (*path, name))
    return found


def test_every_command_is_exercised() -> None:
    assert sorted(leaves(tinker_cli)) == sorted(COMMANDS)


def run(made: Made, name: str, case: Command, names: dict[str, str]) -> str:
    """What the command printed. Logging in and out have a home of their own, for they leave something there."""
    arguments, form = case.arguments.format(**names).split(), names["form"]
    environment = made.environment
    if name in ("auth login", "auth logout"):
        home = made.folder / f"home-{form}"
        home.mkdir(exist_ok=True)
        environment = environment | {"HOME": str(home)}
    command, streams = ["-f", form, *name.split(), *arguments], made.folder / f"{name} {form}"
    ended = run_tinker(command, environment, made.folder, streams, case.typed, SECONDS)
    assert ended.code == 0, f"tinker {name} ({form}):\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def check(made: Made, case: Command, names: dict[str, str], printed: str) -> None:
    assert case.told.format(**names) in printed
    if names["form"] == "json" and case.keys:
        found: dict[str, Any] = json.loads(printed[printed.index("{") :])
        assert set(case.keys) <= set(found)
    for file in case.written:
        assert [path.stat().st_size > 0 for path in made.folder.rglob(file.format(**names))].count(True) >= 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_in_both_forms(name: str, made: Made) -> None:
    case = COMMANDS[name]
    spares = {
        form: made.save_spare(f"{name.split()[-1]}-{form}") if "{spare}" in case.arguments else "" for form in FORMS
    }
    forms = [made.names(form, spare) for form, spare in spares.items()]
    with ThreadPoolExecutor(len(FORMS)) as threads:
        printed = list(threads.map(lambda names: run(made, name, case, names), forms))
    for names, text in zip(forms, printed, strict=True):
        check(made, case, names, text)
    if name == "checkpoint push-hf":
        check_pushed(made)


def check_pushed(made: Made) -> None:
    """Whether the hub has got an adapter, in either form."""
    for form in FORMS:
        pushed = {
            name: content for (repository, name), content in made.hub.files.items() if repository == f"anna/{form}"
        }
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(pushed)
        assert json.loads(pushed["adapter_config.json"])["r"] == 4
