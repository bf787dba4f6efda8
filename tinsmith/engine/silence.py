"""Since when clients count as silent: not while they could not be heard, since the server or its machine was away.

A machine that sleeps (a closed laptop) wakes up with all its clients silent for as long, and they beat in the next
seconds. The clock of the day goes on meanwhile, the steady one does not; so does a clock that is put forward.
"""

import logging
import time
from collections.abc import Callable

SILENT_SECONDS = 24 * 3600.0  # a session without heartbeats (a client's sleeping laptop, a dead client) lasts this long
PATIENCE_SECONDS = 900.0  # after so long without them, its samples are given up and its models leave the device
SLEEP_SECONDS = 30.0  # by so much more than the steady clock has the other gone on if the machine slept

log = logging.getLogger(__name__)


class Silence:
    """Of one engine: from its start, or from when its machine last woke up."""

    def __init__(self, clock: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._steady = clock, steady
        self.began_at = clock()
        """When clients could begin to be heard, in seconds since the epoch."""
        self._ahead = clock() - steady()

    def look(self) -> None:
        """To be called often: notices that the machine has slept since the last call."""
        ahead = self._clock() - self._steady()
        if ahead - self._ahead > SLEEP_SECONDS:
            log.info(
                "the machine slept for %.0f s, or its clock was put forward: clients have time to return",
                ahead - self._ahead,
            )
            self.began_at = self._clock()
        self._ahead = ahead

    def since(self, seconds: float) -> float:
        """Who was not heard of since then has been silent for `seconds`; 0, for nobody, before all could be heard."""
        now = self._clock()
        return now - seconds if now - self.began_at > PATIENCE_SECONDS else 0.0
