"""A sampling pass that breaks: whoever breaks it fails alone, and nobody else notices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.parity.conftest import Bases
from tests.parity.sampling_lab import drain, new_sampler, prompt, run, sample, sequences
from tinsmith.errors import TinsmithError, UserError
from tinsmith.models.loading import BaseModel
from tinsmith.sampling import batch
from tinsmith.sampling.batch import Work

CURSED = [2, 2, 2]


@contextmanager
def breaking(where: str) -> Iterator[None]:
    """Passes break that run the tokens `CURSED` one behind the other: at their start, or when all is in the cache."""
    curse = str(CURSED)[1:-1]

    def forward(
        model: BaseModel, cache: Any, lanes: Any, states: Any, works: Sequence[Work], *rest: Any
    ) -> torch.Tensor:
        spans = [(work.sample, work.sample.computed, work.rows) for work in works]
        cursed = any(curse in str(sample.slice(past, past + rows)) for sample, past, rows in spans)
        if cursed and where == "start":
            raise torch.OutOfMemoryError("tried to allocate 3.14 GiB")
        hidden_TD = batch.forward(model, cache, lanes, states, works, *rest)
        if cursed:
            raise torch.OutOfMemoryError("tried to allocate 3.14 GiB")
        return hidden_TD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinsmith.sampling.sampler.forward", forward)
        yield


@pytest.mark.parametrize("where", ["start", "end"])
@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3.5"])
def test_a_request_that_breaks_a_pass_fails_alone(family: str, where: str, bases: Bases) -> None:
    model = bases(family)
    calls = [
        sample(f"{length}", prompt(length), tenant=str(length), seed=length, num_samples=1 + length % 3, max_tokens=15)
        for length in (1, 5, 12, 30)
    ]
    alone = [sequences(run(new_sampler(model), call)) for call in calls]
    sampler = new_sampler(model, prefill_tokens=16)
    results: dict[str, Any] = {}
    with breaking(where):
        for call in calls:
            sampler.submit(call)
        for _ in range(5):  # some decode, some prefill
            results |= {finished.request_id: finished.output for finished in sampler.step()}
            sampler.check()
        sampler.submit(sample("guilty", [*prompt(6), *CURSED, *prompt(4)], tenant="guilty", num_samples=2))
        results |= drain(sampler)
    guilty = results.pop("guilty")
    assert isinstance(guilty, TinsmithError)
    assert guilty.category == "server"
    assert "OutOfMemoryError: tried to allocate 3.14 GiB" in str(guilty)
    assert [sequences(results[call.request_id]) for call in calls] == alone
    assert sampler._seats.pool.available == sampler._seats.pool.num_blocks
    assert sequences(run(sampler, calls[-1])) == alone[-1]


def test_a_tokenizer_that_fails_on_a_request_fails_that_request(bases: Bases) -> None:
    sampler = new_sampler(bases("qwen3-tied"))
    tokenizer = sampler._stop_strings

    def found(strings: tuple[str, ...], tokens: list[int]) -> bool:
        if strings == ("cursed",) and len(tokens) > 3:
            raise UnicodeError("what is this?")
        return False

    tokenizer.found = found  # type: ignore[method-assign]
    bad, good = run(
        sampler,
        sample("bad", prompt(5), stop_strings=("cursed",), num_samples=2),
        sample("good", prompt(5), stop_strings=("fine",)),
    )
    assert not isinstance(bad, UserError)
    assert "UnicodeError: what is this?" in str(bad)
    assert len(good.tokens_S) == 12
