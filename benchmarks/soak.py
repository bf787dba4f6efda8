"""Scripts that learn while the server's processes are killed, and what they notice of it.

    python -m benchmarks.soak [--kills N] [--seed N] [--deterministic] [--database-url URL]

Tenants run supervised and RL-like loops with the unmodified SDK; meanwhile the engine, the API, the supervisor or all
of them meet kill -9 at seeded moments. In the end every script must have finished, every job have ended, and no result
have changed after it was there. With --deterministic the scripts run once more on a server that nobody hurts: every
answer, and the final weights and optimizer states, must be the same bits.

A request that two engines in a row died of is taken for the cause and fails, so the next blow waits for a few answers.
"""

import argparse
import hashlib
import os
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import sqlalchemy as sa
import tinker
from tinker import types

from benchmarks.recording import Row, record
from tinsmith.demo.local_server import LocalServer
from tinsmith.store.database import Database
from tinsmith.store.tables import jobs, results
from tinsmith.supervisor import MAX_CRASHES

ROLES = ("engine", "api", "tree", "engine", "server")
"""What is killed in turn: one process (`server` is the supervisor), or all three at once (`tree`)."""

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
STATE_EVERY = 4  # steps
ANSWERS = 4  # between two blows, for every tenant
HANGING = 180.0  # seconds without an answer
THINKING = 0.2  # seconds between two steps of a script; the run without blows does not need them


@dataclass
class Tenant:
    """One script, in a thread of its own. It ends after `steps`, or (None) with the step in which `enough` is set."""

    name: str
    rank: int
    policy: bool  # learns from its own samples, not from given tokens
    enough: threading.Event
    steps: int | None = None
    done: int = 0
    answers: list[tuple[float, str]] = field(default_factory=list)  # when, and a digest of what
    final: str = ""
    error: BaseException | None = None

    def run(self, base_url: str) -> None:
        try:
            with tinker.ServiceClient(base_url=base_url) as service:
                client = service.create_lora_training_client("tiny", rank=self.rank, seed=5).result()
                while self.done != self.steps and not (self.steps is None and self.enough.is_set()):
                    self._learn(client)
                    if self.done % STATE_EVERY == 0:
                        client.save_state(f"state-{self.done}").result()
                    self.done += 1
                    if self.steps is None:
                        time.sleep(THINKING)
                self.final = client.save_state("final").result().path
        except BaseException as error:
            self.error = error

    def _learn(self, client: tinker.TrainingClient) -> None:
        """One step, whose two requests are sent before either is answered."""
        loss = "importance_sampling" if self.policy else "cross_entropy"
        data = self._rollouts(client) if self.policy else [self._lesson(place) for place in range(2)]
        trained, stepped = client.forward_backward(data, loss), client.optim_step(ADAM)
        for output in trained.result().loss_fn_outputs:
            self._note(output["logprobs"].data)
        self._note(sorted((stepped.result().metrics or {}).items()))

    def _lesson(self, place: int) -> types.Datum:
        tokens = _tokens(12 + self.done % 5, self.done, place)
        return _datum(tokens, {"weights": [1.0] * (len(tokens) - 1)})

    def _rollouts(self, client: tinker.TrainingClient) -> list[types.Datum]:
        """Samples of the weights as they are, rewarded for even tokens."""
        sampler = client.save_weights_and_get_sampling_client().result()
        prompts = [_tokens(6, self.done, place) for place in range(2)]
        params = [types.SamplingParams(max_tokens=8, seed=10 * self.done + n, stop=[]) for n in range(len(prompts))]
        asked = [
            sampler.sample(types.ModelInput.from_ints(prompt), 3, each)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        data = []
        for prompt, future in zip(prompts, asked, strict=True):
            for sequence in future.result().sequences:
                self._note((sequence.tokens, sequence.logprobs))
                data.append(_rollout(prompt, sequence.tokens, sequence.logprobs or []))
        return data

    def _note(self, answer: object) -> None:
        self.answers.append((time.time(), hashlib.sha256(repr(answer).encode()).hexdigest()))


def _tokens(count: int, step: int, place: int) -> list[int]:
    return [int(token) for token in np.random.default_rng([step, place]).integers(0, 1270, count)]


def _datum(tokens: Sequence[int], inputs: dict[str, list[float]]) -> types.Datum:
    arrays = {name: np.array(values, np.float32) for name, values in inputs.items()}
    model_input = types.ModelInput.from_ints(list(tokens[:-1]))
    targets = np.array(tokens[1:], np.int64)
    return types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets, **arrays})


