"""Tokens per second: one bucket per owner with such a limit, in the memory of this process. Knows no route.

A bucket fills at the owner's rate, up to `BURST_SECONDS` of it. A request is taken while anything is in the bucket and
may overdraw it, so that also a large one gets its turn; the next ones wait until the debt is paid.
"""

import math
import time
from collections.abc import Callable

from tinsmith.errors import BusyError, LimitError

BURST_SECONDS = 10.0
LARGEST_SECONDS = 240.0  # of the rate, in one request: clients give up after 300 seconds of being told to wait
LONGEST_WAIT = 60.0  # clients take no notice of a longer Retry-After


class Pacing:
    """The buckets of all owners."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # by owner: tokens, and when that was so

    def spend(self, owner: str, tokens: int, per_second: float | None) -> None:
        """Takes a request's tokens out of the owner's bucket.

        Raises BusyError while it is empty, and LimitError for more tokens than can ever be waited for.
        """
        if per_second is None:
            return
        if tokens > per_second * LARGEST_SECONDS:
            raise LimitError(
                f"the request counts {tokens} tokens; with this key's {per_second:g} tokens per second one request may "
                f"count at most {int(per_second * LARGEST_SECONDS)}: send smaller ones (or set max_tokens)"
            )
        now = self._clock()
        left = self._left(owner, per_second, now)
        if left <= 0:
            wait = min(1 + math.floor(-left / per_second), LONGEST_WAIT)
            raise BusyError(f"this key's {per_second:g} tokens per second are used up; try again in {wait:g} s", wait)
        self._buckets[owner] = left - tokens, now

    def debt(self, owner: str, per_second: float | None) -> float:
        """For how many seconds the owner's further requests will be told to wait; 0.0 if they will not."""
        return 0.0 if per_second is None else max(0.0, -self._left(owner, per_second, self._clock()) / per_second)

    def _left(self, owner: str, per_second: float, now: float) -> float:
        full = per_second * BURST_SECONDS
        left, at = self._buckets.get(owner, (full, now))
        return min(full, left + (now - at) * per_second)
