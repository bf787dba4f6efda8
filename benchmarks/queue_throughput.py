"""How many jobs a second go through the queue: submitted, claimed, completed, each in its usual process's way.

    python -m benchmarks.queue_throughput [--jobs N] [--submitters N] [--url URL …]

Submitters are asyncio tasks that wait for each commit, as the API does; one thread claims and completes, as the engine
does. Without --url: an SQLite file, and a Postgres server of our own if Postgres is installed.
"""

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.recording import Row, record
from tests.throwaway_postgres import throwaway_postgres
from tinsmith.store import queue
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Bell, Doorbell
from tinsmith.wire.jobs import Job, Outcome

BODY = bytes(4096)  # a prompt of about a thousand tokens
BASE = "bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--submitters", type=int, default=64)
    parser.add_argument("--url", action="append", help="a database to measure (more than once: several)")
    arguments = parser.parse_args()
    with databases(arguments.url) as urls:
        rows = [
            Row(f"{url.partition(':')[0]}: {name.replace('_', ' ')}", round(value, 2), unit)
            for url in urls
            for name, value, unit in measure(url, arguments.jobs, arguments.submitters)
        ]
    record("queue_throughput", rows)


@contextmanager
def databases(urls: list[str] | None) -> Iterator[list[str]]:
    """The databases to measure."""
    if urls:
        yield urls
        return
    with tempfile.TemporaryDirectory() as folder, throwaway_postgres() as server:
        yield [f"sqlite:///{folder}/queue.db", *([server.url()] if server else [])]


def measure(url: str, jobs: int, submitters: int) -> Iterator[tuple[str, float, str]]:
    """Throughput with many submitters, then the latency of one job at a time."""
    api, engine = Database(url), Database(url)
    api.migrate()
    asyncio.run(_submit_all(api, "warm-up", 100, 1))
    seconds, cpu_seconds = _throughput(api, engine, jobs, submitters, consume=False)
    yield "submit", jobs / seconds, "jobs/s"
    yield "submit_cpu", 1e6 * cpu_seconds / jobs, "us/job"
    _drain(engine, jobs + 100)
    seconds, cpu_seconds = _throughput(api, engine, jobs, submitters, consume=True)
    yield "submit_claim_complete", jobs / seconds, "jobs/s"
    yield "submit_claim_complete_cpu", 1e6 * cpu_seconds / jobs, "us/job"
    yield from _round_trips(url, api, engine)
    api.close()
    engine.close()


def _throughput(api: Database, engine: Database, jobs: int, submitters: int, *, consume: bool) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU."""
    began, cpu_began = time.perf_counter(), time.process_time()
    consumer = threading.Thread(target=_drain, args=(engine, jobs))
    if consume:
        consumer.start()
    asyncio.run(_submit_all(api, f"throughput-{consume}", jobs, submitters))
    if consume:
        consumer.join()
    return time.perf_counter() - began, time.process_time() - cpu_began


async def _submit_all(api: Database, subject: str, jobs: int, submitters: int) -> None:
    async def submit_some(submitter: int) -> None:
        for seq in range(submitter, jobs, submitters):
            await api.write_async(queue.submit, _job(f"{subject}:{submitter}", seq))

    await asyncio.gather(*(submit_some(submitter) for submitter in range(submitters)))


def _drain(engine: Database, jobs: int) -> None:
    """Claims and completes until `jobs` jobs have ended."""
    while jobs > 0:
        headers = engine.write(queue.claim, BASE, "engine", 256)
        if headers:
            numbers = [header.number for header in headers]
            bodies = engine.read(queue.payloads, numbers)
            jobs -= len(engine.write(queue.complete, [Outcome(number, bodies[number]) for number in numbers]))
        else:
            time.sleep(0.001)


def _round_trips(url: str, api: Database, engine: Database) -> Iterator[tuple[str, float, str]]:
    """One job at a time, woken by the doorbell on both sides: submit → claim → complete → find."""
    doorbell = Doorbell(url)
    work, results = doorbell.listen("jobs"), doorbell.listen("done")
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            work.wait(0.2)
            headers = engine.write(queue.claim, BASE, "engine", 256)
            if headers:
                outcomes = [Outcome(header.number, BODY) for header in headers]
                doorbell.ring("done", engine.write(queue.complete, outcomes))

    server = threading.Thread(target=serve)
    server.start()
    seconds = sorted(_round_trip(api, doorbell, results, seq) for seq in range(300))
    stop.set()
    server.join()
    for listener in (work, results, doorbell):
        listener.close()
    yield "round_trip_median", 1000 * seconds[150], "ms"
    yield "round_trip_p99", 1000 * seconds[297], "ms"


def _round_trip(api: Database, doorbell: Doorbell, results: Bell, seq: int) -> float:
    began = time.perf_counter()
    request_id = api.write(queue.submit, _job("latency", seq))
    doorbell.ring("jobs")
    while request_id not in results.wait(1.0):
        pass
    future = api.read(queue.find, request_id)
    assert future is not None and future.state == "done"
    return time.perf_counter() - began


def _job(subject: str, seq: int) -> Job:
    return Job(subject, seq, "sample", "owner", BASE, BODY, 1000)


if __name__ == "__main__":
    main()
