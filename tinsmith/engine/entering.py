"""Which of the samples that wait enter the sampler, so that a small tenant is not slowed down by a large one's crowd.

Every sample in the sampler gets a token with each pass, and on a CPU a pass takes longer the more there are. So while
N tenants share the sampler, none has more samples in it than the smallest of them wants, or than make passes N times as
long as those of few samples: each has the N-th part of the machine, and who wants less is as fast as with that. How
long passes take is measured as they are run. Alone, or among equals, nobody is held back; on a GPU, where many samples
cost as much as few, hardly anybody is.

Tenants are owners; many sessions win none of them a larger part. An owner that is alone, or has its part, shares it
among its sessions in the same way.

Knows neither clock nor sampler: it is told of times and of what is inside.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from statistics import median

from tinsmith.wire.jobs import Header

RECENT_SECONDS = 0.5  # after its last sample ended, a tenant that asks for one after the other still counts
LEAST, MOST = 4, 4096  # samples of a large tenant beside a small one
_KEPT = 0.995  # of what the passes before a pass count
_ENOUGH = 20.0  # passes, before they say anything
_LATELY, _LATELY_FEW = 24, 64  # passes, of which a mean is taken
_OUTLIER = 8  # times the median is the most that one of them counts
_STRETCH = 1 / 4096  # by so much it is believed less
_STEPS = 8  # in which the bound follows what was seen
_SPREAD = 1 / 16  # of the mean's square: how different the numbers of samples must have been


Session = tuple[str, str]
"""Its owner, and its id."""


def session_of(header: Header) -> Session:
    """Whose sample it is."""
    return header.owner, header.session_id


def tenants(samples: Mapping[Session, int]) -> list[int]:
    """How many samples each tenant has: each owner, or if there is only one, each of its sessions."""
    owners = _of_owners(samples)
    return list((owners if len(owners) > 1 else samples).values())


def entering(
    held: Sequence[Header],
    inside: Mapping[Session, int],
    recent: Iterable[Session],
    most: int,
    weights: Mapping[str, float],
) -> list[Header]:
    """Those of `held` that may enter now, in their order, beside so many `inside` of each session.

    A session is there if it has samples inside or waiting, or (`recent`) had some just now. Beside others an owner has
    at most `most` inside, times its weight, or as many as the one that wants fewest, if that is more; and each of an
    owner's sessions an equal part of what the owner may have, or as many as the one that wants fewest.
    """
    there = Counter(inside)
    wanted = there + Counter(map(session_of, held))
    for session in recent:
        wanted[session] = max(wanted[session], 1)
    of_owner, of_session = _bounds(wanted, most, weights)
    owners = _of_owners(there)
    chosen = []
    for header in held:
        session = session_of(header)
        if owners[header.owner] < of_owner[header.owner] and there[session] < of_session[header.owner]:
            owners[header.owner] += 1
            there[session] += 1
            chosen.append(header)
    return chosen


def _bounds(
    wanted: Mapping[Session, int], most: int, weights: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """How many samples each owner may have inside, and how many each of its sessions."""
    sessions: defaultdict[str, list[int]] = defaultdict(list)
    for (owner, _), number in wanted.items():
        sessions[owner].append(number)
    alone = len(sessions) < 2
    fewest = min(map(sum, sessions.values()), default=0)
    of_owner, of_session = {}, {}
    for owner, numbers in sessions.items():
        of_owner[owner] = inf if alone else max(fewest, int(most * weights.get(owner, 1.0)))
        part = most if alone else of_owner[owner] // len(numbers)
        of_session[owner] = inf if len(numbers) == 1 else max(min(numbers), part)
    return of_owner, of_session


def _of_owners(samples: Mapping[Session, int]) -> Counter[str]:
    owners: Counter[str] = Counter()
    for (owner, _), number in samples.items():
        owners[owner] += number
    return owners


class Passes:
    """How many samples of a large tenant make passes as long as they may be beside others, by what passes have taken.

    Of N tenants each has an N-th of the machine if passes take N times as long as those of few samples do. What a
    crowd costs beside its tokens (samples that begin and end, processes of its own) shows in no number of samples: so
    the bound follows from how long shared passes are in the mean. Where there were none of few samples, the shortest
    is where a line through all passes begins. While a crowd has as few inside as a bound may be, that measure is
    believed a little less with each pass: prompts may have become longer since.
    """

    def __init__(self) -> None:
        self._few = _Lately(_LATELY_FEW)
        self._line = _Line()
        self._seconds, self._largest = _Lately(_LATELY), _Lately(_LATELY)  # of shared passes
        self._most = float(MOST)
        self._stretched = 1.0  # the shortest pass, since one of few samples was last seen

    @property
    def doubling(self) -> int:
        """How many samples a large tenant may have beside a small one, LEAST to MOST; MOST until more is known."""
        return int(self._most)

    def saw(self, samples: Collection[int], seconds: float) -> None:
        """One pass, with all that had to be done for it since the one before; `samples` are those of each tenant."""
        if seconds <= 0.0:  # a coarse clock says nothing
            return
        number = sum(samples)
        self._line.saw(number, seconds)
        if number <= LEAST:
            self._few.saw(seconds)
            self._stretched = 1.0
        if len(samples) < 2:
            return
        self._seconds.saw(seconds)
        self._largest.saw(max(samples))
        shortest = self._few.mean if self._few.number >= _ENOUGH else self._line.begins
        if shortest is not None:
            self._follow(self._seconds.mean / (len(samples) * shortest * self._stretched))

    def _follow(self, too_long: float) -> None:
        """Goes a part of the way to what is right if passes are so many times too long."""
        right = self._largest.mean / too_long
        if self.doubling == LEAST and self._largest.mean > LEAST - 0.5 and right < LEAST + 1:
            self._stretched *= 1 + _STRETCH
        if too_long > 1 and right < self._most:
            self._most = max(LEAST, min(self._most, self._largest.mean))
        elif not (too_long < 1 and right > self._most):  # fewer samples than there may be say nothing
            return
        self._most += (max(LEAST, min(MOST, right)) - self._most) / _STEPS


class _Lately:
    """The mean of the latest numbers: the far largest of them count for less.

    One pass that compiles something, or fetches weights from disk, takes hundreds of times as long as all others.
    """

    def __init__(self, most: int) -> None:
        self.mean = 0.0
        self._seen: deque[float] = deque(maxlen=most)

    @property
    def number(self) -> int:
        """Of how many this is the mean."""
        return len(self._seen)

    def saw(self, one: float) -> None:
        self._seen.append(one)
        highest = _OUTLIER * median(self._seen)
        self.mean = sum(min(seen, highest) for seen in self._seen) / len(self._seen)


class _Line:
    """Passes by how many samples are inside: a line through what was seen lately."""

    def __init__(self) -> None:
        self.begins: float | None = None
        """How long a pass of nothing would be; None until it is known."""
        self._passes = self._n = self._nn = self._s = self._ns = 0.0

    def saw(self, samples: int, seconds: float) -> None:
        """One pass. Numbers that hardly differ say nothing about the line, and leave it as it was."""
        self._passes = _KEPT * self._passes + 1
        self._n = _KEPT * self._n + samples
        self._nn = _KEPT * self._nn + samples * samples
        self._s = _KEPT * self._s + seconds
        self._ns = _KEPT * self._ns + samples * seconds
        spread = self._passes * self._nn - self._n**2
        if self._passes < _ENOUGH or spread < max(4 * self._passes**2, _SPREAD * self._n**2):
            return
        slope = max(0.0, (self._passes * self._ns - self._n * self._s) / spread)
        begins = (self._s - slope * self._n) / self._passes
        if begins > 0:
            self.begins = begins
