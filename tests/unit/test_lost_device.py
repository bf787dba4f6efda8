"""A device that is lost ends the engine's process; every other error stays with its request."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.unit.test_engine import Bench
from tests.unit.test_trials import CURSED, ask, cursed_token, failure
from tinsmith.config import Settings
from tinsmith.engine.trials import Trials
from tinsmith.lost_device import DeviceLostError, raise_if_lost
from tinsmith.served import Served
from tinsmith.training.trainer import TorchTrainer

ASSERTED = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ASSERTED),
        torch.AcceleratorError("CUDA error: something that nobody has seen yet"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("HIP error: unspecified launch failure"),
    ],
    ids=str,
)
def test_errors_of_a_broken_device_are_told(error: Exception) -> None:
    with pytest.raises(DeviceLostError, match="the device is lost to this process"):
        raise_if_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        ValueError("an illegal memory access is what this text is about"),
        KeyError("model"),
    ],
    ids=str,
)
def test_other_errors_are_not(error: Exception) -> None:
    raise_if_lost(error)


def test_what_an_error_was_raised_from_or_beside_counts() -> None:
    for chained in (Exception("cause"), Exception("beside")):
        try:
            try:
                raise torch.AcceleratorError(ASSERTED)
            except RuntimeError as first:
                if str(chained) == "cause":
                    raise chained from first
                raise chained  # noqa: B904
        except Exception as error:
            with pytest.raises(DeviceLostError, match="device-side assert"):
                raise_if_lost(error)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def broken_kernel() -> Iterator[None]:
    """A token after which every call on the device fails, until the process ends."""
    with cursed_token(lambda: torch.AcceleratorError(ASSERTED)):
        yield


@pytest.mark.usefixtures("broken_kernel")
@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_a_request_that_breaks_the_device_ends_its_engine_twice_and_is_given_up(bench: Bench, kind: str) -> None:
    model = bench.create("a")
    sampler = bench.sampler("base", "base", None)
    bench.run()
    if kind == "training":
        fine, deadly = bench.train(model, [5, 6, 7]), bench.train(bench.create("b"), [5, CURSED, 7])
    else:
        fine, deadly = ask(bench, sampler, [40, 41, 42]), ask(bench, sampler, [5, CURSED, 7])
    for _ in range(2):
        with pytest.raises(DeviceLostError):
            bench.run()
        bench.new_engine()
    bench.run()
    assert "died 2 times" in failure(bench, deadly)
    assert bench.find(fine).state == "done"


def test_a_step_or_a_recovery_point_on_a_lost_device_ends_the_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(ASSERTED)

    model = bench.create("a")
    bench.train(model, [5, 6, 7])
    bench.run()
    step = bench.step(model)
    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "optim_step", fail)
        with pytest.raises(DeviceLostError):
            bench.run()
    bench.new_engine()
    bench.result(step)
    with monkeypatch.context() as patch:
        patch.setattr(TorchTrainer, "save", fail)
        with pytest.raises(DeviceLostError):
            bench.engine.write_points()


@pytest.mark.usefixtures("broken_kernel")
def test_an_engine_that_breaks_off_writes_no_recovery_point_and_leaves_its_note(bench: Bench) -> None:
    """What is in memory then may be half of something."""
    model = bench.create("a")
    bench.train(model, [5, 6, 7])
    bench.result(bench.step(model))
    bench.train(model, [5, CURSED, 7])
    with pytest.raises(DeviceLostError):
        bench.engine.run(threading.Event())
    assert list((bench.folder / "recovery").rglob("*.safetensors")) == []
    later = Trials(bench.folder)
    later.take_over(lambda numbers: [])
    assert len(later.suspects) == 1


BREAKS = """
import threading
from tinsmith import serve
from tinsmith.lost_device import DeviceLostError

def run_engine(*_):
    threading.Thread(target=threading.Event().wait).start()
    raise DeviceLostError("the device is lost: device-side assert")

serve.run_engine = run_engine
serve._child_main("engine", "tiny")
"""


def test_an_engines_process_ends_with_its_device_whatever_its_threads_wait_for() -> None:
    line = json.dumps({"settings": Settings().to_json(), "served": [asdict(Served("tiny", "tiny"))]})
    command = [sys.executable, "-c", BREAKS]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line.encode() + b"\n")
    process.stdin.flush()  # and not closed: that would tell it to stop
    assert b"device-side assert" in process.stdout.read()
    assert process.wait() == 1
