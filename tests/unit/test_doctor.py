"""The doctor: each finding on a machine, folder or database that is as it should be, and on one that is not."""

import http.server
import json
import os
import resource
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinsmith import doctor, sizing
from tinsmith.cli import app
from tinsmith.commands.operations import describe_status
from tinsmith.config import Settings
from tinsmith.demo import tiny_folder
from tinsmith.doctor import FAIL, OK, WARN, Finding
from tinsmith.store import keys
from tinsmith.store.database import Database

CPU = {"torch": "2", "transformers": "5", "cuda": None, "gpus": []}
GPU = CPU | {"cuda": "12.8", "gpus": [{"name": "H100", "free": 70e9, "total": 80e9}]}


def assert_is(finding: Finding, level: str, *words: str) -> None:
    assert finding.level == level, finding
    assert all(word in f"{finding.says} {finding.advice}" for word in words), finding
    assert bool(finding.advice) == (level != OK), finding


def settings_in(folder: Path, **options: Any) -> Settings:
    return Settings(**({"data_dir": folder, "port": 0} | options))


def test_torch_is_asked_in_a_process_of_its_own_and_may_be_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda.so.1: cannot open')")
    probe = doctor.probe_torch(dict(os.environ) | {"PYTHONPATH": str(tmp_path)})
    assert_is(doctor.check_torch(probe), FAIL, "libcuda.so.1", "pip install")
    assert list(doctor.check_devices(Settings(), probe)) == []
    assert_is(doctor.check_torch(GPU), OK, "torch 2 CUDA 12.8", "transformers 5")
    assert_is(doctor.check_torch(CPU), OK, "without CUDA")


def test_gpus_are_found_free_busy_wanted_or_without_a_fitting_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def only(settings: Settings, probe: dict[str, Any]) -> Finding:
        (finding,) = doctor.check_devices(settings, probe)
        return finding

    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert_is(only(Settings(), GPU), OK, "H100", "70 GB of 80 GB")
    busy = CPU | {"gpus": [{"name": "H100", "free": 10e9, "total": 80e9}]}
    assert_is(only(Settings(), busy), WARN, "nvidia-smi")
    assert_is(only(Settings(), CPU), OK, "the CPU is used")
    assert_is(only(Settings(device="cuda"), CPU), FAIL, "--device cpu")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert_is(only(Settings(), CPU), WARN, "driver", "torch with CUDA")


def test_little_memory_few_cores_and_few_files_are_warned_of() -> None:
    assert_is(doctor.check_memory(2**35), OK, "GB free")
    assert_is(doctor.check_memory(2**30), WARN, "1.07 GB free")
    assert_is(doctor.check_cores(Settings()), OK, "cores")
    assert_is(doctor.check_cores(Settings(threads=4096)), WARN, "--threads")
    assert_is(doctor.check_open_files(2**16), OK)
    assert_is(doctor.check_open_files(resource.RLIM_INFINITY), OK, "any number")
    assert_is(doctor.check_open_files(1024), WARN, "ulimit -n")


