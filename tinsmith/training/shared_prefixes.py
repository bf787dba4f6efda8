"""Datums of a call that begin alike: pure functions of numpy arrays; knows no models.

Rows with the same tokens before them have the same hidden states. So datums such as the samples of one prompt can form
a group, of which the tokens that all of them begin with are computed once; the rest of each datum continues these rows.
A shared row's gradient is the sum over its datums.

Shapes: `T` tokens of all datums of a call.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tinsmith.wire.packing import TrainCall

LEAST_SHARED = 32  # tokens; less is not worth a sequence of its own
LEAST_SAVED = 1 / 8  # of a call's rows; less would not pay for the longer way through attention


@dataclass(frozen=True, slots=True)
class Group:
    """Datums whose first `shared` tokens are the same, and each of which has at least one more.

    `tokens` are those of all datums. Nothing is shared in a group of one.
    """

    datums: tuple[int, ...]
    tokens: int
    shared: int = 0

    @property
    def saved(self) -> int:
        """Rows that need not be computed."""
        return (len(self.datums) - 1) * self.shared

    @property
    def rows(self) -> int:
        return self.tokens - self.saved


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a datum belongs: the place of a group, perhaps a new one, that then shares so many tokens.

    `rows` are those of all groups once the datum is there.
    """

    datum: int
    place: int
    shared: int
    rows: int


@dataclass(slots=True)
class Gathering:
    """Groups that grow datum by datum; of one datum each without `most_N`, which is `most_shared` of the call.

    A datum costs what it takes to compare it with one other, however many it begins like. It joins no group where it,
    or the group's first, would share less than half of what it could share elsewhere: what all prompts begin with must
    not keep the samples of one prompt from sharing all of it.
    """

    call: TrainCall
    most_N: Sequence[int] | None
    rows: int = 0
    _datums: list[list[int]] = field(default_factory=list)  # of each group
    _shared: list[int] = field(default_factory=list)  # tokens, by each group
    _latest: dict[bytes, int] = field(default_factory=dict)  # by how its first datum begins, the newest group's place

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(tuple(datums), sum(_length(self.call, datum) for datum in datums), shared)
            for datums, shared in zip(self._datums, self._shared, strict=True)
        )

    def place(self, datum: int) -> Seat:
        """Where a datum belongs; `put` seats it there."""
        length = _length(self.call, datum)
        place = next((place for each in self._beginnings(datum) if (place := self._latest.get(each)) is not None), None)
        if place is not None and self.most_N is not None:
            first, others, before = self._datums[place][0], len(self._datums[place]), self._shared[place]
            common = _common(self.call, first, datum)
            shared = min(before or common, common)
            saved = others * shared - (others - 1) * before
            if saved > 0 and shared >= max(LEAST_SHARED, self.most_N[first] / 2, self.most_N[datum] / 2):
                return Seat(datum, place, shared, self.rows + length - saved)
        return Seat(datum, len(self._datums), 0, self.rows + length)

    def put(self, seat: Seat) -> None:
        if seat.place == len(self._datums):
            self._datums.append([])
            self._shared.append(0)
            self._latest.update((each, seat.place) for each in self._beginnings(seat.datum))
        self._datums[seat.place].append(seat.datum)
        self._shared[seat.place] = seat.shared
        self.rows = seat.rows

    def _beginnings(self, datum: int) -> Iterator[bytes]:
        """Of the tokens that others begin with, too: the first 32, 64, 128 and so on, the most of them first."""
        most = self.most_N[datum] if self.most_N is not None else 0
        start = int(self.call.token_offsets[datum])
        count = LEAST_SHARED << (most // LEAST_SHARED).bit_length() >> 1
        while count >= LEAST_SHARED:
            yield self.call.tokens_T[start : start + count].tobytes()
            count //= 2


def _length(call: TrainCall, datum: int) -> int:
    return int(call.token_offsets[datum + 1] - call.token_offsets[datum])


def _common(call: TrainCall, one: int, other: int) -> int:
    """How many tokens two datums begin with alike, less than either's length."""
    starts = int(call.token_offsets[one]), int(call.token_offsets[other])
    most = min(_length(call, one), _length(call, other)) - 1
    differs = call.tokens_T[starts[0] : starts[0] + most] != call.tokens_T[starts[1] : starts[1] + most]
    first = int(differs.argmax()) if most else 0
    return first if most and differs[first] else most


def most_shared(call: TrainCall) -> list[int]:
    """[N]: how many tokens each datum begins with like another of the call, whichever has the most."""
    offsets = call.token_offsets.tolist()
    texts = [call.tokens_T[start:end].tobytes() for start, end in itertools.pairwise(offsets)]
    most_N = [0] * len(texts)
    for one, other in itertools.pairwise(sorted(range(len(texts)), key=texts.__getitem__)):
        common = _common(call, one, other)
        most_N[one], most_N[other] = max(most_N[one], common), max(most_N[other], common)
    return most_N


def worth_sharing(call: TrainCall) -> list[int] | None:
    """`most_shared` of a call whose datums begin alike to such an extent that sharing rows pays; else None."""
    most_N = most_shared(call)
    if max(most_N) < LEAST_SHARED:
        return None
    saved = call.num_tokens - gathered(call, most_N).rows
    return most_N if saved >= LEAST_SAVED * call.num_tokens else None


def gathered(call: TrainCall, most_N: Sequence[int]) -> Gathering:
    """All datums of a call, in groups that share what they can."""
    gathering = Gathering(call, most_N)
    for datum in range(call.num_datums):
        gathering.put(gathering.place(datum))
    return gathering
