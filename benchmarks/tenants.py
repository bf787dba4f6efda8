"""Many tenants on one server: tokens per second of N tenants together against one tenant who sends as much.

    python -m benchmarks.tenants [--tenants N …] [--steps N] [--datums N] [--length N] [--model NAME]

Every tenant is a process of its own with the real client: forward_backward (cross_entropy) and optim_step in a
pipelined loop, the next pair under way while the last is awaited. The lone tenant sends batches N times as large, as
many of them. The clients share the machine with the server, so the server's own CPU time is told too; how many tenants
shared a batch is read from its database (the jobs of one batch end at the same moment). Latency is from sending a pair
to having its results, and so includes the pair before it.
"""

import argparse
import multiprocessing
import os
import sqlite3
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import tinker
from tinker import types

from benchmarks.recording import Row, percentile, record
from tinsmith.demo.local_server import LocalServer

RANK = 16
UNDER_WAY = 2  # pairs that a client has sent and not received
WARM_UP = 2
START_SECONDS = 300.0
GOAL = "90"


@dataclass(frozen=True, slots=True)
class Load:
    """What each of some tenants does."""

    model: str
    tenants: int
    steps: int
    datums: int
    length: int

    @property
    def tokens(self) -> int:
        """Of all tenants and steps."""
        return self.tenants * self.steps * self.datums * self.length


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds, milliseconds per step of every tenant, CPU seconds by process, and tenants per training batch."""

    seconds: float
    latencies: list[float]
    busy: dict[str, float]
    sharing: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--datums", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--model", default="tiny")
    arguments = parser.parse_args()
    loads = [
        Load(arguments.model, tenants, arguments.steps, arguments.datums, arguments.length)
        for tenants in arguments.tenants
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LocalServer(folder / "data", folder / "log.txt", model=arguments.model) as server:
            rows = [row for load in loads for row in compare(server, load)]
    record("tenants", rows)


def compare(server: LocalServer, load: Load) -> Iterator[Row]:
    """The tenants together, then one with as much work; alternately twice, of which the better counts."""
    lone = Load(load.model, 1, load.steps, load.tenants * load.datums, load.length)
    rounds = [(run(server, load), run(server, lone)) for _ in range(2)] if load.tenants > 1 else [(run(server, load),)]
    sides = [min(results, key=lambda measured: measured.seconds) for results in zip(*rounds, strict=True)]
    names = [f"{load.tenants} tenant{'s' * (load.tenants > 1)}", f"1 tenant with {load.tenants} x the batch"]
    for name, side in zip(names, sides, strict=False):
        yield from _rows(name, side, load.tokens)
    if load.tenants > 1:
        share = 100 * sides[1].seconds / sides[0].seconds
        yield Row(f"{load.tenants} tenants / 1 tenant: tokens/s", round(share, 1), "%", goal=GOAL)


def _rows(name: str, side: Measured, tokens: int) -> Iterator[Row]:
    yield Row(f"{name}: throughput", round(tokens / side.seconds), "tokens/s")
    yield Row(f"{name}: step, p50", round(percentile(side.latencies, 0.5), 1), "ms")
    yield Row(f"{name}: step, p99", round(percentile(side.latencies, 0.99), 1), "ms")
    yield Row(f"{name}: tenants in a batch, mean", round(side.sharing, 2), "tenants")
    for process, seconds in side.busy.items():
        yield Row(f"{name}: {process} busy", round(100 * seconds / side.seconds, 1), "% of a core")


def run(server: LocalServer, load: Load) -> Measured:
    """One round: tenants start together once all are ready."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(load.tenants + 1)
    results: Any = context.Queue()
    environment = server.client_environment()
    tenants = [context.Process(target=_tenant, args=(environment, load, barrier, results)) for _ in range(load.tenants)]
    for tenant in tenants:
        tenant.start()
    barrier.wait(START_SECONDS)
    began, wall, before = time.perf_counter(), time.time(), _cpu(server)
    latencies = [value for _ in tenants for value in results.get()]
    seconds, after = time.perf_counter() - began, _cpu(server)
    sharing = _sharing(server.data_dir / "tinsmith.db", wall, time.time())
    barrier.wait(START_SECONDS)
    for tenant in tenants:
        tenant.join()
    return Measured(seconds, latencies, {name: after[name] - before[name] for name in before}, sharing)


def _tenant(environment: dict[str, str], load: Load, barrier: Any, results: Any) -> None:
    """A client process. It waits twice for the others: to begin, and to end, which costs the server work."""
    os.environ.update(environment)
    with tinker.ServiceClient() as service:
        client = service.create_lora_training_client(load.model, rank=RANK).result()
        data = [datum(load.length, seed) for seed in range(load.datums)]
        _train(client, data, WARM_UP)
        barrier.wait(START_SECONDS)
        results.put(_train(client, data, load.steps))
        barrier.wait(START_SECONDS)


def _train(client: tinker.TrainingClient, data: list[types.Datum], steps: int) -> list[float]:
    """Milliseconds from sending each pair of requests to having both results."""
    adam = types.AdamParams(learning_rate=1e-4)
    under_way: deque[tuple[float, Any, Any]] = deque()
    latencies = []
    for step in range(steps + UNDER_WAY):
        if len(under_way) == UNDER_WAY or step >= steps:
            if not under_way:
                break
            began, gradient, stepped = under_way.popleft()
            gradient.result()
            stepped.result()
            latencies.append(1000 * (time.perf_counter() - began))
        if step < steps:
            began = time.perf_counter()
            gradient = client.forward_backward(data, "cross_entropy")
            under_way.append((began, gradient, client.optim_step(adam)))
    return latencies


def datum(length: int, seed: int) -> types.Datum:
    """Random tokens, with a target at each."""
    tokens = np.random.default_rng(seed).integers(0, 256, length + 1)
    inputs: Any = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)


def _cpu(server: LocalServer) -> dict[str, float]:
    """CPU seconds of the server's processes so far."""

    def of(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system

    return {name: of(process) for name, process in server.processes().items() if name != "server"}


def _sharing(database: Path, began: float, ended: float) -> float:
    """Models per batch of training: the jobs of a batch have one time of ending."""
    query = """SELECT count(DISTINCT subject) FROM jobs
               WHERE kind = 'forward_backward' AND finished_at BETWEEN ? AND ? GROUP BY finished_at"""
    connection = sqlite3.connect(database)
    try:
        return mean(count for (count,) in connection.execute(query, (began, ended)))
    finally:
        connection.close()


if __name__ == "__main__":
    main()
