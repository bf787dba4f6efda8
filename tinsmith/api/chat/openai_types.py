"""The bodies of OpenAI's chat completions, completions and models, as far as they can be served here.

Fields that are not here are refused by their names; those of type Any that ask for something which is not done here
are, too (see `unsupported`).
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from tinsmith.wire.types import MAX_INT64, Id, Request

Samples = Annotated[int, Meta(ge=1, le=128)]
MaxTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, Meta(ge=0)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Seed = Annotated[int, Meta(ge=0, le=MAX_INT64)]
Stop = str | list[str] | None


# Requests


class TextPart(Request, tag="text"):
    text: str


Content = str | list[TextPart]


class SystemMessage(Request, tag_field="role", tag="system"):
    content: Content
    name: str | None = None


class DeveloperMessage(Request, tag_field="role", tag="developer"):
    content: Content
    name: str | None = None


class UserMessage(Request, tag_field="role", tag="user"):
    content: Content
    name: str | None = None


class FunctionCall(Request):
    name: str
    arguments: str  # JSON


class CallMade(Request):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None  # clients that put a stream together leave it there


class AssistantMessage(Request, tag_field="role", tag="assistant"):
    content: Content | None = None
    tool_calls: list[CallMade] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    annotations: list[Any] | None = None


class ToolMessage(Request, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(Request):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Request):
    function: Function
    type: Literal["function"] = "function"


class StreamOptions(Request):
    include_usage: bool = False
    include_obfuscation: bool = False


class Generating(Request, kw_only=True):
    """What both kinds of completions take. Of the fields below `user`, none changes what is sampled."""

    model: Id
    n: Samples | None = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatRequest(Generating, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(Generating, kw_only=True):
    prompt: str | list[str | int | list[int]]  # texts, or the tokens of one prompt or of several
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # none with `echo` only
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None


# Answers


class Answer(Struct):
    """A body that clients receive."""


class PromptDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Answer):
    name: str
    arguments: str


class Called(Answer):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class CalledPart(Called):
    """A whole call, as a stream tells it."""

    index: int = 0


Reason = Literal["stop", "length", "tool_calls"]


class ChatMessage(Answer):
    content: str | None
    tool_calls: list[Called] | UnsetType = UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    finish_reason: Reason
    logprobs: ChatLogprobs | None


class ChatCompletion(Answer):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Answer):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CalledPart] | UnsetType = UNSET


class DeltaChoice(Answer):
    index: int
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogprobs | None = None


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]  # None for a prompt's first token, which follows nothing
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    finish_reason: Reason | None = None
    logprobs: TextLogprobs | None = None


class Completion(Answer):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class ChatChunk(Answer):
    """One event of a stream; `usage` is in the last one, if it was asked for."""

    id: str
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Usage | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextChunk(Answer):
    """The same of a completion."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class Model(Answer):
    id: str
    created: int
    max_model_len: int
    owned_by: str = "tinsmith"
    object: Literal["model"] = "model"


class ModelList(Answer):
    data: list[Model]
    object: Literal["list"] = "list"
