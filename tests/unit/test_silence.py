"""Who counts as silent, by two clocks: that of the day, and one that stands still while the machine sleeps."""

import pytest

from tinsmith.engine.silence import PATIENCE_SECONDS, SILENT_SECONDS, SLEEP_SECONDS, Silence


class Clocks:
    """As a machine has them, which can be awake, asleep, and set."""

    def __init__(self) -> None:
        self.day, self.steady = 1.7e9, 100.0
        self.silence = Silence(lambda: self.day, lambda: self.steady)

    def work(self, seconds: float) -> None:
        """Time goes on, and the engine looks every ten seconds."""
        while seconds > 0:
            passed = min(seconds, 10.0)
            self.day, self.steady, seconds = self.day + passed, self.steady + passed, seconds - passed
            self.silence.look()

    def sleep(self, seconds: float) -> None:
        self.day += seconds
        self.silence.look()


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_nobody_is_silent_before_clients_had_time_to_find_the_server(clocks: Clocks) -> None:
    clocks.work(PATIENCE_SECONDS)
    assert clocks.silence.since(SILENT_SECONDS) == 0.0
    clocks.work(1.0)
    assert clocks.silence.since(SILENT_SECONDS) == clocks.day - SILENT_SECONDS


def test_nobody_is_silent_when_the_machine_has_just_woken_up(clocks: Clocks) -> None:
    clocks.work(PATIENCE_SECONDS + 1.0)
    clocks.sleep(2 * SILENT_SECONDS)
    assert clocks.silence.since(SILENT_SECONDS) == 0.0
    clocks.work(PATIENCE_SECONDS + 1.0)
    assert clocks.silence.since(SILENT_SECONDS) == clocks.day - SILENT_SECONDS


def test_a_clock_that_is_corrected_is_no_sleep(clocks: Clocks) -> None:
    clocks.work(PATIENCE_SECONDS + 1.0)
    for seconds in (SLEEP_SECONDS - 1.0, SLEEP_SECONDS - 1.0, -3600.0):
        clocks.work(10.0)
        clocks.sleep(seconds)
    clocks.work(3600.0)
    assert clocks.silence.since(60.0) == clocks.day - 60.0


def test_a_clock_that_was_put_back_and_forward_gives_clients_time(clocks: Clocks) -> None:
    clocks.work(PATIENCE_SECONDS + 1.0)
    clocks.sleep(-3600.0)
    clocks.sleep(3600.0)
    assert clocks.silence.since(60.0) == 0.0
