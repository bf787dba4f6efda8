"""What clients that read along are told: all of it in the end, in pieces that fit, and nothing about anybody else."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_engine import Bench
from tinsmith.engine import sampling_turns
from tinsmith.store.bell import packets
from tinsmith.wire.packing import SampleCall, SampleOutput
from tinsmith.wire.progress import Progress


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(sampling_turns, "TELL_SECONDS", 0.0)
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def ask(bench: Bench, seq: int, *, stream: bool, top: int = 0) -> str:
    sampler = bench.sampler("base", "base", None)
    call = SampleCall(
        np.array([40, 41, 42], np.int32),
        seed=seq,
        num_samples=2,
        max_tokens=12,
        stop_at_eos=False,
        topk_sample_logprobs=top,
        stream=stream,
    )
    return bench.submit(sampler, "sample", call.to_bytes(), seq=seq)


def told(bench: Bench, request_id: str) -> tuple[list[Progress], SampleOutput]:
    """What was rung while a request ran, and its result."""
    bell = bench.doorbell.listen("tokens")
    try:
        output = SampleOutput.from_bytes(bench.result(request_id))
        return [Progress.from_message(message) for message in bell.wait(0.0)], output
    finally:
        bell.close()


@pytest.mark.parametrize("top", [0, 3])
def test_what_is_told_of_a_sample_is_the_beginning_of_its_result(bench: Bench, top: int) -> None:
    news, output = told(bench, ask(bench, 1, stream=True, top=top))
    assert {part.request_id for part in news} == {"s:sample:base:1"}
    for index in (0, 1):
        parts = [part for part in news if part.index == index]
        assert [part.start for part in parts] == list(np.cumsum([0, *(len(part.tokens) for part in parts[:-1])]))
        tokens = [token for part in parts for token in part.tokens]
        begin = output.offsets[index]
        assert len(tokens) >= 11  # the last one is in the result only
        assert tokens == output.tokens_S[begin : begin + len(tokens)].tolist()
        logprobs = [value for part in parts for value in part.logprobs]
        assert np.array_equal(np.float32(logprobs), output.logprobs_S[begin : begin + len(tokens)])
        if top:
            ids = [row for part in parts for row in part.top_ids]
            assert ids == output.extras["topk_sample_ids"][begin : begin + len(tokens)].tolist()


def test_of_requests_that_nobody_reads_along_nothing_is_told(bench: Bench) -> None:
    assert told(bench, ask(bench, 1, stream=False))[0] == []


def test_an_engine_that_begins_again_tells_the_same_from_the_start(bench: Bench) -> None:
    request_id = ask(bench, 1, stream=True)
    bell = bench.doorbell.listen("tokens")
    for _ in range(5):
        bench.engine.turn()
    before = [Progress.from_message(message) for message in bell.wait(0.0)]
    bell.close()
    bench.new_engine()
    after, _ = told(bench, request_id)
    for index in (0, 1):
        first = [token for part in before if part.index == index for token in part.tokens]
        again = [token for part in after if part.index == index for token in part.tokens]
        assert len(first) >= 3
        assert again[: len(first)] == first


def test_a_given_up_request_is_told_nothing_more(bench: Bench) -> None:
    request_id = ask(bench, 1, stream=True)
    bench.engine.turn()
    bench.engine._sampling.give_up([request_id])
    bell = bench.doorbell.listen("tokens")
    bench.engine._sampling._sampler.progress()
    bench.run()
    assert bell.wait(0.0) == []
    bell.close()


@pytest.mark.parametrize("top", [0, 1, 20])
def test_long_news_go_in_messages_that_every_doorbell_takes(top: int) -> None:
    count, value = 500, -12.345678901234567
    rows = [[2**31 - 1] * top] * count, [[value] * top] * count
    whole = Progress("s" * 100, 1000, 10**6, [2**31 - 1] * count, [value] * count, *(rows if top else ([], [])))
    messages = whole.to_messages()
    assert sum(map(len, packets(messages, 2_000))) == len(messages)
    parts = [Progress.from_message(message) for message in messages]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [value for part in parts for value in part.logprobs] == whole.logprobs
    assert [row for part in parts for row in part.top_logprobs] == whole.top_logprobs
    assert json.loads(messages[1].partition(" ")[2])[1] == parts[0].start + len(parts[0].tokens)
