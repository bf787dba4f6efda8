"""A sampling pass that breaks: whoever breaks it fails alone, and nobody else notices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.parity.conftest import Bases
from tests.parity.sampling_lab import drain, new_sampler, prompt, run, sample, sequences
from tinsmith.errors import TinsmithError, UserError
from tinsmith.models.loading import BaseModel

CURSED = [2, 2, 2]


@contextmanager
def breaking(model: BaseModel, where: str) -> Iterator[None]:
    """Passes break that see the tokens `CURSED` one behind the other: at their start, or when the cache is written."""
    module: Any = model.module
    seen = []

    def look(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        text = " ".join(map(str, inputs[0].flatten().tolist()))
        seen[:] = [" ".join(map(str, CURSED)) in text]
        if where == "start" and seen[0]:
            raise torch.OutOfMemoryError("tried to allocate 3.14 GiB")

    def collapse(*_: object) -> None:
        if where == "end" and seen[0]:
            raise torch.OutOfMemoryError("tried to allocate 3.14 GiB")

    with (
        module.get_input_embeddings().register_forward_pre_hook(look),
        module.get_decoder().layers[-1].register_forward_hook(collapse),
    ):
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
    with breaking(model, where):
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
    assert sampler._pool.available == sampler._pool.num_blocks
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
