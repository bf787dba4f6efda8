"""A `tinsmith serve` of one's own: a child process that is started, waited for, and stopped with a `with` block.

For the walk-through, the benchmarks and the tests. Knows the command line and the health route, nothing of the inside.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import psutil

START_SECONDS = 180.0
STOP_SECONDS = 90.0
ANSWER_SECONDS = 30.0
CLIENT_ENVIRONMENT = {"TINKER_API_KEY": "tml-local", "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1"}
"""What a client of a local server needs beside TINKER_BASE_URL."""


class LocalServer:
    """One server on a free loopback port. `log` collects the output of all its processes.

    `arguments` follow `tinsmith serve MODEL` on the command line (further models, perhaps). After `stop` it can be
    started again, on the same data and a new port. Raises RuntimeError, with the end of the log, if it does not become
    ready.
    """

    def __init__(
        self,
        data_dir: Path,
        log: Path,
        arguments: Sequence[str] = (),
        *,
        model: str = "tiny",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.log = log
        self.base_url = ""
        tinsmith = [sys.executable, "-c", "from tinsmith.cli import main; main()"]
        self._command = [*tinsmith, "serve", model, "--port", "0", "--data-dir", str(data_dir), *arguments]
        self._environment = dict(os.environ) | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, seconds: float = START_SECONDS) -> None:
        """Starts the processes and waits until the model can be used."""
        began = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output, env=self._environment)
        deadline = time.monotonic() + seconds
        while not self._ready(began):
            if self._process.poll() is not None or time.monotonic() > deadline:
                ended = self.stop()
                raise RuntimeError(f"the server did not become ready (exit code {ended}); its log ends:\n{self.tail()}")
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """Asks the server to end by a signal, and its exit code; kills it if it does not end in time."""
        assert self._process is not None, "the server was not started"
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def processes(self) -> dict[str, psutil.Process]:
        """The running processes by role: server (the supervisor), api, engine (of several models: one of them)."""
        found = {"server": self._supervisor()}
        for child, words in self._children():
            found |= {role: child for role in ("api", "engine") if role in words}
        return found

    def engines(self) -> dict[str, psutil.Process]:
        """The running engines by the names of their models."""
        return {words[-1]: child for child, words in self._children() if "engine" in words}

    def _children(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        """The supervisor's processes and their commands; one that ends just now is left out."""
        for child in self._supervisor().children():
            with suppress(psutil.NoSuchProcess):
                words = child.cmdline()
                yield child, words

    def _supervisor(self) -> psutil.Process:
        assert self._process is not None, "the server was not started"
        return psutil.Process(self._process.pid)

    def is_ready(self) -> bool:
        """Whether the server says that it can serve."""
        address = urlsplit(self.base_url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("GET", "/api/v1/healthz")
            response = connection.getresponse()
            return response.status == 200 and json.loads(response.read())["status"] == "ok"
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tail(self, characters: int = 4000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:]

    def client_environment(self) -> dict[str, str]:
        """The environment variables with which a Tinker client finds this server."""
        return {"TINKER_BASE_URL": self.base_url, **CLIENT_ENVIRONMENT}

    def _ready(self, log_begins: int) -> bool:
        with self.log.open("rb") as log:
            log.seek(log_begins)
            address = re.search(rb"http://127\.0\.0\.1:\d+", log.read())
        self.base_url = address[0].decode() if address else ""
        return bool(address) and self.is_ready()
