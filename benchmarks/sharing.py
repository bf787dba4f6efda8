"""One device shared by training and sampling: what each loses to the other, through the server.

    python -m benchmarks.sharing [--seconds N]

One client trains on long requests without a pause, another keeps a number of samples running, a third asks for one
token at a time. Each runs alone first, then all together. The embedded model, cross entropy, a server of its own.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import tinker
from tinker import types

from benchmarks.recording import Row, percentile, record
from benchmarks.round_trip import datum
from tinsmith.demo.local_server import LocalServer

DATUMS, LENGTH = 64, 128  # of one training request: 8,192 tokens
SAMPLES, SAMPLED, PROMPT = 16, 64, 16


@dataclass
class Curve:
    """What one client got done: tokens, and the seconds that each of its requests took."""

    tokens_each: int
    seconds: list[float] = field(default_factory=list)

    def rate(self) -> float:
        """Tokens per second of the time in which its requests ran."""
        return self.tokens_each * len(self.seconds) / sum(self.seconds) if self.seconds else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LocalServer(folder / "data", folder / "log.txt") as server:
            os.environ.update(server.client_environment())
            with tinker.ServiceClient() as service:
                record("sharing", list(rows(actions(service), seconds)))


def actions(service: tinker.ServiceClient) -> dict[str, tuple[int, Callable[[], object]]]:
    """What each client does again and again, and how many tokens that is."""
    trainer = service.create_lora_training_client("tiny", rank=16).result()
    sampler = service.create_sampling_client(base_model="tiny").result()
    data = [datum(LENGTH, first) for first in range(DATUMS)]
    prompt = types.ModelInput.from_ints(list(range(PROMPT)))
    many, one = types.SamplingParams(max_tokens=SAMPLED, stop=[]), types.SamplingParams(max_tokens=1, stop=[])
    return {
        "training": (DATUMS * LENGTH, lambda: trainer.forward_backward(data, "cross_entropy").result()),
        "sampling": (SAMPLES * SAMPLED, lambda: sampler.sample(prompt, SAMPLES, many).result()),
        "one token": (1, lambda: sampler.sample(prompt, 1, one).result()),
    }


def rows(clients: dict[str, tuple[int, Callable[[], object]]], seconds: float) -> Iterator[Row]:
    alone = {name: run({name: client}, seconds)[name] for name, client in clients.items()}
    training_and_one = run({name: clients[name] for name in ("training", "one token")}, seconds)
    together = run(clients, seconds)
    for case, curves in (("alone", alone), ("beside training only", training_and_one), ("all together", together)):
        for name, curve in curves.items():
            if name == "one token":
                yield Row(f"{case}: one token, median", round(1000 * median(curve.seconds), 1), "ms")
                yield Row(f"{case}: one token, p99", round(1000 * percentile(curve.seconds, 0.99), 1), "ms")
            else:
                yield Row(f"{case}: {name}", round(curve.rate()), "tokens/s")


def run(clients: dict[str, tuple[int, Callable[[], object]]], seconds: float) -> dict[str, Curve]:
    """Each client in a thread, until the time is over."""
    curves = {name: Curve(tokens) for name, (tokens, _) in clients.items()}
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=repeat, args=(action, curves[name], until)) for name, (_, action) in clients.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return curves


def repeat(action: Callable[[], object], curve: Curve, until: float) -> None:
    action()
    while time.monotonic() < until:
        began = time.perf_counter()
        action()
        curve.seconds.append(time.perf_counter() - began)


if __name__ == "__main__":
    main()
