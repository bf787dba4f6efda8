"""How the server bears load: requests offered at a rate, far beyond what it can do, by many tenants at once.

    python -m benchmarks.load [--rates N …] [--seconds N] [--tenants N] [--samplers N] [--outstanding N]

Tenants are sessions that sample, train and beat over HTTP, as the client would, without its waiting and its threads.
For every offered rate, in requests a second: what was done of it, how long requests took from submission to result,
how long heartbeats took meanwhile (those of another process: this one is busy itself), and how much memory the server's
processes held at most. Then a burst: as many requests as may be outstanding at once, from the first submission to the
last result; and one tenant alone, then beside another with a hundred times its load, and how long a pass of the
sampler took meanwhile.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

import httpx
import psutil
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types import ForwardBackwardInput, ForwardBackwardRequest

from benchmarks.beats import Beats
from benchmarks.one_by_one import seconds_of_each
from benchmarks.recording import Row, percentile, record
from benchmarks.tenants import datum
from tinsmith.demo.local_server import LocalServer

SAMPLED, PROMPT, TRAINED = 8, 16, 16  # tokens of a request
SAMPLE: dict[str, Any] = {
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(range(PROMPT))}]},
    "sampling_params": {"max_tokens": SAMPLED, "stop": []},
}
TRAINING_SHARE = 8  # one request in so many
FLOOD_SECONDS = 3.0  # for which the large tenant's throughput is looked at
PATIENCE = 120.0  # for one answer
WATCH_SECONDS = 0.2
TRIES = 5  # of a request whose connection breaks
PASSES, BEAT_AGE = "tinsmith_sampling_requests_count", "tinsmith_engine_beat_age_seconds"
CLIENTS = 64  # a client looks at all its connections for every request, so it must not have many


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many sessions there are, and samplers of theirs; each session has one model."""

    tenants: int = 64
    samplers: int = 200


@dataclass(slots=True)
class Seen:
    """What one phase saw: seconds of every request and heartbeat, errors, 429s, and bytes of memory."""

    requests: list[float] = field(default_factory=list)
    heartbeats: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: int = 0
    memory: int = 0


