"""What it costs to be able to recover, and how long a recovery takes.

    python -m benchmarks.recovery_cost [--seconds N] [--rounds N] [--model NAME]

One engine with its store in this process, and tenants whose next step waits in the queue whenever the last has ended.
Rounds with a recovery point of every tenant take turns with rounds without, each as long as the time between two points
of a model. Then another engine brings a tenant back, once from its recovery point and once by executing its log again;
and the engine of a whole server is killed.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
import tinker
from tinker import types

from benchmarks.recording import Row, record
from benchmarks.round_trip import calls, datum
from tinsmith.backend import load_backend
from tinsmith.config import Settings
from tinsmith.demo.local_server import LocalServer
from tinsmith.engine import points
from tinsmith.engine.loop import Engine
from tinsmith.protocols import Sampler, Trainer
from tinsmith.served import Served, base_of
from tinsmith.store import queue, records
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.store.ledger import Ledger, NewCheckpoint
from tinsmith.wire.jobs import Job

DATUMS, LENGTH = 4, 128  # of one forward_backward
STEPS = 20  # that a recovery executes again
CASES = {"8 adapters of rank 32": (32,) * 8, "a model of all weights": (0,)}
GOAL = "< 3"
EVERY = points.POINT_SECONDS


@dataclass
class Tenants:
    """A store with some models that never rest, and the engine that serves them."""

    folder: Path
    backend: tuple[Trainer, Sampler]
    base: str
    ranks: tuple[int, ...]
    seqs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        url = f"sqlite:///{self.folder / 'tinsmith.db'}"
        self.database, self.doorbell = Database(url), Doorbell(url)
        self.database.migrate()
        now = time.time()
        session = records.Session("s", "me", "open", [], {}, "0", None, None, None, now, now)
        self.database.write(records.create_session, session)
        self.engine = self.new_engine()
        for number, rank in enumerate(self.ranks):
            self._create(f"s:train:{number}", rank)
        self.body = calls(DATUMS, LENGTH)[0].call.to_bytes()

    def new_engine(self) -> Engine:
        """One that knows nothing but the store and the disk, on a trainer without models."""
        trainer, sampler = self.backend
        for model_id in self.seqs:
            trainer.drop(model_id)
        self.engine = Engine(
            Ledger(self.database, self.doorbell, self.base),
            trainer,
            sampler,
            NewCheckpoint,
            data_dir=self.folder,
            max_models=len(self.ranks),
            future_seconds=3600.0,
        )
        self.engine.take_over()
        return self.engine

    def _create(self, model_id: str, rank: int) -> None:
        spec = {"rank": rank, "seed": 7, "train_attn": True, "train_mlp": True, "train_unembed": True}
        now = time.time()
        model = records.Model(model_id, "s", "me", self.base, self.base, spec, {}, "creating", None, None, now, now)
        self.database.write(records.create_model, model)
        self.seqs[model_id] = 0
        self._submit(model_id, "create_model", b"{}", 0)

    def _submit(self, model_id: str, kind: str, body: bytes, tokens: int) -> None:
        job = Job(model_id, self.seqs[model_id], kind, "me", self.base, body, tokens=tokens)
        self.seqs[model_id] += 1
        self.database.write(queue.submit, job)

    def step(self) -> int:
        """A step of every tenant, to its end. Returns the tokens."""
        for model_id in self.seqs:
            self._submit(model_id, "forward_backward", self.body, DATUMS * LENGTH)
            self._submit(model_id, "optim_step", json.dumps({"learning_rate": 1e-4}).encode(), 0)
        while self.engine.turn():
            pass
        return len(self.seqs) * DATUMS * LENGTH

    def close(self) -> None:
        for model_id in self.seqs:
            self.backend[0].drop(model_id)
        self.doorbell.close()
        self.database.close()


@dataclass(frozen=True)
class Round:
    """Tokens per second, and the seconds that recovery points took."""

    rate: float
    writing: float


def run_round(tenants: Tenants, seconds: float, *, write: bool) -> Round:
    """Steps for so long, with a recovery point of every tenant half-way if `write`."""
    began, tokens, writing = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter()) - began < seconds:
        if write and not writing and now - began >= seconds / 2:
            tenants.engine.write_points()
            writing = time.perf_counter() - now
        tokens += tenants.step()
    return Round(tokens / (time.perf_counter() - began), writing)


def cost(name: str, tenants: Tenants, seconds: float, rounds: int) -> Iterator[Row]:
    """Rounds in turn, their medians, and what they say of points at their usual distance."""
    tenants.step()
    pairs = [[run_round(tenants, seconds, write=write) for write in (False, True)] for _ in range(rounds)]
    without, with_points = (median(pair[side].rate for pair in pairs) for side in (0, 1))
    writing = median(pair[1].writing for pair in pairs)
    every = f"with recovery points every {seconds:g} s"
    yield Row(f"{name}: without recovery points", round(without), "tokens/s")
    yield Row(f"{name}: {every}", round(with_points), "tokens/s")
    yield Row(f"{name}: throughput lost {every}", round(100 * (1 - with_points / without), 2), "%", goal=GOAL)
    yield Row(f"{name}: writing all points once", round(1000 * writing), "ms")
    share = min(writing / EVERY, points.SHARE)
    yield Row(f"{name}: writing, share of the time in service", round(100 * share, 2), "%", goal=GOAL)


def recovery(name: str, tenants: Tenants) -> Iterator[Row]:
    """How long the first step takes that finds every tenant on disk, less one that finds them on the device."""
    tenants.engine.write_points()
    usual = _timed(tenants)
    from_log = []
    for steps in (0, STEPS):
        tenants.engine.write_points()
        for _ in range(steps):
            tenants.step()
        tenants.new_engine()
        from_log.append(_timed(tenants) - usual)
    share = 1000 / len(tenants.ranks)
    yield Row(f"{name}: bringing one back from its recovery point", round(share * from_log[0], 1), "ms")
    yield Row(f"{name}: and executing {STEPS} steps again", round(share * from_log[1], 1), "ms")


def _timed(tenants: Tenants) -> float:
    began = time.perf_counter()
    tenants.step()
    return time.perf_counter() - began


def restart(folder: Path, model: str, rounds: int) -> Iterator[Row]:
    """From the death of a server's engine to the next answer, through the SDK."""
    seconds = []
    with LocalServer(folder / "data", folder / "log.txt", model=model) as server:
        os.environ.update(server.client_environment())
        with tinker.ServiceClient() as service:
            client = service.create_lora_training_client(model, rank=32).result()
            data = [datum(LENGTH, first) for first in range(DATUMS)]
            for _ in range(rounds):
                client.forward_backward(data, "cross_entropy").result()
                client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
                engine = server.processes()["engine"]
                began = time.perf_counter()
                engine.kill()
                psutil.wait_procs([engine], 30)
                client.forward_backward(data, "cross_entropy").result()
                seconds.append(time.perf_counter() - began)
    yield Row("engine killed: until the next answer, median", round(median(seconds), 2), "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=EVERY, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args()
    served = Served(options.model, base_of(options.model))
    backend = load_backend(Settings(), served, lambda progress: None)
    points.POINT_SECONDS = math.inf  # the rounds say when
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, (case, ranks) in enumerate(CASES.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            tenants = Tenants(folder, backend, served.base, ranks)
            rows += [*cost(case, tenants, options.seconds, options.rounds), *recovery(case, tenants)]
            tenants.close()
        folder = Path(name) / "server"
        folder.mkdir()
        rows += restart(folder, options.model, options.rounds)
    record("recovery_cost", rows)


if __name__ == "__main__":
    main()
