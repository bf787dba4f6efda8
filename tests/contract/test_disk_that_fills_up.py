"""A whole server whose disk fills up, and is emptied again: clear errors, no process dies, nothing is lost."""

import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.contract.datums import score, supervised, tokens
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("restart"), pytest.mark.timeout(300)]

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
EXAM = [supervised(tokens(24, seed=99))]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED ON A FULL DISK: this user may not mount a small one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leaving: int) -> None:
    """Writes a file as large as the disk allows, then cuts `leaving` bytes off it."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(bytes(2**16) for _ in count())
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - leaving))


def train(client: tinker.TrainingClient, steps: range) -> list[tinker.APIFuture[object]]:
    futures: list[tinker.APIFuture[object]] = []
    for number in steps:
        futures += [client.forward_backward([supervised(tokens(200, seed=number))] * 4, "cross_entropy")]
        futures += [client.optim_step(ADAM)]
    return futures


def wait_for(log: Path, words: str) -> None:
    """Until the log says so; the test's own time limit ends the wait."""
    while words not in log.read_text(errors="replace"):
        time.sleep(0.05)


def test_a_full_disk_is_told_survived_and_forgotten(tmp_path: Path, small_disk: Path) -> None:
    with LocalServer(small_disk / "data", tmp_path / "log.txt") as server:
        with tinker.ServiceClient(base_url=server.base_url) as service:
            calm, client = (service.create_lora_training_client("tiny", rank=32, seed=5).result() for _ in range(2))
            for future in train(calm, range(8)):
                future.result()
            expected = score(calm, EXAM)
            for future in train(client, range(2)):
                future.result()
            processes = {role: process.pid for role, process in server.processes().items()}

            fill(small_disk, leaving=2**20)
            with pytest.raises(tinker.TinkerError, match="no space is left on the server's disk"):
                client.save_state("no-room").result()
            for future in train(client, range(2, 4)):
                future.result()

            fill(small_disk, leaving=0)
            answers: list[object] = []
            waiting = threading.Thread(target=lambda: answers.extend(f.result() for f in train(client, range(4, 8))))
            waiting.start()
            wait_for(server.log, "no room")
            assert not answers
            (small_disk / "ballast").unlink()
            waiting.join()
            assert len(answers) == 8
            np.testing.assert_allclose(score(client, EXAM), expected, atol=1e-5)
            saved = client.save_state("room").result().path
            assert {role: process.pid for role, process in server.processes().items()} == processes
        server.stop()
        server.start()
        with tinker.ServiceClient(base_url=server.base_url) as service:
            resumed = service.create_training_client_from_state_with_optimizer(saved).result()
            np.testing.assert_allclose(score(resumed, EXAM), expected, atol=1e-5)