class Tenants:
    """The sessions with what they own, and HTTP clients that all of them use in turn."""

    def __init__(self, clients: list[httpx.AsyncClient], base_url: str) -> None:
        self._clients = cycle(clients)
        self._base_url = base_url
        self.broken = 0  # connections, of which the server had closed most for being idle when a request came
        self.sessions: list[str] = []
        self.models: list[str] = []
        self.samplers: list[str] = []
        self._seqs: dict[str, Iterator[int]] = {}
        self._turns, self._samples = count(), count()

    async def create(self, crowd: Crowd) -> None:
        """Models and samplers are spread over the sessions evenly."""
        for _ in range(crowd.tenants):
            answer = await self._post("/create_session", {"tags": [], "sdk_version": "0.38.0"})
            self.sessions.append(answer["session_id"])
        created = []
        for session in self.sessions:
            body = {
                "session_id": session,
                "model_seq_id": 0,
                "base_model": "tiny",
                "lora_config": {"rank": 4, "seed": 1},
            }
            created.append(await self._post("/create_model", body))
        for number in range(crowd.samplers):
            body = {"session_id": self.sessions[number % crowd.tenants], "base_model": "tiny"}
            answer = await self._post("/create_sampling_session", body | {"sampling_session_seq_id": number})
            self.samplers.append(answer["sampling_session_id"])
        self.models = [answer["model_id"] for answer in created]
        self._seqs = {subject: count(1) for subject in (*self.models, *self.samplers)}
        for answer in created:
            await self._result(answer["request_id"])

    async def beat(self, session: str) -> None:
        await self._post("/session_heartbeat", {"session_id": session})

    async def passes(self) -> tuple[float, float]:
        """How many passes the sampler had made by its engine's next heartbeat, and when that was."""
        now = time.perf_counter()
        while True:
            text = (await next(self._clients).get(f"{self._base_url}/metrics")).text
            numbers = {line.partition("{")[0]: float(line.split()[-1]) for line in text.splitlines() if "{" in line}
            at = time.perf_counter() - numbers[BEAT_AGE]
            if at > now:
                return numbers.get(PASSES, 0.0), at
            await asyncio.sleep(WATCH_SECONDS)

    async def one(self, seen: Seen) -> None:
        """A sample, or now and then a training request, from submission to result; samplers and models take turns."""
        turn = next(self._turns)
        began = time.perf_counter()
        try:
            if turn % TRAINING_SHARE:
                await self.sample(self.samplers[next(self._samples) % len(self.samplers)], seen)
            else:
                await self.train(self.models[turn // TRAINING_SHARE % len(self.models)], seen)
        except (httpx.HTTPError, RuntimeError) as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            return
        seen.requests.append(time.perf_counter() - began)

    async def sample(self, sampler: str, seen: Seen) -> None:
        body = {"sampling_session_id": sampler, "seq_id": next(self._seqs[sampler])}
        answer = await self._admitted(seen, "/asample", json=body | SAMPLE)
        await self._result(answer["request_id"])

    async def sample_alone(self, sampler: str, times: int) -> list[float]:
        """Seconds of some samples, one after the other, from a process of their own."""
        first = next(self._seqs[sampler])
        self._seqs[sampler] = count(first + times)
        return await seconds_of_each(self._base_url, sampler, first, SAMPLE, times)

    async def train(self, model: str, seen: Seen) -> None:
        seq = next(self._seqs[model])
        content = ForwardBackwardInput(data=[datum(TRAINED, seq)], loss_fn="cross_entropy")
        request = ForwardBackwardRequest(model_id=model, seq_id=seq, forward_backward_input=content)
        message = forward_backward_request_to_proto(request).SerializeToString()
        answer = await self._admitted(seen, "/forward_backward", content=message)
        await self._result(answer["request_id"])

    async def _admitted(self, seen: Seen, path: str, **arguments: Any) -> dict[str, str]:
        """The answer to a submission; 429 is obeyed."""
        while (answer := await self._send(path, **arguments)).status_code == 429:
            seen.refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
        return _json(answer)

    async def _post(self, path: str, body: dict[str, object]) -> dict[str, str]:
        return _json(await self._send(path, json=body))

    async def _send(self, path: str, **arguments: Any) -> httpx.Response:
        """Like the real client, makes broken connections again: the same request twice does no harm."""
        for left in reversed(range(TRIES)):
            try:
                return await next(self._clients).post(path, **arguments)
            except httpx.TransportError:
                self.broken += 1
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _result(self, request_id: str) -> None:
        body = {"request_id": request_id}
        while (answer := await self._send("/retrieve_future", json=body)).status_code == 408:
            pass
        if answer.status_code != 200 or answer.content.startswith(b'{"error"'):
            raise RuntimeError(f"{request_id}: {answer.status_code} {answer.text[:200]}")


def _json(answer: httpx.Response) -> dict[str, str]:
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.request.url.path}: {answer.status_code} {answer.text[:200]}")
    found: dict[str, str] = answer.json()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 40, 160])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--samplers", type=int, default=200)
    parser.add_argument("--outstanding", type=int, default=2048)
    arguments = parser.parse_args()
    crowd = Crowd(arguments.tenants, arguments.samplers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LocalServer(folder / "data", folder / "log.txt") as server:
            rows = asyncio.run(measure(server, crowd, arguments.rates, arguments.seconds, arguments.outstanding))
    record("load", rows)


async def measure(
    server: LocalServer, crowd: Crowd, rates: list[float], seconds: float, outstanding: int, flood: int = 100
) -> list[Row]:
    """All phases, one after the other."""
    rows: list[Row] = []
    async with (
        tenants_of(server.base_url, crowd) as tenants,
        Beats(server.base_url, tenants.sessions) as beats,
    ):
        for rate in rates:
            async with watching(server, beats) as seen:
                took = await offer(tenants, rate, seconds, seen)
            rows += _rows(f"{rate:g} requests/s offered", seen, took)
        async with watching(server, beats) as seen:
            took = await burst(tenants, outstanding, seen)
        rows += _rows(f"{outstanding} outstanding at once", seen, took)
        rows += await neighbours(tenants, flood)
        rows.append(Row("connections that broke, and were made again", tenants.broken, "connections"))
    return rows


def _rows(name: str, seen: Seen, seconds: float) -> Iterator[Row]:
    yield Row(f"{name}: throughput", round(len(seen.requests) / seconds, 1), "requests/s")
    yield Row(f"{name}: p50", round(1000 * percentile(seen.requests, 0.5), 1), "ms")
    yield Row(f"{name}: p99", round(1000 * percentile(seen.requests, 0.99), 1), "ms")
    if seen.heartbeats:  # on a fast machine a phase may be over before the first
        yield Row(f"{name}: heartbeat, p99", round(1000 * percentile(seen.heartbeats, 0.99), 1), "ms", goal="100")
    yield Row(f"{name}: memory of API and engine, peak", round(seen.memory / 2**20), "MiB")
    yield Row(f"{name}: told to come again (429)", seen.refused, "answers")
    yield Row(f"{name}: errors", len(seen.errors), "requests", goal="0")


@asynccontextmanager
async def tenants_of(base_url: str, crowd: Crowd) -> AsyncIterator[Tenants]:
    """A crowd on a running server, and as many connections as it needs."""
    options: dict[str, Any] = {
        "base_url": f"{base_url}/api/v1",
        "headers": {"X-API-Key": "tml-local"},
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        "timeout": PATIENCE,
        "trust_env": False,
        "verify": False,  # there is no TLS, and preparing for it takes time
    }
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(httpx.AsyncClient(**options)) for _ in range(CLIENTS)]
        tenants = Tenants(clients, base_url)
        await tenants.create(crowd)
        yield tenants


