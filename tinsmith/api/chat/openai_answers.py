"""Sampled tokens in the form of OpenAI's answers: whole, or as the chunks of a stream.

Log-probabilities cover every sampled token, also the one that ends a sample and those of a stop string.
"""

import codecs
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import isnan
from typing import Protocol

from msgspec import UNSET, Struct

from tinsmith.api.chat import openai_types as types
from tinsmith.api.chat.parts import arguments_text, new_id
from tinsmith.api.chat.transcripts import Ending, Piece, ToolCall
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress


class Writer(Protocol):
    """One answer in one of the two forms. Samples are called by their index in it."""

    def opening(self, index: int) -> list[Struct]:
        """The chunks with which a sample begins."""

    def news(self, index: int, part: Progress, pieces: Sequence[Piece]) -> list[Struct]:
        """The chunks that tell of further tokens, and what they said."""

    def closing(self, index: int, pieces: Sequence[Piece], ending: Ending) -> list[Struct]:
        """The chunks with the rest of what a sample said, and why it ended."""

    def usage(self, usage: types.Usage) -> Struct:
        """The chunk that only counts tokens."""

    def add(self, index: int, sample: Progress, pieces: Sequence[Piece], ending: Ending) -> None:
        """Takes a whole sample for `whole`."""

    def whole(self, usage: types.Usage) -> Struct:
        """The answer of all samples that were added."""


def usage_of(prompt_tokens: int, outputs: Sequence[SampleOutput]) -> types.Usage:
    """What a request counts, all of its prompts and samples together."""
    sampled = sum(len(output.tokens_S) for output in outputs)
    cached = sum(output.cache_hit_tokens for output in outputs)
    return types.Usage(prompt_tokens, sampled, prompt_tokens + sampled, types.PromptDetails(cached))


class ChatWriter:
    """A Writer of chat completions."""

    def __init__(self, model: str, words: Vocabulary, *, logprobs: bool) -> None:
        self._head = (new_id("chatcmpl-"), int(time.time()), model)
        self._words = words
        self._logprobs = logprobs
        self._called: Counter[int] = Counter()  # calls told of, by sample
        self._choices: list[types.ChatChoice] = []

    def opening(self, index: int) -> list[Struct]:
        return [self._chunk(types.DeltaChoice(index, types.Delta(role="assistant", content="")))]

    def news(self, index: int, part: Progress, pieces: Sequence[Piece]) -> list[Struct]:
        if not pieces and not self._logprobs:
            return []
        return [self._chunk(types.DeltaChoice(index, self._delta(index, pieces), logprobs=self._scores(part)))]

    def closing(self, index: int, pieces: Sequence[Piece], ending: Ending) -> list[Struct]:
        chunks: list[Struct] = []
        if pieces:
            chunks.append(self._chunk(types.DeltaChoice(index, self._delta(index, pieces))))
        return [*chunks, self._chunk(types.DeltaChoice(index, types.Delta(), _reason(ending)))]

    def usage(self, usage: types.Usage) -> Struct:
        return types.ChatChunk(*self._head, [], usage)

    def add(self, index: int, sample: Progress, pieces: Sequence[Piece], ending: Ending) -> None:
        calls = [
            types.Called(new_id("call_"), types.CalledFunction(piece.name, arguments_text(piece)))
            for piece in pieces
            if isinstance(piece, ToolCall)
        ]
        text = _text(pieces)
        said = types.ChatMessage(None if calls and not text else text, calls or UNSET)
        self._choices.append(types.ChatChoice(index, said, _reason(ending), self._scores(sample)))

    def whole(self, usage: types.Usage) -> Struct:
        return types.ChatCompletion(*self._head, self._choices, usage)

    def _chunk(self, choice: types.DeltaChoice) -> types.ChatChunk:
        return types.ChatChunk(*self._head, [choice])

    def _delta(self, index: int, pieces: Sequence[Piece]) -> types.Delta:
        calls = []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                function = types.CalledFunction(piece.name, arguments_text(piece))
                calls.append(types.CalledPart(new_id("call_"), function, index=self._called[index]))
                self._called[index] += 1
        return types.Delta(content=_text(pieces) or UNSET, tool_calls=calls or UNSET)

    def _scores(self, part: Progress) -> types.ChatLogprobs | None:
        if not self._logprobs:
            return None
        return types.ChatLogprobs([self._score(part, place) for place in range(len(part.tokens))])

    def _score(self, part: Progress, place: int) -> types.TokenLogprob:
        raw = self._words.token_bytes(part.tokens[place])
        top = []
        if part.top_ids:
            for token, logprob in zip(part.top_ids[place], part.top_logprobs[place], strict=True):
                other = self._words.token_bytes(token)
                top.append(types.TopLogprob(_shown(other), logprob, list(other)))
        return types.TokenLogprob(_shown(raw), part.logprobs[place], list(raw), top)