def _rollout(prompt: Sequence[int], sampled: Sequence[int], logprobs: Sequence[float]) -> types.Datum:
    before = [0.0] * (len(prompt) - 1)
    reward = sum(token % 2 == 0 for token in sampled) / len(sampled) - 0.5
    inputs = {"logprobs": before + list(logprobs), "advantages": before + [reward] * len(sampled)}
    return _datum([*prompt, *sampled], inputs)


@dataclass(frozen=True)
class Kill:
    """One blow: what it hit, and when (seconds since the epoch)."""

    role: str
    at: float


class Killer:
    """Kills processes of `server` at seeded moments, in time for every tenant to get on in between."""

    def __init__(
        self, server: LocalServer, database: Database, tenants: Sequence[Tenant], seed: int, roles: Sequence[str]
    ) -> None:
        self.kills: list[Kill] = []
        self.changed: set[int] = set()  # jobs whose result became another one
        self._server = server
        self._database = database
        self._tenants = tenants
        self._random = random.Random(seed)
        self._roles = roles
        self._results: dict[int, str] = {}

    def run(self, count: int) -> None:
        """`count` blows. Ends early when a script has failed."""
        while len(self.kills) < count and self._progress():
            time.sleep(self._random.uniform(0.0, 2.0))
            self.compare_results()
            self._kill(self._roles[len(self.kills) % len(self._roles)])
            if len(self.kills) < count and self._random.random() < 0.3:
                self._kill_while_loading()

    def compare_results(self) -> None:
        """Notes which answers have changed since they were seen last."""
        now = self._database.read(result_digests)
        self.changed |= {number for number, digest in self._results.items() if now.get(number, digest) != digest}
        self._results |= now

    def _progress(self) -> bool:
        """Waits until every tenant has got some answers, behind the last blow; false if a script is over or hangs."""
        deadline = time.monotonic() + HANGING
        since = self.kills[-1].at if self.kills else 0.0
        while any(sum(at > since for at, _ in tenant.answers) < ANSWERS for tenant in self._tenants):
            if time.monotonic() > deadline or any(tenant.error or tenant.final for tenant in self._tenants):
                return False
            time.sleep(0.05)
        return True

    def _kill(self, role: str) -> None:
        role = self._bearable(role)
        processes = self._server.processes()
        hit = list(processes.values()) if role == "tree" else [processes[role]] if role in processes else []
        if not hit:
            return
        for process in hit:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.kills.append(Kill(role, time.time()))
        psutil.wait_procs(hit, 30)
        if role in ("tree", "server"):
            self._server.stop()  # takes note of its end
            self._server.start()

    def _bearable(self, role: str) -> str:
        """`role`, or everything where the supervisor would take one more crash of it for a reason to give up."""
        crashes = 0
        for kill in reversed(self.kills):
            if kill.role in ("tree", "server"):
                break
            crashes += kill.role == role
        return "tree" if crashes >= MAX_CRASHES else role

    def _kill_while_loading(self) -> None:
        """The engine once more, before it has taken anything up."""
        until = time.monotonic() + self._random.uniform(0.5, 5.0)
        while time.monotonic() < until:
            time.sleep(0.05)
        if not self._server.is_ready():
            self._kill("engine")


def result_digests(conn: sa.Connection) -> dict[int, str]:
    """Every result that there is, by its job's number."""
    rows = conn.execute(sa.select(results.c.number, results.c.body))
    return {number: hashlib.sha256(body).hexdigest() for number, body in rows}


def job_states(conn: sa.Connection) -> dict[str, int]:
    """How many jobs are in each state."""
    return Counter(conn.scalars(sa.select(jobs.c.state)))


def recoveries(conn: sa.Connection, kills: Sequence[Kill], answers: Sequence[float]) -> list[float]:
    """Seconds from each blow to the next answer: made by an engine, and received by a client, after it.

    A blow that another one followed before that counts from there on, too.
    """
    ended = sorted(at for at in conn.scalars(sa.select(jobs.c.finished_at)) if at is not None)
    found = []
    for kill in kills:
        after = [next((at for at in sorted(times) if at > kill.at), kill.at) for times in (ended, answers)]
        found.append(max(after) - kill.at)
    return found


def run_tenants(tenants: Sequence[Tenant], base_url: str) -> list[threading.Thread]:
    """Starts every script."""
    threads = [threading.Thread(target=tenant.run, args=(base_url,), daemon=True) for tenant in tenants]
    for thread in threads:
        thread.start()
    return threads


