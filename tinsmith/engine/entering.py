"""Which of the samples that wait enter the sampler, so that a small tenant is not slowed down by a large one's crowd.

Every sample in the sampler gets a token with each pass, and on a CPU a pass takes longer the more there are. So while
several tenants share the sampler, none has more samples in it than the smallest of them wants, or than make a pass take
twice as long as the shortest: of N tenants each has the N-th part of the machine, and who wants less is as fast as with
that. How long passes take is measured as they are run. Alone, or among equals, nobody is held back; on a GPU, where
many samples cost as much as few, hardly anybody is.

Knows neither clock nor sampler: it is told of times and of what is inside.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tinsmith.wire.jobs import Header

RECENT_SECONDS = 0.5  # after its last sample ended, a tenant that asks for one after the other still counts
LEAST, MOST = 4, 4096  # samples of a large tenant beside a small one
_KEPT = 0.995  # of what the passes before a pass count
_ENOUGH = 20.0  # passes, before they say anything
_FIRST = 0.5  # what the mean sample of a large batch costs, in those of a small one
_SPREAD = 1 / 16  # of the mean's square: how different the numbers of samples must have been


def tenant_of(header: Header) -> str:
    """Whose sample it is: its session's."""
    return header.subject.partition(":")[0]


def entering(
    held: Sequence[Header],
    inside: Iterable[Header],
    recent: Iterable[str],
    most: int,
    weights: Mapping[str, float],
) -> list[Header]:
    """Those of `held` that may enter now, in their order.

    A tenant is there if it has samples inside or waiting, or (`recent`) had some just now. Beside others it has at most
    `most` inside, times its owner's weight, or as many as the one that wants fewest, if that is more.
    """
    there = Counter(map(tenant_of, inside))
    wanted = there + Counter(map(tenant_of, held))
    for tenant in recent:
        wanted[tenant] = max(wanted[tenant], 1)
    if len(wanted) < 2:
        return list(held)
    fewest = min(wanted.values())
    chosen = []
    for header in held:
        tenant = tenant_of(header)
        if there[tenant] < max(fewest, int(most * weights.get(header.owner, 1.0))):
            there[tenant] += 1
            chosen.append(header)
    return chosen


class Passes:
    """How long the sampler's passes take, by how many samples are inside: a line through what was seen lately."""

    def __init__(self) -> None:
        self.doubling = MOST
        """How many samples make a pass about twice as long as the shortest, LEAST to MOST; MOST until it is known."""
        self._passes = self._n = self._nn = self._s = self._ns = 0.0

    def saw(self, samples: int, seconds: float) -> None:
        """One pass. Numbers that hardly differ say nothing about the line's slope, and leave it as it was."""
        self._passes = _KEPT * self._passes + 1
        self._n = _KEPT * self._n + samples
        self._nn = _KEPT * self._nn + samples * samples
        self._s = _KEPT * self._s + seconds
        self._ns = _KEPT * self._ns + samples * seconds
        spread = self._passes * self._nn - self._n**2
        if self._passes < _ENOUGH or spread < max(4 * self._passes**2, _SPREAD * self._n**2):
            return
        slope = (self._passes * self._ns - self._n * self._s) / spread
        if slope > 0:
            shortest = (self._s - slope * self._n) / self._passes
            self.doubling = max(LEAST, min(MOST, int(_FIRST * shortest / slope)))
