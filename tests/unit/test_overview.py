"""What is shown of engines and tenants: how old it may be, and how many names there are."""

import pytest

from tinsmith.api import overview
from tinsmith.api.overview import MOST_TENANTS, OTHERS, SILENT_SECONDS, by_tenant, tenant_of, view_of
from tinsmith.served import Served
from tinsmith.store.overview import Pending
from tinsmith.store.records import EngineRecord
from tinsmith.wire.statistics import Statistics

TINY = Served("tiny", "tiny")
NUMBERS = Statistics(tokens={"sampled": 5}).to_dict()


def record(state: str, beat_at: float, statistics: object = NUMBERS) -> EngineRecord:
    return EngineRecord("tiny", "id", 1, state, "progress", None, beat_at, statistics, 4, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "age", "shown", "has_numbers"),
    [
        ("ready", 0.0, "ready", True),
        ("ready", SILENT_SECONDS - 1, "ready", True),
        ("ready", -30.0, "ready", True),  # another host's clock
        ("ready", SILENT_SECONDS + 1, "silent", False),
        ("loading", 1000.0, "loading", False),
        ("failed", 1.0, "failed", False),
        ("lost", 1.0, "lost", False),
        ("stopped", 1.0, "stopped", False),
    ],
)
def test_only_a_ready_engine_that_was_heard_of_lately_has_numbers(
    state: str, age: float, shown: str, has_numbers: bool
) -> None:
    view = view_of(TINY, record(state, 1000.0 - age), 1000.0)
    assert (view.state, view.statistics is not None) == (shown, has_numbers)
    assert (view.starts, view.recoveries, view.beat_seconds) == (4, 2, max(0.0, age))
    assert view.state in overview.STATES


@pytest.mark.parametrize("statistics", [None, {}, {"jobs": 3}, {**NUMBERS, "seconds": {"sample": 1}}])
def test_an_engine_of_another_version_is_ready_without_numbers(statistics: object) -> None:
    view = view_of(TINY, record("ready", 1000.0, statistics), 1000.0)
    assert (view.state, view.statistics) == ("ready", None)


def test_an_engine_that_never_reported_is_starting() -> None:
    assert view_of(TINY, None, 1000.0).state == "starting"


def test_names_are_those_of_keys() -> None:
    names = {"0123456789abcdef": "anna"}
    assert tenant_of("0123456789abcdef", names) == "anna"
    assert tenant_of("fedcba9876543210", names) == "key-fedcba98"
    assert tenant_of("local", names) == "local"


def test_owners_of_one_name_are_one_tenant_and_the_oldest_job_counts() -> None:
    pending = [
        Pending("b", "queued", "sample", "o1", 2, 90.0),
        Pending("b", "queued", "sample", "o2", 3, 95.0),
        Pending("b", "running", "sample", "o2", 1, 99.0),
    ]
    shown = by_tenant(pending, {"b": "model"}, {"o1": "anna", "o2": "anna"}, 100.0)
    assert [(w.model, w.state, w.tenant, w.jobs, w.oldest_seconds) for w in shown] == [
        ("model", "queued", "anna", 5, 10.0),
        ("model", "running", "anna", 1, 1.0),
    ]


def test_however_many_tenants_there_are_the_busiest_are_named_and_no_job_is_lost() -> None:
    owners = [f"{number:016x}" for number in range(1000)]
    pending = [Pending("b", "queued", "sample", owner, 1 + index, 50.0) for index, owner in enumerate(owners)]
    pending.append(Pending("b", "queued", "sample", "0" * 15 + "x", 1, 10.0))
    names = {owner: f"tenant{index}" for index, owner in enumerate(owners)}
    shown = by_tenant(pending, {"b": "model"}, names, 100.0)
    assert len(shown) == MOST_TENANTS + 1
    assert {w.tenant for w in shown} == {OTHERS} | {f"tenant{index}" for index in range(1000 - MOST_TENANTS, 1000)}
    assert sum(w.jobs for w in shown) == sum(part.jobs for part in pending)
    assert next(w for w in shown if w.tenant == OTHERS).oldest_seconds == 90.0
