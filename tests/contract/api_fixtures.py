"""The API alone, over HTTP on a real store, with an engine that answers every job with something of the right form."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from starlette.applications import Starlette

from tinsmith.api.app import create_app
from tinsmith.api.calls import Services
from tinsmith.api.connections import ACCEPTED_AT_ONCE, BoundedConnection, PatientServer
from tinsmith.config import Settings
from tinsmith.protocols import Capabilities
from tinsmith.served import choose_served
from tinsmith.store import queue, records
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.wire.jobs import Header, Outcome
from tinsmith.wire.packing import SampleCall, SampleOutput, TrainCall, TrainOutput

VOCABULARY, CONTEXT = 512, 256
FOREVER = 60.0  # seconds: only a test that fails waits for so long
CAPABILITIES = Capabilities(
    architecture="qwen3",
    vocab_size=VOCABULARY,
    max_context=CONTEXT,
    max_lora_rank=64,
    max_adapters=8,
    parameters=1_000_000,
    dtype="float32",
    device="cpu",
)


class CannedEngine:
    """Claims jobs as an engine does, remembers them, and answers without computing anything."""

    def __init__(self, database: Database, doorbell: Doorbell, base: str) -> None:
        self.jobs: list[tuple[Header, bytes]] = []
        self.working = threading.Lock()  # whoever else holds it stops the engine from claiming jobs
        self.says: list[int] | None = None  # the tokens of every sample; None: what `sample_output` makes up
        self._database, self._doorbell, self._base = database, doorbell, base
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, state: str, capabilities: Capabilities | None) -> None:
        self.announce(state, capabilities)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def announce(self, state: str, capabilities: Capabilities | None) -> None:
        known = capabilities.to_dict() if capabilities else None
        record = records.EngineRecord(self._base, "canned", 1, state, "no progress", known, time.time())
        self._database.write(records.put_engine, record)
        self._doorbell.ring("engine")

    def bodies(self, subject: str) -> list[tuple[int, str, bytes]]:
        """(seq, kind, body) of what was asked of one model or sampler."""
        return [(header.seq, header.kind, body) for header, body in self.jobs if header.subject == subject]

    def _run(self) -> None:
        bell = self._doorbell.listen("jobs")
        while not self._closing.is_set():
            with self.working:
                headers = self._database.write(queue.claim, self._base, "canned", 100)
                bodies = self._database.read(queue.payloads, [header.number for header in headers])
                for header in headers:
                    self._finish(header, bodies[header.number])
            if not headers:
                bell.wait(0.1)
        bell.close()

    def _finish(self, header: Header, body: bytes) -> None:
        self.jobs.append((header, body))
        outcome = Outcome(header.number, self._result(header, body))
        self._doorbell.ring("done", self._database.write(queue.complete, [outcome]))

    def _result(self, header: Header, body: bytes) -> bytes:
        if header.kind in ("forward", "forward_backward"):
            return train_output(TrainCall.from_bytes(body)).to_bytes()
        if header.kind == "sample":
            call = SampleCall.from_bytes(body)
            return (sample_output(call) if self.says is None else saying(call, self.says)).to_bytes()
        request = json.loads(body)
        if header.kind.startswith(("save_weights", "import_weights")) and request["path"]:
            self._database.write(self._record, header.subject, request["path"], request["name"])
        answers: dict[str, dict[str, Any]] = {
            "create_model": {"model_id": header.subject},
            "load_weights": {"model_id": header.subject, "path": request.get("path")},
            "optim_step": {"metrics": {"grad_norm": 1.0}},
        }
        saved = {"path": request.get("path"), "sampling_session_id": request.get("sampler_id")}
        return json.dumps({"type": header.kind} | answers.get(header.kind, saved)).encode()

    def _record(self, conn: Any, model_id: str, path: str, name: str) -> None:
        model = records.find_model(conn, model_id)
        assert model is not None
        kind = {"weights": "training", "sampler_weights": "sampler"}.get(path.split("/")[-2], "external")
        checkpoint = records.Checkpoint(
            path, model_id, kind, name, model.owner, model.base, model.base_name, model.spec, "/nonexistent", 123,
            False, {}, time.time(), None,
        )  # fmt: skip
        records.create_checkpoint(conn, checkpoint, overwrite=True)


def train_output(call: TrainCall) -> TrainOutput:
    """Log-probabilities that count their tokens, so that a wrong order shows."""
    logprobs_M = -np.arange(len(call.targets_M), dtype=np.float32)
    return TrainOutput(logprobs_M, call.target_offsets, call.widths_N, {"loss:sum": float(call.num_tokens)})


def sample_output(call: SampleCall) -> SampleOutput:
    """Sequence i is i + 1 times token 7, with everything that was asked for."""
    lengths = np.arange(1, call.num_samples + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sampled, prompt = int(offsets[-1]), len(call.prompt_P)
    extras: dict[str, Any] = {}
    if call.prompt_logprobs:
        extras["prompt_logprobs"] = np.concatenate([[np.nan], -np.ones(prompt - 1)]).astype(np.float32)
    if k := call.topk_prompt_logprobs:
        extras["topk_prompt_ids"] = np.tile(np.arange(1, k + 1, dtype=np.int32), (prompt, 1))
        extras["topk_prompt_logprobs"] = -np.tile(np.arange(1, k + 1, dtype=np.float32), (prompt, 1))
        extras["topk_prompt_ids"][0], extras["topk_prompt_logprobs"][0] = 0, -99999.0
    if k := call.topk_sample_logprobs:
        extras["topk_sample_ids"] = np.tile(np.arange(k, dtype=np.int32), (sampled, 1))
        extras["topk_sample_logprobs"] = -np.tile(np.arange(1, k + 1, dtype=np.float32), (sampled, 1))
    if call.target_prompt_tokens is not None:
        asked = call.target_prompt_tokens
        extras["target_prompt_logprobs"] = np.where(asked >= 0, -asked.astype(np.float32), 0).astype(np.float32)
    if k := call.prompt_alt_tokens_k:
        extras["alt_tokens"] = np.full((prompt - 1, k), 3, np.int64)
        extras["alt_logprobs"] = np.full((prompt - 1, k), -0.5, np.float32)
    tokens_S = np.full(sampled, 7, np.int32)
    stopped = np.arange(call.num_samples, dtype=np.int8) % 2
    return SampleOutput(tokens_S, -np.ones(sampled, np.float32), offsets.astype(np.int64), stopped, 5, extras)


def saying(call: SampleCall, tokens: list[int]) -> SampleOutput:
    """These tokens in every sample, as far as they may go; log-probabilities count them."""
    said = tokens[: call.max_tokens]
    everything = np.tile(np.array(said, np.int32), call.num_samples)
    extras: dict[str, Any] = {}
    if k := call.topk_sample_logprobs:
        extras["topk_sample_ids"] = np.tile(np.arange(40, 40 + k, dtype=np.int32), (len(everything), 1))
        extras["topk_sample_logprobs"] = -np.tile(np.arange(1, k + 1, dtype=np.float32), (len(everything), 1))
    logprobs = np.tile(-np.arange(1, len(said) + 1, dtype=np.float32) / 8, call.num_samples)
    stopped = np.full(call.num_samples, len(said) == len(tokens), np.int8)
    return SampleOutput(
        everything, logprobs, len(said) * np.arange(call.num_samples + 1, dtype=np.int64), stopped, 5, extras
    )


class Api:
    """One running API, its store and its engine."""

    def __init__(self, port: int, app: Starlette, engine: CannedEngine, server: uvicorn.Server) -> None:
        services: Services = app.state.services
        self.base_url = f"http://127.0.0.1:{port}"
        self.routes = app.routes
        self.waiters, self.access, self.pacing = services.waiters, services.access, services.pacing
        self.counts = app.state.counts
        self.backlog = services.backlog
        self.settings, self.database, self.engine = services.settings, services.database, engine
        self.doorbell, self.chat, self.server = services.doorbell, app.state.chat, server
        self.http = self.client("tml-test")

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"X-API-Key": key}
        return httpx.Client(base_url=f"{self.base_url}/api/v1", headers=headers, timeout=FOREVER, trust_env=False)

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def session(self) -> str:
        return str(self.post("/create_session", tags=[], sdk_version="0.38.0").json()["session_id"])

    def model(self, session: str, number: int = 0, rank: int = 8) -> str:
        answer = self.post(
            "/create_model", session_id=session, model_seq_id=number, base_model="tiny", lora_config={"rank": rank}
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["model_id"])

    def sampler(self, session: str, number: int = 0) -> str:
        answer = self.post(
            "/create_sampling_session", session_id=session, sampling_session_seq_id=number, base_model="tiny"
        )
        return str(answer.json()["sampling_session_id"])

    def result(self, submitted: httpx.Response) -> httpx.Response:
        """The answer to what was submitted, once there is one."""
        while (answer := self.ask(submitted)).status_code == 408:
            pass
        return answer

    def ask(self, submitted: httpx.Response) -> httpx.Response:
        """The answer to what was submitted, or that there is none yet."""
        assert submitted.status_code == 200, submitted.text
        return self.post("/retrieve_future", request_id=submitted.json()["request_id"])


def get(url: str) -> httpx.Response:
    """As any HTTP client does: without a key."""
    return httpx.get(url, trust_env=False, timeout=FOREVER)


def forged(token: str) -> str:
    """A signature, or a token that ends with one, that means something else.

    The last letters would be no good: they may be what they are changed to, or stand for bits that nobody reads.
    """
    place = token.rfind(".") + 1
    return f"{token[:place]}{'B' if token[place] == 'A' else 'A'}{token[place + 1 :]}"


@contextmanager
def running_api(folder: Path, capabilities: Capabilities | None = CAPABILITIES, **options: Any) -> Iterator[Api]:
    """An API with its own data directory, on a free port, until the block ends.

    Without `capabilities` its engine is one that is still loading.
    """
    settings = Settings(**({"data_dir": folder, "poll_seconds": 20.0} | options))
    database = Database(settings.effective_database_url)
    database.migrate()
    doorbell = Doorbell(settings.effective_database_url)
    served = choose_served(settings, ())
    engine = CannedEngine(database, doorbell, served[0].base)
    engine.start("ready" if capabilities else "loading", capabilities)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it only where the protocol is named
    app = create_app(settings, served, database, doorbell)
    quiet: dict[str, Any] = {"log_level": "warning", "ws": "none", "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, http=BoundedConnection, backlog=ACCEPTED_AT_ONCE, **quiet)
    server = PatientServer(config, app.state.leave)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    api = Api(listener.getsockname()[1], app, engine, server)
    try:
        _await(api, 200 if capabilities else 503)
        yield api
    finally:
        api.http.close()
        server.should_exit = True
        thread.join(FOREVER)
        engine.close()
        doorbell.close()
        database.close()
        listener.close()


def _await(api: Api, status: int) -> None:
    give_up_at = time.monotonic() + FOREVER
    while time.monotonic() < give_up_at:
        try:
            if api.http.get("/healthz").status_code == status:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError("the API did not come up")
