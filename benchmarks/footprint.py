"""What a server costs that does nothing: CPU of all its processes, their memory, and the time from start to ready.

python -m benchmarks.footprint [--seconds N]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import psutil
import tinker

from benchmarks.recording import Row, record
from benchmarks.round_trip import client_actions
from tinsmith.demo.local_server import LocalServer

SETTLE_SECONDS = 15.0  # past the clean-up after a session ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to watch the idle server")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        with LocalServer(folder / "data", folder / "log.txt") as server:
            rows = [Row("start to ready", round(time.perf_counter() - began, 2), "s")]
            processes = server.processes()
            rows += memory("before any request", processes)
            work_once(server)
            time.sleep(SETTLE_SECONDS)
            rows += memory("after training and sampling", processes)
            rows += idle(processes, seconds)
    record("footprint", rows)


def work_once(server: LocalServer) -> None:
    """One of everything, so that the server is idle after work, not before it."""
    os.environ.update(server.client_environment())
    with tinker.ServiceClient() as service:
        for action in client_actions(service).values():
            action()


def memory(when: str, processes: dict[str, psutil.Process]) -> list[Row]:
    """Resident memory by process."""
    return [
        Row(f"resident memory {when}: {role}", round(process.memory_info().rss / 2**20, 1), "MiB")
        for role, process in processes.items()
    ]


def idle(processes: dict[str, psutil.Process], seconds: float) -> list[Row]:
    """CPU time over wall time, by process and in all."""
    before, began = {role: _cpu(process) for role, process in processes.items()}, time.perf_counter()
    time.sleep(seconds)
    elapsed = time.perf_counter() - began
    shares = {role: 100 * (_cpu(process) - before[role]) / elapsed for role, process in processes.items()}
    rows = [Row(f"idle CPU: {role}", round(share, 3), "% of a core") for role, share in shares.items()]
    return [*rows, Row("idle CPU: all processes", round(sum(shares.values()), 3), "% of a core", goal="1")]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
