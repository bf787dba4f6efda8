"""The bodies of Anthropic's messages and count_tokens, as far as they can be served here.

Fields that are not here are refused by their names, and so are those that ask for something which is not done here
(see `unsupported`). What only tells a hosted service how to cache or to bill is taken and changes nothing.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tinsmith.api.chat.openai_types import MaxTokens, Temperature, TopP
from tinsmith.wire.types import Id, Request

# Requests


class TextBlock(Request, tag="text"):
    text: str
    cache_control: Any = None
    citations: Any = None


class ToolUseBlock(Request, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None


class ToolResultBlock(Request, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None


Block = TextBlock | ToolUseBlock | ToolResultBlock


class Message(Request):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(Request):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(Request):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Conversation(Request, kw_only=True):
    """What messages and count_tokens share."""

    model: Id
    messages: Annotated[list[Message], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Any = None
    output_config: Any = None
    cache_control: Any = None
    speed: Any = None


class CountRequest(Conversation, kw_only=True):
    pass


class MessagesRequest(Conversation, kw_only=True):
    max_tokens: MaxTokens
    temperature: Temperature | None = None
    top_k: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    top_p: TopP | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    container: Any = None
    diagnostics: Any = None


# Answers


class Answer(Struct):
    """A body that clients receive."""


class TokenCount(Answer):
    input_tokens: int


class Usage(Answer):
    """`input_tokens` are those that were not cached."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0


class SaidText(Answer, tag="text"):
    text: str


class SaidToolUse(Answer, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Reason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class SaidMessage(Answer):
    id: str
    model: str
    content: list[SaidText | SaidToolUse]
    usage: Usage
    stop_reason: Reason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


# Events of a stream


class MessageStart(Answer, tag="message_start"):
    message: SaidMessage


class BlockStart(Answer, tag="content_block_start"):
    index: int
    content_block: SaidText | SaidToolUse


class TextDelta(Answer, tag="text_delta"):
    text: str


class InputDelta(Answer, tag="input_json_delta"):
    partial_json: str


class BlockDelta(Answer, tag="content_block_delta"):
    index: int
    delta: TextDelta | InputDelta


class BlockStop(Answer, tag="content_block_stop"):
    index: int


class Ended(Answer):
    stop_reason: Reason
    stop_sequence: str | None


class MessageDelta(Answer, tag="message_delta"):
    delta: Ended
    usage: Usage


class MessageStop(Answer, tag="message_stop"):
    pass


class Ping(Answer, tag="ping"):
    pass


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping


class Model(Answer):
    id: str
    display_name: str
    created_at: str
    max_input_tokens: int
    lifecycle: Literal["active"] = "active"
    type: Literal["model"] = "model"


class ModelList(Answer):
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: bool = False