def final_files(data_dir: Path, tenant: Tenant) -> dict[str, str]:
    """Digests of the weights and the optimizer state that a script saved last, by file name."""
    model_id = tenant.final.removeprefix("tinker://").split("/")[0].replace(":", "_")
    [folder] = (data_dir / "checkpoints" / model_id / "weights").glob("final-*")
    files = folder.glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@dataclass(frozen=True)
class Soak:
    """What a run showed; `problems` is empty if nothing was lost."""

    kills: list[Kill]
    requests: int
    recovered: list[float]
    problems: list[str]


def soak(
    folder: Path,
    *,
    kills: int,
    seed: int = 0,
    ranks: Sequence[int] = (8, 16, 0),
    roles: Sequence[str] = ROLES,
    deterministic: bool = False,
    database_url: str = "",
    minutes: float = 60.0,
) -> Soak:
    """One tenant for each of `ranks` (0: all weights), every second an RL-like one; `roles` are killed in turn.

    Works in the empty `folder`.
    """
    arguments = ["--threads", "1", *(["--deterministic"] if deterministic else [])]
    database_url = database_url or f"sqlite:///{folder}/data/tinsmith.db"
    enough = threading.Event()
    tenants = [Tenant(f"tenant {n}", rank, n % 2 == 1, enough) for n, rank in enumerate(ranks)]
    port = ["--port", str(free_port()), "--database-url", database_url]
    with LocalServer(folder / "data", folder / "log.txt", [*arguments, *port]) as server:
        database = Database(database_url)
        threads = run_tenants(tenants, server.base_url)
        killer = Killer(server, database, tenants, seed, roles)
        killer.run(kills)
        enough.set()
        problems = _wait(threads, tenants, minutes)
        killer.compare_results()
        problems += [f"the result of job {number} changed" for number in sorted(killer.changed)]
        states = database.read(job_states)
        problems += [f"{states[state]} jobs {state}" for state in states if state != "done"]
        answers = [at for tenant in tenants for at, _ in tenant.answers]
        recovered = database.read(recoveries, killer.kills, answers)
        database.close()
    if deterministic and not problems:
        problems += differences(folder, tenants, arguments, minutes)
    return Soak(killer.kills, sum(states.values()), recovered, problems)


def differences(folder: Path, tenants: Sequence[Tenant], arguments: Sequence[str], minutes: float) -> list[str]:
    """What the same scripts get on a server that nobody hurts, where it is not the same."""
    calm = [Tenant(t.name, t.rank, t.policy, t.enough, steps=t.done) for t in tenants]
    with LocalServer(folder / "calm", folder / "calm.txt", arguments) as server:
        problems = _wait(run_tenants(calm, server.base_url), calm, minutes)
    for hurt, quiet in zip(tenants, calm, strict=True):
        if [digest for _, digest in hurt.answers] != [digest for _, digest in quiet.answers]:
            problems.append(f"{hurt.name}: some answer has other bits")
        elif not problems and final_files(folder / "data", hurt) != final_files(folder / "calm", quiet):
            problems.append(f"{hurt.name}: the final weights or optimizer state have other bits")
    return problems


def _wait(threads: Sequence[threading.Thread], tenants: Sequence[Tenant], minutes: float) -> list[str]:
    """What went wrong in the scripts."""
    deadline = time.monotonic() + 60 * minutes
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    problems = [f"{tenant.name} failed: {tenant.error!r}" for tenant in tenants if tenant.error]
    return problems + [f"{tenant.name} hangs" for tenant in tenants if not (tenant.error or tenant.final)]


def free_port() -> int:
    """A loopback port that is free now, to be the same one after every restart."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--database-url", default="")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which stays")
    options = parser.parse_args()
    os.environ.update({"TINKER_API_KEY": "tml-local", "NO_PROXY": "127.0.0.1,localhost", "TINKER_TELEMETRY": "0"})
    with tempfile.TemporaryDirectory() as name:
        run = soak(
            (options.keep or Path(name)).absolute(),
            kills=options.kills,
            seed=options.seed,
            deterministic=options.deterministic,
            database_url=options.database_url,
        )
    for problem in run.problems:
        print(problem)
    roles = Counter(kill.role for kill in run.kills)
    rows = [Row(f"kills: {role}", count, "") for role, count in sorted(roles.items())]
    rows += [
        Row("requests answered", run.requests, ""),
        Row("problems (scripts, jobs or bits)", len(run.problems), "", goal="0"),
        Row("from a kill to the next answer, median", round(median(run.recovered), 1), "s"),
        Row("from a kill to the next answer, max", round(max(run.recovered), 1), "s"),
    ]
    record("soak", rows)
    raise SystemExit(bool(run.problems))


if __name__ == "__main__":
    main()
