"""A real `tinsmith serve tiny` for the tests of a worker, and clients for it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.contract.raw import RawClient
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import CLIENT_ENVIRONMENT, LocalServer

NAMES = ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3.5-9B-Base")
"""Hub names that scripts ask for; the server serves the tiny model under any name."""


@pytest.fixture(scope="session", autouse=True)
def client_environment() -> Iterator[None]:
    """What the SDK reads from the environment, for every test of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CLIENT_ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in list(os.environ):
            if name.startswith(("TINSMITH_", "TINKER_BASE", "TINKER_CREDENTIAL", "TINKER_PROJECT")):
                patch.delenv(name)
        patch.setenv("TINSMITH_THREADS", "1")  # several servers share the machine's cores with several tests
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, client_environment: None) -> Iterator[LocalServer]:
    """A server that answers to any model name, stopped at the end by SIGTERM, which it must obey."""
    folder = tmp_path_factory.mktemp("server")
    server = LocalServer(folder / "data", folder / "log.txt", ["--alias", "*=tiny", "--threads", "1"])
    server.start()
    yield server
    assert server.is_ready(), f"the server did not outlive its tests; its log ends:\n{server.tail()}"
    code = server.stop()
    assert code == 0, f"the server ended with code {code}; its log ends:\n{server.tail()}"


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory, client_environment: None) -> Iterator[LocalServer]:
    """A server of close limits: two keys, one name, small bodies, few adapters at once, short waits."""
    folder = tmp_path_factory.mktemp("small")
    arguments = ["--api-key", "tml-anna", "--api-key", "tml-ben", "--max-lora-adapters", "3", "--threads", "1"]
    environment = {"TINSMITH_MAX_BODY_BYTES": str(2**20), "TINSMITH_POLL_SECONDS": "0.5"}
    with LocalServer(folder / "data", folder / "log.txt", arguments, environment=environment) as server:
        yield server


@pytest.fixture
def anna(small_server: LocalServer) -> Iterator[RawClient]:
    with RawClient(small_server.base_url, "tml-anna") as client:
        yield client


@pytest.fixture
def ben(small_server: LocalServer) -> Iterator[RawClient]:
    with RawClient(small_server.base_url, "tml-ben") as client:
        yield client


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which hub names are local folders with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in NAMES:
        shutil.copytree(tiny_folder(), folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def service(server: LocalServer) -> Iterator[tinker.ServiceClient]:
    """One SDK session for the tests of a module."""
    with tinker.ServiceClient(base_url=server.base_url) as client:
        yield client


@pytest.fixture(scope="module")
def raw(server: LocalServer) -> Iterator[RawClient]:
    """A client that can send what the SDK never would."""
    with RawClient(server.base_url) as client:
        yield client
