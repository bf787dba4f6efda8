"""The command line and the processes behind it, from the outside."""

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinsmith import __version__, serve
from tinsmith.config import load_settings
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer
from tinsmith.served import choose_served
from tinsmith.store import records
from tinsmith.store.database import Database

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]


def tinsmith(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from tinsmith.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | variables)


def refused(*arguments: str, **variables: str) -> str:
    """The one line on stderr of a command that must end with code 2."""
    result = tinsmith(*arguments, **variables)
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def test_version_and_the_embedded_models_folder_are_printed() -> None:
    assert tinsmith("version").stdout.strip() == __version__
    assert tinsmith("models", "path", "tiny").stdout.strip() == str(tiny_folder())
    assert "tiny" in tinsmith("models", "list").stdout
    assert "huge" in refused("models", "path", "huge")


def test_settings_that_are_wrong_are_one_line_and_exit_code_two(tmp_path: Path) -> None:
    assert "TINSMITH_PROT" in refused("serve", TINSMITH_PROT="1")
    assert "tinsmith keys create" in refused("serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path))
    assert "write a=tiny" in refused("serve", "--alias", "a=other")
    assert "65535" in refused("serve", "--port", "70000")
    assert "computes on one device" in refused("serve", "--tensor-parallel-size", "4")
    assert "'trainer.colour' is not known" in refused("serve", "--backend-config", '{"trainer.colour": 1}')
    file = tmp_path / "settings.toml"
    file.write_text("max_lora_rnak = 8")
    assert "max_lora_rank" in refused("serve", "--config", str(file))


def test_the_command_line_the_variables_and_the_file_are_heard(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_lora_rank = 8\nport = 1")
    arguments = ["--config", str(file), "--alias", "a=tiny", "--alias", "b=tiny", "--no-auth", "--show-settings"]
    shown = tinsmith("serve", "tiny", "--port", "7", *arguments, TINSMITH_DTYPE="float32").stdout
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines() if len(line.split()) > 1)
    assert (rows["port"], rows["max_lora_rank"], rows["dtype"]) == ("7", "8", "float32")
    assert (rows["aliases"], rows["no_auth"]) == ("a=tiny, b=tiny", "True")


def test_models_that_memory_cannot_hold_are_refused_before_they_load(tmp_path: Path) -> None:
    arguments = ["--memory-fraction", "0.001", "--port", "0", "--data-dir", str(tmp_path), "--device", "cpu"]
    result = tinsmith("serve", "tiny", str(tiny_folder()), *arguments)
    assert result.returncode == 2
    assert re.search(r"memory is short: .*tiny 0\.00\d+ \+ 0\.403.* GB; there are 0\.\d+ GB", result.stderr)
    assert "loading" not in result.stdout


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = tinsmith("serve", "--port", str(port), "--data-dir", str(tmp_path))
    assert result.returncode == 2
    assert f"port {port}" in result.stderr


def test_a_data_folder_belongs_to_one_server(server: LocalServer) -> None:
    result = tinsmith("serve", "--port", "0", "--data-dir", str(server.data_dir))
    assert result.returncode == 2
    assert str(server.data_dir) in result.stderr


def test_a_model_in_a_database_belongs_to_one_server(server: LocalServer, tmp_path: Path) -> None:
    url = f"sqlite:///{server.data_dir}/tinsmith.db"
    result = tinsmith("serve", "--port", "0", "--data-dir", str(tmp_path), "--database-url", url)
    assert result.returncode == 2
    assert "another server works on the requests for 'tiny'" in result.stderr
    assert server.is_ready()


def test_the_log_says_what_was_chosen_and_how_to_connect(server: LocalServer) -> None:
    connect = f"export TINKER_BASE_URL={server.base_url} TINKER_API_KEY=tml-local"
    deadline = time.monotonic() + 30  # the supervisor asks now and then whether the server is ready
    while connect not in (log := server.log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert connect in log
    for word in ("model     tiny", "SQLite", str(server.data_dir), "float32 on cpu", "adapters of rank"):
        assert word in log


def test_a_dead_engines_word_that_it_is_ready_counts_nothing(tmp_path: Path) -> None:
    settings = load_settings(None, {}, {"data_dir": tmp_path})
    database = Database(settings.effective_database_url)
    database.migrate()
    database.write(records.put_engine, records.EngineRecord("tiny", "dead", 1, "ready", "", None, time.time() - 1))
    database.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        command = [sys.executable, "-m", "tinsmith.serve", "api", str(fd), str(time.time())]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(fd,)) as api:
            assert api.stdin is not None
            api.stdin.write(serve._first_line(settings, choose_served(settings, ())).encode() + b"\n")
            api.stdin.flush()
            connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=60)
            connection.request("GET", "/api/v1/healthz")
            assert connection.getresponse().status == 503
            connection.close()
    assert api.returncode == 0
