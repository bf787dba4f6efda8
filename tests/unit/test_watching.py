"""What an engine tells of its work: every number against work of known size, on the embedded model."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_engine import Bench, embedded, one_pass_a_turn
from tinsmith.engine.trials import pulse_file
from tinsmith.observe import REQUESTS
from tinsmith.protocols import BASE_SNAPSHOT, SnapshotCall
from tinsmith.sampling.sampler import TorchSampler
from tinsmith.store import queue
from tinsmith.wire.jobs import Job
from tinsmith.wire.packing import SampleCall
from tinsmith.wire.statistics import Distribution, Statistics


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def report(bench: Bench) -> dict[str, Any]:
    """As another process reads it."""
    told: dict[str, Any] = json.loads(json.dumps(bench.engine._watch.report()))
    assert Statistics.from_dict(told).to_dict() == Statistics.from_dict(told).to_dict()
    return told


def sample(bench: Bench, sampler: str, seq: int, prompt: range, **options: Any) -> str:
    call = SampleCall(np.array(prompt, np.int32), seed=1, stop_at_eos=False, **options)
    return bench.submit(sampler, "sample", call.to_bytes(), seq)


def test_training_is_counted_by_batch_job_and_token(bench: Bench) -> None:
    a, b = bench.create("a"), bench.create("b")
    bench.run()
    bench.train(a, [5, 6, 7])
    bench.train(b, [5, 6, 7])
    bench.run()
    bench.logprobs(a)
    bench.step(a)
    bench.train(b, [5, 10**6])  # no such token: fails, and counts as run but not as trained
    bench.run()
    bench.submit(b, "load_weights", {"path": "tinker://nothing/weights/here", "optimizer": False, "create": False})
    bench.run()
    told = report(bench)
    assert told["jobs"] == {
        "create_model": {"done": 2, "user": 0, "server": 0},
        "forward_backward": {"done": 2, "user": 1, "server": 0},
        "forward": {"done": 1, "user": 0, "server": 0},
        "optim_step": {"done": 1, "user": 0, "server": 0},
        "load_weights": {"done": 0, "user": 1, "server": 0},
    }
    assert told["tokens"]["trained"] == 2 * 8 and told["tokens"]["forward"] == 8  # each job of Bench counts 8
    requests, tenants, tokens = (
        Distribution.from_dict(told[f"batch_{of}"]) for of in ("requests", "tenants", "tokens")
    )
    assert (sum(requests.counts), requests.total, requests.counts[:2]) == (3, 4.0, [2, 1])
    assert (sum(tenants.counts), tenants.total) == (3, 3.0)
    assert (sum(tokens.counts), tokens.total) == (3, 32.0)
    assert {kind: sum(times["counts"]) for kind, times in told["seconds"].items()} == {
        "create_model": 2, "forward_backward": 3, "forward": 1, "optim_step": 1, "load_weights": 1,
    }  # fmt: skip
    assert told["events"] == dict.fromkeys(("restored", "paged_out", "preempted", "store_lost", "not_written"), 0)
    assert told["held"]["models"] == 1 and told["held"]["models_most"] == bench.max_models  # b's load failed


def test_sampling_is_counted_by_token_that_was_run_or_chosen(bench: Bench) -> None:
    sampler = bench.sampler("x", BASE_SNAPSHOT, None)
    sample(bench, sampler, 0, range(40, 80), max_tokens=8, num_samples=3)
    bench.run()
    told = report(bench)
    assert told["tokens"] == {"trained": 0, "forward": 0, "prefilled": 40, "sampled": 24}
    assert told["jobs"]["sample"] == {"done": 1, "user": 0, "server": 0}
    steps = Distribution.from_dict(told["sampling_requests"])
    assert sum(steps.counts) == steps.total == steps.counts[0] >= 8
    sample(bench, sampler, 1, range(40, 90), max_tokens=1)  # its first 32 tokens are in two known blocks
    bench.run()
    told = report(bench)
    assert told["tokens"]["prefilled"] == 40 + 18 and told["tokens"]["sampled"] == 25
    held = told["held"]
    assert (held["samples_running"], held["samples_waiting"], held["kv_tokens_held"]) == (0, 0, 0)
    assert held["kv_tokens"] == 4096 and held["kv_tokens_kept"] >= 48 and held["kv_tokens_kept"] % 16 == 0
    sample(bench, sampler, 2, range(40, 60), max_tokens=400)
    sample(bench, sampler, 3, range(40, 60), max_tokens=1)
    with one_pass_a_turn():
        bench.engine.turn()
    assert Distribution.from_dict(report(bench)["sampling_requests"]).counts[1] > 0
    held = report(bench)["held"]
    assert held["samples_running"] == 1 and held["kv_tokens_held"] >= 32


def test_what_a_preemption_runs_again_counts_as_prefilled_as_far_as_it_is_prompt() -> None:
    model, tokenizer = embedded()
    sampler = TorchSampler(model, tokenizer, kv_tokens=96, max_running=4)
    for number in range(3):
        prompt = np.arange(40 + 20 * number, 60 + 20 * number, dtype=np.int32)
        call = SampleCall(prompt, seed=number, max_tokens=60, stop_at_eos=False)
        sampler.submit(SnapshotCall(f"{number}", BASE_SNAPSHOT, f"t{number}", call))
    while sampler.load:
        sampler.step()
    usage = sampler.usage()
    assert usage.preempted > 0 and usage.sampled == 3 * 60
    assert 3 * 20 < usage.prefilled <= (3 + usage.preempted) * 20


def test_snapshots_and_what_left_the_device_or_came_back_are_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_models=1)
    a = bench.create("a")
    sampler = bench.sampler("s", "s:sample:s", a)
    snapshot = {"name": None, "path": None, "sampler_id": sampler, "kind": "ephemeral", "ttl_seconds": None}
    bench.submit(a, "save_weights_for_sampler", snapshot | {"user_metadata": None})
    bench.run()
    held = report(bench)["held"]
    assert (held["snapshots"], held["models"]) == (1, 1) and held["snapshot_bytes"] > 0
    bench.create("b")
    bench.run()
    bench.logprobs(a)
    events = report(bench)["events"]
    assert (events["paged_out"], events["restored"]) == (2, 1)
    bench.close()


def test_the_pulse_says_how_many_jobs_have_ended(bench: Bench) -> None:
    bench.create("a")
    bench.run()
    assert pulse_file(bench.folder).read_bytes() == b"-1\n"
    bench.new_engine()
    assert pulse_file(bench.folder).read_bytes() == b"-0\n"


def test_lines_about_jobs_name_their_traces_when_they_run_and_end(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = bench.create("a"), bench.create("b")
    bench.run()
    monkeypatch.setattr(REQUESTS, "level", logging.INFO)
    with caplog.at_level(logging.INFO, logger=REQUESTS.name):
        for model, trace in ((a, "ta"), (b, "tb")):
            body = {"learning_rate": 0.01} if model == b else {"no such parameter": 1}
            bench.database.write(
                queue.submit, Job(model, 1, "optim_step", "me", "tiny", json.dumps(body).encode(), trace=trace)
            )
        bench.run()
    lines = [(record.getMessage(), record.fields) for record in caplog.records if record.name == REQUESTS.name]  # type: ignore[attr-defined]
    assert sorted(fields["traces"] for message, fields in lines if message == "running") == [["ta"], ["tb"]]
    ends = {fields["trace"]: (message, fields) for message, fields in lines if message != "running"}
    assert ends["tb"][0] == "done" and ends["tb"][1]["request"] == f"{b}:1"
    assert ends["ta"][0] == "failed" and ends["ta"][1]["category"] == "server" and ends["ta"][1]["error"]