def test_the_data_folder_is_there_can_be_made_or_cannot_be(tmp_path: Path) -> None:
    assert_is(doctor.check_data_dir(tmp_path), OK, "can be written")
    assert_is(doctor.check_data_dir(tmp_path / "a" / "b"), OK, "will be made")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert_is(doctor.check_data_dir(tmp_path / "file" / "data"), FAIL, "no folder", "--data-dir")
    if os.getuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        assert_is(doctor.check_data_dir(tmp_path), FAIL, "cannot be written")
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(("free", "level"), [(2**40, OK), (2**32, WARN), (2**20, FAIL)])
def test_a_disk_without_room_is_found(free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    assert_is(doctor.check_disk(tmp_path / "data"), level, "free for")


def findings_of_database(settings: Settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.check_database(settings)}


def test_a_database_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    found = findings_of_database(settings_in(tmp_path / "data"))
    assert_is(found["database"], OK, "will be made")
    assert not (tmp_path / "data").exists()


def made(folder: Path, *statements: str) -> Settings:
    settings = settings_in(folder)
    database = Database(settings.effective_database_url)
    database.migrate()
    for statement in statements:
        database.write(lambda conn, sql=statement: conn.exec_driver_sql(sql) and None)
    database.close()
    return settings


def test_a_database_of_this_an_older_or_a_newer_version_is_told_apart(tmp_path: Path) -> None:
    become = "UPDATE alembic_version SET version_num = '{}'"
    assert_is(findings_of_database(made(tmp_path / "a"))["database"], OK, "of this version")
    assert_is(findings_of_database(made(tmp_path / "b", become.format("0001")))["database"], OK, "will be migrated")
    found = findings_of_database(made(tmp_path / "c", become.format("future")))
    assert_is(found["database"], FAIL, "newer version")
    assert "access" not in found


def test_a_database_that_is_no_database_or_cannot_be_reached_is_found(tmp_path: Path) -> None:
    (tmp_path / "tinsmith.db").write_bytes(b"something else, and long enough to be read as a page" * 100)
    assert_is(findings_of_database(settings_in(tmp_path))["database"], FAIL, "not a database")
    away = settings_in(tmp_path, database_url="postgresql://me:secret@127.0.0.1:9/tinsmith")
    found = findings_of_database(away)["database"]
    assert_is(found, FAIL, "me:***@127.0.0.1:9", "--database-url")
    assert "secret" not in found.says


def test_postgres_is_tried_and_left_as_it_was(postgres_url: str, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, database_url=postgres_url)
    assert_is(findings_of_database(settings)["database"], OK, "its tables will be made")
    database = Database(postgres_url)
    database.migrate()
    database.close()
    found = findings_of_database(settings)
    assert_is(found["database"], OK, "can be written", "of this version")
    assert_is(found["access"], OK)
    read_only = f"{postgres_url}{'&' if '?' in postgres_url else '?'}options=-c%20default_transaction_read_only%3Don"
    assert_is(findings_of_database(settings_in(tmp_path, database_url=read_only))["database"], FAIL, "read-only")


def test_a_server_that_others_reach_needs_keys(tmp_path: Path) -> None:
    settings = made(tmp_path)
    open_host = settings_in(tmp_path, host="0.0.0.0")
    assert_is(findings_of_database(settings)["access"], OK, "any key")
    assert_is(findings_of_database(open_host)["access"], FAIL, "tinsmith keys create", "--no-auth")
    assert_is(findings_of_database(settings_in(tmp_path, host="0.0.0.0", no_auth=True))["access"], OK)
    database = Database(settings.effective_database_url)
    database.write(keys.create_key, keys.new_key("anna")[1])
    database.close()
    assert_is(findings_of_database(open_host)["access"], OK, "1 active")


def test_an_sqlite_file_on_a_shared_file_system_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_file_system", lambda _: "nfs4")
    found = list(doctor.check_database(made(tmp_path)))
    assert_is(found[0], WARN, "nfs4", "Postgres")


def damaged(folder: Path, spoil: Callable[[Path], None]) -> Path:
    shutil.copytree(tiny_folder(), folder)
    spoil(folder)
    return folder


def cut_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (cut_weights, "no complete safetensors file"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "no weights at all"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: [each.unlink() for each in folder.glob("tokenizer*")], "no tokenizer"),
    ],
)
def test_a_model_with_missing_or_damaged_files_is_found(
    spoil: Callable[[Path], None], word: str, tmp_path: Path
) -> None:
    folder = damaged(tmp_path / "model", spoil)
    (found,) = doctor.check_models(settings_in(tmp_path, models=(str(folder),)), CPU)
    assert_is(found, FAIL, word)


def test_a_model_fits_or_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor.check_models(settings_in(tmp_path, models=("tiny",)), CPU)
    assert_is(found, OK, "1.821 M parameters", "float32")
    (found,) = doctor.check_models(settings_in(tmp_path, models=("tiny",)), GPU)
    assert_is(found, OK, "bfloat16")
    monkeypatch.setattr(sizing, "free_host_memory", lambda: 2**20)
    (found,) = doctor.check_models(settings_in(tmp_path, models=("tiny",)), CPU)
    assert_is(found, FAIL, "--dtype bfloat16")


def test_a_hub_model_that_would_be_fetched_and_a_name_that_is_wrong(tmp_path: Path) -> None:
    (found,) = doctor.check_models(settings_in(tmp_path, models=("nobody/has-this",)), CPU)
    assert_is(found, WARN, "fetch it from the hub")
    (found,) = doctor.check_models(settings_in(tmp_path, models=("tiny",), aliases={"a": "other"}), CPU)
    assert_is(found, FAIL, "write a=tiny")


