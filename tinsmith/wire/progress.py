"""What a sample has got so far, for clients that read along: short texts that travel by the doorbell.

They may get lost, come late or come twice: each says where its tokens belong, and the result holds all of them again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

_MESSAGE_BYTES = 1_800  # every doorbell carries messages of that size
_ENTRY_BYTES = 40  # of one token and its log-probability as text, at most


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens of one of a request's samples, from position `start` of that sample on, with their log-probabilities.

    `top_ids` and `top_logprobs` have an entry for each token, or none if no top list was asked for.
    """

    request_id: str
    index: int
    start: int
    tokens: list[int]
    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    def to_messages(self) -> list[str]:
        """As many texts as it takes for each to fit through the doorbell. Up to 40 top entries fit."""
        return [part._to_message() for part in self._parts()]

    def _parts(self) -> Iterator["Progress"]:
        entries = 1 + (len(self.top_ids[0]) if self.top_ids else 0)
        size = max(1, _MESSAGE_BYTES // (_ENTRY_BYTES * entries) - 2)
        for begin in range(0, len(self.tokens), size):
            part = slice(begin, begin + size)
            yield Progress(
                self.request_id,
                self.index,
                self.start + begin,
                self.tokens[part],
                self.logprobs[part],
                self.top_ids[part],
                self.top_logprobs[part],
            )

    def _to_message(self) -> str:
        content = [self.index, self.start, self.tokens, self.logprobs, self.top_ids, self.top_logprobs]
        return f"{self.request_id} {json.dumps(content, separators=(',', ':'))}"

    @classmethod
    def from_message(cls, message: str) -> "Progress":
        """The inverse of a single text of `to_messages`."""
        request_id, _, content = message.partition(" ")
        return cls(request_id, *json.loads(content))
