"""Datums of a call that begin alike: pure functions of numpy arrays; knows no models.

Rows with the same tokens before them have the same hidden states. So neighbouring datums, such as the samples of one
prompt, can form a group, of which the tokens that all of them begin with are computed once; the rest of each datum
continues these rows. A shared row's gradient is the sum over its datums.

Shapes: `N` datums of a call, `T` tokens of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinsmith.wire.packing import Int32, Int64

LEAST_SHARED = 32  # tokens; less is not worth a sequence of its own
LEAST_SAVED = 1 / 8  # of a call's rows; less would not pay for the longer way through attention


@dataclass(frozen=True, slots=True)
class Group:
    """Datums `first` to `last`: their first `shared` tokens are the same, and each has at least one more.

    `tokens` are those of all datums. Nothing is shared in a group of one.
    """

    first: int
    last: int
    tokens: int
    shared: int = 0

    @property
    def saved(self) -> int:
        """Rows that need not be computed."""
        return (self.last - self.first - 1) * self.shared

    def joined(self, tokens: int, common: int) -> "Group | None":
        """With the next datum, which has so many tokens in common with the last one; None if that saves nothing."""
        shared = min(self.shared or common, common)
        bigger = Group(self.first, self.last + 1, self.tokens + tokens, shared)
        return bigger if shared >= LEAST_SHARED and bigger.saved > self.saved else None


def common_starts(tokens_T: Int32, offsets: Int64) -> list[int]:
    """For each datum the number of tokens that it begins with like the one before, less than either's length.

    All are zero where sharing them would not save enough.
    """
    commons = [0]
    for start, middle, end in zip(offsets[:-2], offsets[1:-1], offsets[2:], strict=True):
        most = int(min(middle - start, end - middle)) - 1
        differ = tokens_T[start : start + most] != tokens_T[middle : middle + most]
        first = int(differ.argmax()) if most > 0 else 0
        commons.append(first if most > 0 and differ[first] else max(most, 0))
    lengths = np.diff(offsets).tolist()
    saved = sum(group.saved for group in grouped(lengths, commons))
    return commons if saved >= LEAST_SAVED * sum(lengths) else [0] * len(commons)


def grouped(lengths: Sequence[int], commons: Sequence[int]) -> list[Group]:
    """All datums, in order."""
    groups: list[Group] = []
    for datum, (length, common) in enumerate(zip(lengths, commons, strict=True)):
        if groups and (bigger := groups[-1].joined(length, common)):
            groups[-1] = bigger
        else:
            groups.append(Group(datum, datum + 1, length))
    return groups
