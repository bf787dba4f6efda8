"""Datums of a call that begin alike: pure functions of numpy arrays; knows no models.

Rows with the same tokens before them have the same hidden states. So datums such as the samples of one prompt can form
a group, of which the tokens that all of them begin with are computed once; the rest of each datum continues these rows.
A shared row's gradient is the sum over its datums.

Shapes: `T` tokens of all datums of a call.
"""

from collections.abc import Iterable
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
    """Groups that grow datum by datum; with `share` off, of one datum each.

    A datum costs what it takes to compare it with one other, however many it begins like.
    """

    call: TrainCall
    share: bool
    rows: int = 0
    _datums: list[list[int]] = field(default_factory=list)  # of each group
    _shared: list[int] = field(default_factory=list)  # tokens, by each group
    _latest: dict[bytes, int] = field(default_factory=dict)  # by how its datums begin, the newest group's place

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(tuple(datums), sum(map(self._length, datums)), shared)
            for datums, shared in zip(self._datums, self._shared, strict=True)
        )

    def place(self, datum: int) -> Seat:
        """Where a datum belongs; `put` seats it there."""
        length = self._length(datum)
        place = self._latest.get(self._beginning(datum)) if self.share and length > LEAST_SHARED else None
        if place is not None:
            others, before = len(self._datums[place]), self._shared[place]
            common = self._common(self._datums[place][0], datum)
            shared = min(before or common, common)
            saved = others * shared - (others - 1) * before
            if shared >= LEAST_SHARED and saved > 0:
                return Seat(datum, place, shared, self.rows + length - saved)
        return Seat(datum, len(self._datums), 0, self.rows + length)

    def put(self, seat: Seat) -> None:
        if seat.place == len(self._datums):
            self._datums.append([])
            self._shared.append(0)
            self._latest[self._beginning(seat.datum)] = seat.place
        self._datums[seat.place].append(seat.datum)
        self._shared[seat.place] = seat.shared
        self.rows = seat.rows

    def _length(self, datum: int) -> int:
        return self._end(datum) - self._start(datum)

    def _start(self, datum: int) -> int:
        return int(self.call.token_offsets[datum])

    def _end(self, datum: int) -> int:
        return int(self.call.token_offsets[datum + 1])

    def _beginning(self, datum: int) -> bytes:
        start = self._start(datum)
        return self.call.tokens_T[start : min(start + LEAST_SHARED, self._end(datum))].tobytes()

    def _common(self, one: int, other: int) -> int:
        """How many tokens two datums begin with alike, less than either's length."""
        starts = self._start(one), self._start(other)
        most = min(self._end(one) - starts[0], self._end(other) - starts[1]) - 1
        tokens_T = self.call.tokens_T
        differs = tokens_T[starts[0] : starts[0] + most] != tokens_T[starts[1] : starts[1] + most]
        first = int(differs.argmax()) if most else 0
        return first if most and differs[first] else most


def gathered(call: TrainCall, datums: Iterable[int]) -> Gathering:
    """All of these datums, in groups that share what they can."""
    gathering = Gathering(call, share=True)
    for datum in datums:
        gathering.put(gathering.place(datum))
    return gathering


def is_worth_sharing(call: TrainCall) -> bool:
    """Whether the datums of a call begin alike to such an extent that sharing rows pays."""
    return call.num_tokens - gathered(call, range(call.num_datums)).rows >= LEAST_SAVED * call.num_tokens
