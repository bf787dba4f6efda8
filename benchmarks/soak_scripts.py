"""What the soak's tenants do: supervised and RL-like loops with the unmodified SDK, which note every answer.

Knows clients, and nothing of blows.
"""

import hashlib
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tinker
from tinker import types

ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
STATE_EVERY, MOVE_EVERY = 4, 8  # steps: to save, and to go on in another model, made from what was saved
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
                    if self.done % STATE_EVERY == STATE_EVERY - 1:
                        saved = client.save_state(f"state-{self.done}").result().path
                        if self.done % MOVE_EVERY == MOVE_EVERY - 1:
                            client = service.create_training_client_from_state_with_optimizer(saved).result()
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


def free_port() -> int:
    """A loopback port that is free now, to be the same one after every restart.

    It is none of those that a kernel gives to whoever asks for any: while the server is away, a client may get it.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def run_tenants(tenants: Sequence[Tenant], base_url: str) -> list[threading.Thread]:
    """Starts every script."""
    threads = [threading.Thread(target=tenant.run, args=(base_url,), daemon=True) for tenant in tenants]
    for thread in threads:
        thread.start()
    return threads


def final_files(data_dir: Path, tenant: Tenant) -> dict[str, str]:
    """Digests of the weights and the optimizer state that a script saved last, by file name."""
    model_id = tenant.final.removeprefix("tinker://").split("/")[0].replace(":", "_")
    [folder] = data_dir.rglob(f"checkpoints/{model_id}/weights/final-*")
    files = folder.glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