class TextWriter:
    """A Writer of completions of bare texts."""

    def __init__(self, model: str, words: Vocabulary, *, logprobs: bool, fronts: Sequence[int] = ()) -> None:
        """`fronts`: of each sample, how many characters of its first tokens are no part of its text."""
        self._head = (new_id("cmpl-"), int(time.time()), model)
        self._words = words
        self._logprobs = logprobs
        self._places = defaultdict(_Places, {index: _Places(front) for index, front in enumerate(fronts)})
        self._choices: list[types.TextChoice] = []

    def opening(self, index: int) -> list[Struct]:
        return []

    def news(self, index: int, part: Progress, pieces: Sequence[Piece]) -> list[Struct]:
        if not pieces and not self._logprobs:
            return []
        return [self._chunk(types.TextChoice(index, _text(pieces), logprobs=self._scores(index, part)))]

    def closing(self, index: int, pieces: Sequence[Piece], ending: Ending) -> list[Struct]:
        return [self._chunk(types.TextChoice(index, _text(pieces), _reason(ending)))]

    def usage(self, usage: types.Usage) -> Struct:
        return types.TextChunk(*self._head, [], usage)

    def add(self, index: int, sample: Progress, pieces: Sequence[Piece], ending: Ending) -> None:
        scores = self._scores(index, sample)
        self._choices.append(types.TextChoice(index, _text(pieces), _reason(ending), scores))

    def whole(self, usage: types.Usage) -> Struct:
        return types.Completion(*self._head, self._choices, usage)

    def _chunk(self, choice: types.TextChoice) -> types.TextChunk:
        return types.TextChunk(*self._head, [choice])

    def _scores(self, index: int, part: Progress) -> types.TextLogprobs | None:
        if not self._logprobs:
            return None
        raw = [self._words.token_bytes(token) for token in part.tokens]
        offsets = [self._places[index].next(token) for token in raw]
        top = [
            self._likeliest(ids, logprobs) or None
            for ids, logprobs in zip(part.top_ids, part.top_logprobs, strict=True)
        ]
        logprobs = [None if isnan(logprob) else logprob for logprob in part.logprobs]
        return types.TextLogprobs([_shown(token) for token in raw], logprobs, top or None, offsets)

    def _likeliest(self, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, float]:
        """By their texts; of several with the same, as parts of characters have it, the first one."""
        found: dict[str, float] = {}
        for token, logprob in zip(ids, logprobs, strict=True):
            found.setdefault(_shown(self._words.token_bytes(token)), logprob)
        return found


class _Places:
    """Where in a text its tokens begin, in characters; each part of a character begins where the character does."""

    def __init__(self, front: int = 0) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = -front

    def next(self, raw: bytes) -> int:
        begin = self._length
        self._length += len(self._characters.decode(raw))
        return max(0, begin)


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _shown(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _reason(ending: Ending) -> types.Reason:
    reasons: dict[str, types.Reason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
    return reasons[ending.reason]