def test_a_port_is_free_taken_or_a_servers(tmp_path: Path) -> None:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(b'{"status": "loading"}')

        def log_message(self, *_: object) -> None: ...

    assert_is(doctor.check_port(settings_in(tmp_path)), OK, "any free one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.close()
        assert_is(doctor.check_port(settings_in(tmp_path, port=free_port())), OK, "is free")
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert_is(doctor.check_port(settings_in(tmp_path, port=server.server_port)), OK, "a Tinsmith server answers")
        server.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        assert_is(doctor.check_port(settings_in(tmp_path, port=other.getsockname()[1])), FAIL, "--port")
    assert_is(doctor.check_port(settings_in(tmp_path, host="192.0.2.1", port=8000)), FAIL, "192.0.2.1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_proxy_in_the_way_of_clients_is_warned_of() -> None:
    assert_is(doctor.check_proxy({}), OK)
    assert_is(doctor.check_proxy({"HTTP_PROXY": "http://p:3128"}), WARN, "NO_PROXY=127.0.0.1")
    assert_is(doctor.check_proxy({"http_proxy": "http://p", "no_proxy": "127.0.0.1,localhost"}), OK)


def test_the_command_prints_every_finding_and_its_exit_code_says_whether_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "probe_torch", lambda _: CPU)
    arguments = ["doctor", "tiny", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    good = CliRunner().invoke(app, arguments)
    assert good.exit_code == 0, good.output
    assert not (tmp_path / "data").exists()
    wrong = CliRunner().invoke(app, [*arguments, "--device", "cuda"])
    assert wrong.exit_code == 1
    assert "fail gpu: device 'cuda' is set" in wrong.output and "→ use --device cpu" in wrong.output
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [each["name"] for each in listed][:3] == ["python", "torch", "gpu"]
    assert {each["level"] for each in listed} <= {OK, WARN, FAIL}


def test_what_a_server_tells_is_put_into_lines() -> None:
    held = {"models": 2, "models_most": 64, "snapshots": 3, "snapshots_most": 512, "snapshot_bytes": 5_000_000}
    held |= {
        "samples_running": 4,
        "samples_waiting": 1000,
        "kv_tokens": 65536,
        "kv_tokens_held": 32,
        "kv_tokens_kept": 16,
    }
    engine = {
        "model": "tiny", "state": "ready", "progress": "", "beat_seconds": 2.2, "starts": 3, "recoveries": 1,
        "tokens": {"trained": 12345}, "jobs": {"sample": {"done": 7, "user": 2, "server": 0}}, "held": held,
        "events": {},
    }  # fmt: skip
    silent = dict.fromkeys(engine) | {
        "model": "other", "state": "loading", "progress": "reading weights", "starts": 1, "recoveries": 0
    }  # fmt: skip
    waiting = {
        "model": "tiny",
        "state": "queued",
        "kind": "sample",
        "tenant": "anna",
        "jobs": 1234,
        "oldest_seconds": 5.25,
    }
    failure = {
        "at": 0.0, "request": "s:sample:0:7", "model": "tiny", "kind": "sample", "tenant": "anna", "category": "server",
        "error": "it\nbroke " + "x" * 200, "trace": "abc",
    }  # fmt: skip
    told = {"version": "1", "free_bytes": 5e9, "data_dir": "/data", "engines": [engine, silent], "waiting": [waiting]}
    text = "\n".join(describe_status(told | {"failures": [failure]}))
    for words in (
        "engine tiny: ready, heard of 2 s ago; starts: 3, 1 of them after a death",
        "2 of 64 models, 3 of 512 snapshots (5 MB)",
        "4 running, 1,000 waiting; cache 32 of 65,536 tokens, 16 kept",
        "tokens: 12,345 trained",
        "sample: 7 done, 2 failed by the user's fault",
        "engine other: loading: reading weights; starts: 1, 0 of them",
        "anna    1,234  5.2 s",
        "it broke xxx",
    ):
        assert words in text, text
    assert "queue: empty" in "\n".join(describe_status(told | {"waiting": [], "failures": []}))
