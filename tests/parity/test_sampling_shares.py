"""Tenants share the sampler's places: who comes late finds room, nobody's tokens change for it."""

from dataclasses import replace
from typing import Any

import pytest

from tests.parity.conftest import Bases
from tests.parity.sampling_lab import drain, new_sampler, prompt, sample, sequences
from tinsmith.models.loading import BaseModel

PLACES = 4


@pytest.fixture(scope="module")
def model(bases: Bases) -> BaseModel:
    return bases("qwen3-tied")


def flood(count: int = 8) -> list[Any]:
    return [sample(f"flood-{n}", prompt(9, seed=n), tenant="flood", max_tokens=60) for n in range(count)]


def late(count: int = 2) -> list[Any]:
    return [sample(f"late-{n}", prompt(7, seed=50 + n), tenant="late", max_tokens=3) for n in range(count)]


@pytest.mark.parametrize(
    ("limits", "steps"), [({"max_running": PLACES}, 6), ({"max_running": 16, "kv_tokens": 320}, 8)], ids=str
)
def test_a_tenant_that_comes_late_finds_room_at_once_where_another_has_taken_everything(
    model: BaseModel, limits: dict[str, int], steps: int
) -> None:
    sampler = new_sampler(model, **limits)
    for call in flood():
        sampler.submit(call)
    for _ in range(30):
        sampler.step()
        sampler.check()
    for call in late():
        sampler.submit(call)
    ended = []
    for _ in range(steps):
        ended += [finished.request_id for finished in sampler.step()]
        sampler.check()
    assert {"late-0", "late-1"} <= set(ended)
    drain(sampler)


def test_giving_up_a_place_for_others_changes_no_token(model: BaseModel) -> None:
    alone = new_sampler(model, max_running=PLACES)
    for call in flood():
        alone.submit(call)
    expected = drain(alone)
    sampler, results, calls = new_sampler(model, max_running=PLACES), {}, flood()
    for call in calls:
        sampler.submit(call)
    for turn in range(6):
        for _ in range(5):
            results |= {finished.request_id: finished.output for finished in sampler.step()}
        for call in late():
            sampler.submit(replace(call, request_id=f"{call.request_id}-{turn}"))
    results |= drain(sampler)
    assert sampler.usage().preempted > 0
    for call in calls:
        assert sequences(results[call.request_id]) == sequences(expected[call.request_id])
