"""Sampled tokens in the form of Anthropic's messages: whole, or as the events of a stream."""

from collections.abc import Sequence

from tinsmith.api.chat import anthropic_types as types
from tinsmith.api.chat.parts import arguments_text, new_id
from tinsmith.api.chat.transcripts import Ending, Piece, ToolCall
from tinsmith.wire.packing import SampleOutput

Events = list[types.Event]


def usage_of(prompt_tokens: int, output: SampleOutput) -> types.Usage:
    """What a request counts. Of the prompt, what was known already is counted apart."""
    cached = output.cache_hit_tokens
    return types.Usage(prompt_tokens - cached, cached, len(output.tokens_S))


def message_of(model: str, pieces: Sequence[Piece], ending: Ending, usage: types.Usage) -> types.SaidMessage:
    """The whole answer."""
    content: list[types.SaidText | types.SaidToolUse] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            content.append(types.SaidToolUse(new_id("toolu_"), piece.name, piece.arguments))
        elif content and isinstance(last := content[-1], types.SaidText):
            last.text += piece
        else:
            content.append(types.SaidText(piece))
    return types.SaidMessage(new_id("msg_"), model, content, usage, _reason(ending), ending.stop_string)


class MessageWriter:
    """The events of one answer. Text and each tool call are blocks, one open at a time."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._index = 0
        self._open = False  # whether block `_index` is one of text that goes on

    def opening(self) -> Events:
        usage = types.Usage(self._prompt_tokens, 0, 0)
        return [types.MessageStart(types.SaidMessage(new_id("msg_"), self._model, [], usage)), types.Ping()]

    def news(self, pieces: Sequence[Piece]) -> Events:
        return [event for piece in pieces for event in self._piece(piece)]

    def closing(self, pieces: Sequence[Piece], ending: Ending, usage: types.Usage) -> Events:
        ended = types.MessageDelta(types.Ended(_reason(ending), ending.stop_string), usage)
        return [*self.news(pieces), *self._close(), ended, types.MessageStop()]

    def _piece(self, piece: Piece) -> Events:
        if isinstance(piece, str):
            begun: Events = [] if self._open else [types.BlockStart(self._index, types.SaidText(""))]
            self._open = True
            return [*begun, types.BlockDelta(self._index, types.TextDelta(piece))]
        closed = self._close()
        block = types.SaidToolUse(new_id("toolu_"), piece.name, {})
        self._index += 1
        return [
            *closed,
            types.BlockStart(self._index - 1, block),
            types.BlockDelta(self._index - 1, types.InputDelta(arguments_text(piece))),
            types.BlockStop(self._index - 1),
        ]

    def _close(self) -> Events:
        if not self._open:
            return []
        self._open = False
        self._index += 1
        return [types.BlockStop(self._index - 1)]


def _reason(ending: Ending) -> types.Reason:
    if ending.stop_string is not None:
        return "stop_sequence"
    reasons: dict[str, types.Reason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return reasons[ending.reason]
