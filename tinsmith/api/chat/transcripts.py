"""From sampled tokens to what a client reads: text without broken characters, cut at stop strings, and tool calls.

Everything works on growing input and gives back what can no longer change, so that a stream and a whole answer are made
by the same code and say the same. Knows no wire format.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinsmith.api.chat.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"
_CHARACTER_BYTES = 4  # at most, and a token has one at least
_LONGEST_WAIT = 8  # tokens; a character that is not complete by then is never going to be
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote."""

    name: str
    arguments: dict[str, Any]


Piece = str | ToolCall


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sample ended: `stop`, `length` or `tool_calls`; `stop_string` is the one that it met, if any."""

    reason: str
    stop_string: str | None = None


class Transcript:
    """What one sample says. `feed` its tokens in order, then `end`."""

    def __init__(
        self, vocabulary: Vocabulary, stops: Sequence[str] = (), *, tools: bool = False, after: Sequence[int] = ()
    ) -> None:
        """`after` are the tokens of a text that the sample goes on with; an answer of its own follows none."""
        self._characters = _Characters(vocabulary, after)
        self._stops = _Stops(stops)
        self._calls = _Calls() if tools else None

    def feed(self, tokens: Sequence[int]) -> list[Piece]:
        """What the tokens add that is certain by now."""
        return self._parsed(self._stops.feed(self._characters.feed(tokens)))

    def end(self, *, stopped: bool) -> tuple[list[Piece], Ending]:
        """The rest, and why it ended; `stopped` says whether the sampler met an end or a stop."""
        pieces = self._parsed(self._stops.feed(self._characters.end()) + self._stops.end())
        stopped = stopped or self._stops.met is not None  # the sampler reads a sample without what it goes on with
        if self._calls is None:
            return pieces, Ending("stop" if stopped else "length", self._stops.met)
        pieces += self._calls.end()
        is_call = stopped and self._calls.count > 0
        return pieces, Ending("tool_calls" if is_call else "stop" if stopped else "length", self._stops.met)

    def _parsed(self, text: str) -> list[Piece]:
        if self._calls is not None:
            return self._calls.feed(text)
        return [text] if text else []


class _Characters:
    """Tokens to text; those with the bytes of an incomplete character wait for the rest of it."""

    def __init__(self, vocabulary: Vocabulary, after: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        # Tokens whose text is out, for decoders that look at a token's neighbour, or strip a text.
        self._before = list(after[-_LONGEST_WAIT:])
        if vocabulary.decode(self._before).endswith(_REPLACEMENT):
            self._before = []  # an incomplete character: nobody knows where its text ends
        self._waiting: list[int] = []

    def feed(self, tokens: Sequence[int]) -> str:
        self._waiting += tokens
        for count in range(len(self._waiting), max(0, len(self._waiting) - _CHARACTER_BYTES), -1):
            text = self._text(count)
            if not text.endswith(_REPLACEMENT):
                return self._give(count, text)
        return self._give(len(self._waiting), self.end()) if len(self._waiting) >= _LONGEST_WAIT else ""

    def end(self) -> str:
        return self._text(len(self._waiting))

    def _text(self, count: int) -> str:
        """What the first `count` waiting tokens add."""
        whole = self._vocabulary.decode(self._before + self._waiting[:count])
        return whole[len(self._vocabulary.decode(self._before)) :]

    def _give(self, count: int, text: str) -> str:
        self._before = (self._before + self._waiting[:count])[-_LONGEST_WAIT:]
        self._waiting = self._waiting[count:]
        return text


class _Stops:
    """Text before the first stop string; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._waiting = ""
        self.met: str | None = None

    def feed(self, text: str) -> str:
        if self.met is not None:
            return ""
        self._waiting += text
        found = [(place, stop) for stop in self._stops if (place := self._waiting.find(stop)) >= 0]
        if found:
            place, self.met = min(found)
            text, self._waiting = self._waiting[:place], ""
            return text
        kept = max((_overlap(self._waiting, stop) for stop in self._stops), default=0)
        return self._give(len(self._waiting) - kept)

    def end(self) -> str:
        return self._give(len(self._waiting))

    def _give(self, length: int) -> str:
        text, self._waiting = self._waiting[:length], self._waiting[length:]
        return text


class _Calls:
    """Text and tool calls in the form `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    What is between the marks and is no such call stays text, marks included. White space around calls is dropped.
    """

    def __init__(self) -> None:
        self._waiting = ""
        self.count = 0

    def feed(self, text: str) -> list[Piece]:
        self._waiting += text
        pieces: list[Piece] = []
        while (begin := self._waiting.find(_OPEN)) >= 0:
            end = self._waiting.find(_CLOSE, begin)
            if end < 0:
                self._say_stripped(pieces, begin)
                return pieces
            call = _parse_call(self._waiting[begin + len(_OPEN) : end])
            end += len(_CLOSE)
            if call is None:
                self._say(pieces, self._waiting[:end])
                self._waiting = self._waiting[end:]
                continue
            self._say(pieces, self._waiting[:begin].rstrip())
            self.count += 1
            pieces.append(call)
            self._waiting = self._waiting[end:]
        self._say_stripped(pieces, len(self._waiting) - _overlap(self._waiting, _OPEN))
        return pieces

    def end(self) -> list[Piece]:
        pieces: list[Piece] = []
        rest = self._waiting
        self._say(pieces, "" if self.count and rest.isspace() else rest)
        self._waiting = ""
        return pieces

    def _say_stripped(self, pieces: list[Piece], length: int) -> None:
        """Says what waits, up to `length`; white space at its end goes on waiting, for a call may follow."""
        said = self._waiting[:length].rstrip()
        self._waiting = self._waiting[len(said) :]
        self._say(pieces, said)

    def _say(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(text)


def _parse_call(text: str) -> ToolCall | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return None
    arguments = content.get("arguments", {})
    return ToolCall(content["name"], arguments) if isinstance(arguments, dict) else None


def _overlap(text: str, mark: str) -> int:
    """How many of the text's last characters are the beginning of `mark`, short of all of it."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
