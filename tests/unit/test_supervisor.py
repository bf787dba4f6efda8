"""The supervisor with real processes: order, restarts, giving up, stopping."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinsmith import supervisor
from tinsmith.supervised import tell_progress
from tinsmith.supervisor import EXIT_CONFIG, Child, Supervisor

UNTIL_END_OF_INPUT = "import sys; first = sys.stdin.readline(); {begin}; sys.stdin.read(); {end}"


def child(name: str, log: Path, end: str = "pass", grace: float = 10.0) -> Child:
    """A process that notes its first line and pid, waits for the end of its input, and notes that."""
    note = f"open({str(log)!r}, 'a').write"
    code = UNTIL_END_OF_INPUT.format(
        begin=f"import os; {note}('{name} began ' + first.strip() + ' ' + str(os.getpid()) + chr(10))",
        end=f"{end}; {note}('{name} ended' + chr(10))",
    )
    return Child(name, [sys.executable, "-c", code], f"settings-of-{name}", grace=grace)


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(log: Path, count: int) -> list[str]:
    """Until the log has `count` lines; the test's own time limit ends the wait."""
    while len(lines(log)) < count:
        time.sleep(0.01)
    return lines(log)


def in_background(action: object) -> None:
    threading.Thread(target=action, daemon=True).start()  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _keep_signal_handlers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_stops_the_children_last_one_first_and_the_exit_code_is_zero(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def stop_when_both_run() -> None:
        wait_for(log, 2)
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(stop_when_both_run)
    assert Supervisor([child("api", log), child("engine", log)]).run() == 0
    assert lines(log)[2:] == ["engine ended", "api ended"]
    assert sorted(line.rsplit(" ", 1)[0] for line in lines(log)[:2]) == [
        "api began settings-of-api",
        "engine began settings-of-engine",
    ]


def test_a_child_gets_the_environment_that_is_meant_for_it(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"MEANT_FOR": "the engine"}
    code = "import os; raise SystemExit(0 if os.environ.get('MEANT_FOR') == 'the engine' else 3)"
    process = Child("engine", [sys.executable, "-c", code], "", environment=environment).start()
    assert process.wait(30) == 0


def test_a_signal_is_heard_whichever_thread_it_meets(tmp_path: Path) -> None:
    """A handler in Python runs in the main thread only, which waits for events and is not woken by this signal."""
    log = tmp_path / "log"
    heard = []

    def stop_this_thread() -> None:
        wait_for(log, 1)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        heard.append(server.stopping.wait(20))
        if not heard[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    server = Supervisor([child("engine", log)])
    thread = threading.Thread(target=stop_this_thread)
    thread.start()
    assert server.run() == 0
    thread.join()
    assert heard == [True]


def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def kill_then_stop() -> None:
        os.kill(int(wait_for(log, 1)[0].split()[-1]), signal.SIGKILL)
        wait_for(log, 2)
        os.kill(os.getpid(), signal.SIGINT)

    in_background(kill_then_stop)
    assert Supervisor([child("engine", log)]).run() == 0
    pids = [line.split()[-1] for line in lines(log)[:2]]
    assert pids[0] != pids[1]


def test_a_child_that_keeps_crashing_ends_the_server_and_the_other_child_stops(tmp_path: Path) -> None:
    log = tmp_path / "log"
    crashing = Child("engine", [sys.executable, "-c", "raise SystemExit(3)"], "")
    assert Supervisor([child("api", log), crashing]).run() == 1
    assert crashing.useless == len(crashing.crashed_at) == supervisor.MAX_CRASHES + 1


def test_settings_that_do_not_work_end_the_server_at_once() -> None:
    wrong = Child("engine", [sys.executable, "-c", f"raise SystemExit({EXIT_CONFIG})"], "")
    assert Supervisor([wrong]).run() == 2
    assert len(wrong.crashed_at) == 0


def test_a_second_signal_kills_what_does_not_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stubborn = child("engine", log, end="import time; time.sleep(600)", grace=600)

    def stop_twice() -> None:
        wait_for(log, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        while not server.stopping.is_set():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    server = Supervisor([stubborn])
    in_background(stop_twice)
    assert server.run() == 0
    assert lines(log)[1:] == []


def test_a_child_that_does_not_end_in_its_time_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def stop() -> None:
        wait_for(log, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(stop)
    assert Supervisor([child("engine", log, end="import time; time.sleep(600)", grace=0.1)]).run() == 0


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from tests.unit.test_supervisor import child\n"
        "from tinsmith.supervisor import Supervisor\n"
        f"Supervisor([child('engine', Path({str(log)!r}))]).run()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(log, 1)
    parent.kill()
    parent.wait()
    assert wait_for(log, 2)[1] == "engine ended"


def test_delays_double_up_to_a_limit_and_old_crashes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 1.0)
    crashing = Child("engine", [], "")
    assert [crashing.next_delay(now) for now in range(5)] == [1.0, 2.0, 4.0, 8.0, 15.0]
    assert crashing.next_delay(5.0) is None
    crashing.moving_since = 0.0
    assert crashing.next_delay(5.0 + supervisor.CRASH_WINDOW + 1) == 1.0


def test_processes_that_run_well_between_crashes_are_started_again_for_ever() -> None:
    crashing, now = Child("api", [], ""), 0.0
    delays = []
    for _ in range(50):
        crashing.moving_since, now = now, now + supervisor.WELL_SECONDS
        delays.append(crashing.next_delay(now))
    assert delays[:3] == [0.01, 0.02, 0.04]
    assert None not in delays and delays[-1] == delays[-2] > 0.04
    crashing.moving_since = None
    assert [crashing.next_delay(now) is None for _ in range(supervisor.MAX_CRASHES + 1)] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("note", "of_use"), [(b"t3\n", True), (b"-0\n", False), (b"t", False), (b"tX\n", False), (b"", False)]
)
def test_a_process_was_of_use_if_its_own_pulse_says_that_something_got_done(
    note: bytes, of_use: bool, tmp_path: Path
) -> None:
    pulse = tmp_path / "pulse"
    pulse.write_bytes(b"t9\n of an earlier process")
    os.utime(pulse, (1, 1))
    engine = Child("engine", [sys.executable, "-c", ""], "", pulse=pulse)
    engine.start().wait()
    assert not engine.was_of_use(time.monotonic())
    pulse.write_bytes(note)
    assert engine.was_of_use(time.monotonic()) == of_use


def test_what_a_process_tells_of_its_progress_is_understood(tmp_path: Path) -> None:
    api = Child("api", [sys.executable, "-c", ""], "", pulse=tmp_path / "api" / "answered")
    api.start().wait()
    stop = threading.Event()
    stop.set()
    for done, of_use in ((0, False), (3, True)):
        assert api.pulse is not None
        tell_progress(api.pulse, lambda done=done: done, stop)
        assert api.was_of_use(time.monotonic()) == of_use


def test_a_child_that_crashes_after_some_work_each_time_never_ends_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_DELAY", 0.05)
    log, pulse = tmp_path / "log", tmp_path / "pulse"
    code = f"open({str(pulse)!r}, 'w').write('t1\\n'); open({str(log)!r}, 'a').write('x\\n'); raise SystemExit(3)"
    crashing = Child("engine", [sys.executable, "-c", code], "", pulse=pulse)

    def stop_after_many() -> None:
        wait_for(log, supervisor.MAX_CRASHES + 4)
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(stop_after_many)
    with caplog.at_level("WARNING"):
        assert Supervisor([crashing]).run() == 0
    assert "ended with code 3 (8 times in 5 minutes); restarting" in caplog.text
    assert "giving up" not in caplog.text


def test_a_child_that_stops_moving_is_ended_and_started_again_but_never_while_it_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each process loads for longer than the patience, then moves for a while, then stands still."""
    log, pulse = tmp_path / "log", tmp_path / "pulse"
    note = f"open({str(log)!r}, 'a').write"
    code = (
        "import faulthandler, pathlib, sys, time; faulthandler.enable(); sys.stdin.readline()\n"
        f"{note}('loads' + chr(10)); time.sleep(1.0); {note}('moves' + chr(10))\n"
        f"for _ in range(20): pathlib.Path({str(pulse)!r}).write_text('beat'); time.sleep(0.05)\n"
        f"{note}('stands' + chr(10)); time.sleep(600)\n"
    )
    pulse.write_text("of an earlier process")
    stuck = Child("engine", [sys.executable, "-c", code], "", pulse=pulse, patience=0.5)

    def stop_the_second() -> None:
        wait_for(log, 5)
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(stop_the_second)
    stuck.grace = 0.1
    with caplog.at_level("WARNING"):
        assert Supervisor([stuck]).run() == 0
    assert [line for line in lines(log) if line != "stands"][:4] == ["loads", "moves", "loads", "moves"]
    assert "alive but has not moved for 0.5 s" in caplog.text
    assert "was killed by SIGABRT" in caplog.text


@pytest.mark.parametrize(("pauses", "is_stuck"), [([0.0] + [0.5] * 30, True), ([0.0, 0.5, 1000.0, 0.5], False)])
def test_a_pause_of_the_whole_machine_is_no_ones_fault(
    pauses: list[float], is_stuck: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1.0]

    class Ended(threading.Event):
        def wait(self, _seconds: float | None = None) -> bool:
            clock[0] += pauses.pop(0) if pauses else 0.0
            return not pauses

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pulse = tmp_path / "pulse"
    pulse.write_text("beat")
    engine = Child("engine", [], "", pulse=pulse, patience=10.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        supervisor._watch(engine, process, Ended())
        process.communicate(b"\n")
    assert (process.returncode < 0) == is_stuck


CRASH = [sys.executable, "-c", "raise SystemExit(3)"]


def test_one_of_several_that_cannot_be_kept_running_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(supervisor, "MAX_CRASHES", 1)
    monkeypatch.setattr(supervisor, "HOPELESS_DELAY", 0.05)
    reasons: list[str] = []
    api, one = child("api", log), child("engine one", log)
    other = Child("engine other", CRASH, "", spare=True, stands_still=reasons.append)
    one.spare = True

    def stop_when_it_was_tried_again() -> None:
        wait_for(log, 2)
        while other.starts < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(stop_when_it_was_tried_again)
    assert Supervisor([api, one, other]).run() == 0
    assert [line.partition(" began")[0] for line in lines(log)[:2]].count("engine one") == 1
    assert lines(log)[2:] == ["engine one ended", "api ended"]
    assert "ended with code 3, 2 times in a row" in reasons[0]


@pytest.mark.parametrize("command", [CRASH, [sys.executable, "-c", f"raise SystemExit({EXIT_CONFIG})"]])
def test_when_none_of_them_is_left_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(supervisor, "MAX_CRASHES", 1)
    engines = [Child(f"engine {name}", command, "", spare=True) for name in "ab"]
    assert Supervisor([child("api", tmp_path / "log"), *engines]).run() == (1 if command is CRASH else 2)


def test_settings_that_stop_working_later_make_only_that_one_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, mark = tmp_path / "log", tmp_path / "mark"
    reasons: list[str] = []
    crash_then_refuse = (
        f"import os; first = not os.path.exists({str(mark)!r}); open({str(mark)!r}, 'w'); raise SystemExit"
    )
    command = [sys.executable, "-c", f"{crash_then_refuse}(3 if first else {EXIT_CONFIG})"]

    def hear(reason: str) -> None:
        reasons.append(reason)
        os.kill(os.getpid(), signal.SIGTERM)

    one, other = child("engine one", log), Child("engine other", command, "", spare=True, stands_still=hear)
    one.spare = True
    assert Supervisor([one, other]).run() == 0
    assert "settings" in reasons[0]