@asynccontextmanager
async def watching(server: LocalServer, beats: Beats) -> AsyncIterator[Seen]:
    """What the sessions' beats and the server's memory were like while the block ran."""
    seen = Seen()

    async def look() -> None:
        while True:
            seen.memory = max(seen.memory, _memory(server))
            await asyncio.sleep(WATCH_SECONDS)

    await beats.take()
    looking = asyncio.create_task(look())
    try:
        yield seen
    finally:
        looking.cancel()
        seen.heartbeats, errors = await beats.take()
        seen.errors += errors


def _memory(server: LocalServer) -> int:
    with suppress(psutil.NoSuchProcess):
        return sum(process.memory_info().rss for role, process in server.processes().items() if role != "server")
    return 0


async def offer(tenants: Tenants, rate: float, seconds: float, seen: Seen) -> float:
    """Requests at even distances, whether or not the earlier ones have ended; seconds until the last has."""
    began = time.perf_counter()
    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(tenants.one(seen)))
    await asyncio.gather(*tasks)
    return time.perf_counter() - began


async def burst(tenants: Tenants, requests: int, seen: Seen) -> float:
    """All requests at once; seconds until the last has ended."""
    began = time.perf_counter()
    await asyncio.gather(*(tenants.one(seen) for _ in range(requests)))
    return time.perf_counter() - began


async def neighbours(tenants: Tenants, load: int, times: int = 20) -> list[Row]:
    """One session's samples one after the other, alone and beside another session that keeps `load` under way."""
    quiet, loud = tenants.samplers[:2]
    alone = await tenants.sample_alone(quiet, times)
    async with _flood(tenants, loud, load) as done:
        undisturbed = await _rate(done, FLOOD_SECONDS)
        passes, began = await tenants.passes()
        disturbing = asyncio.create_task(_rate(done, FLOOD_SECONDS))
        beside = await tenants.sample_alone(quiet, times)
        more, ended = await tenants.passes()
        a_pass, disturbed = (ended - began) / max(1.0, more - passes), await disturbing
    own, crowded = percentile(alone, 0.5), percentile(beside, 0.5)
    bound = f"{1000 * (2 * own + a_pass):.1f}: twice alone, and a pass"
    return [
        Row("one tenant alone: p50", round(1000 * own, 1), "ms"),
        Row(f"beside {load} times its load: a pass of the sampler, mean", round(1000 * a_pass, 1), "ms"),
        Row(f"beside {load} times its load: p50", round(1000 * crowded, 1), "ms", goal=bound),
        Row(f"beside {load} times its load / alone: p50", round(crowded / own, 2), "times"),
        Row("the large tenant alone: throughput", round(undisturbed, 1), "requests/s"),
        Row("the large tenant beside the small one: throughput", round(disturbed, 1), "requests/s"),
    ]


@asynccontextmanager
async def _flood(tenants: Tenants, sampler: str, load: int) -> AsyncIterator[Seen]:
    """Keeps `load` samples under way while the block runs; those that are done are among the requests seen."""
    over, done = asyncio.Event(), Seen()

    async def flood() -> None:
        while not over.is_set():
            began = time.perf_counter()
            await tenants.sample(sampler, done)
            done.requests.append(time.perf_counter() - began)

    floods = [asyncio.create_task(flood()) for _ in range(load)]
    try:
        yield done
    finally:
        over.set()
        await asyncio.gather(*floods)


async def _rate(done: Seen, seconds: float) -> float:
    """Requests a second, over so many from now on."""
    before, began = len(done.requests), time.perf_counter()
    await asyncio.sleep(seconds)
    return (len(done.requests) - before) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
