"""What clients say in either dialect, as the plain messages and tools that chat templates take."""

import json
from collections.abc import Sequence
from typing import Any

from tinsmith.api.chat import anthropic_types as anthropic
from tinsmith.api.chat import openai_types as openai
from tinsmith.api.chat.templates import ChatTemplate, Message
from tinsmith.api.chat.unsupported import refuse_unsupported
from tinsmith.errors import UserError


def check_tools(template: ChatTemplate) -> None:
    """Raises UserError for a model whose template has no place for tools, or whose calls could not be read."""
    if not template.takes_tools:
        raise UserError("tools were given, but the chat template of this model has no place for them")
    if not template.writes_tool_calls:
        raise UserError(
            "tools were given, but this model writes its calls in a form that is not parsed here (only JSON between "
            "<tool_call> and </tool_call> is); leave tools out and describe them in a message"
        )


# OpenAI


def of_openai(messages: Sequence[openai.Message]) -> list[Message]:
    """Raises UserError for what is not supported."""
    return [_of_openai(message) for message in messages]


def _of_openai(message: openai.Message) -> Message:
    refuse_unsupported(message)
    match message:
        case openai.AssistantMessage():
            said: Message = {"role": "assistant", "content": _text(message.content or "")}
            if message.tool_calls:
                said["tool_calls"] = [
                    _call(call.id, call.function.name, _arguments(call.function.arguments))
                    for call in message.tool_calls
                ]
        case openai.ToolMessage():
            said = {"role": "tool", "content": _text(message.content), "tool_call_id": message.tool_call_id}
        case openai.UserMessage():
            said = {"role": "user", "content": _text(message.content)}
        case _:
            said = {"role": "system", "content": _text(message.content)}
    return said if message.name is None else said | {"name": message.name}


def openai_tools(body: openai.ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the model may call; None if it has none. Raises UserError for a choice that cannot be forced."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise UserError(f"tool_choice is {str(choice)[:100]}, but there are no tools")
        return None
    if choice not in (None, "none", "auto"):
        raise UserError(f"tool_choice {str(choice)[:100]} cannot be forced on this model; use 'auto' or 'none'")
    for tool in body.tools:
        refuse_unsupported(tool.function)
    tools = [_tool(tool.function.name, tool.function.description, tool.function.parameters) for tool in body.tools]
    return None if choice == "none" else tools


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of a tool call are {text[:100]!r}; they must be a JSON object")
    return arguments


# Anthropic


def of_anthropic(
    system: str | list[anthropic.TextBlock] | None, messages: Sequence[anthropic.Message]
) -> list[Message]:
    """Raises UserError for what is not supported."""
    said: list[Message] = [{"role": "system", "content": _text(system)}] if system else []
    for message in messages:
        said += _of_assistant(message) if message.role == "assistant" else _of_user(message)
    return said


def _of_assistant(message: anthropic.Message) -> list[Message]:
    blocks = _blocks(message)
    said: Message = {"role": "assistant", "content": _joined(blocks)}
    calls = [block for block in blocks if isinstance(block, anthropic.ToolUseBlock)]
    if calls:
        said["tool_calls"] = [_call(block.id, block.name, block.input) for block in calls]
    if any(isinstance(block, anthropic.ToolResultBlock) for block in blocks):
        raise UserError("an assistant message holds a tool_result; only user messages may")
    return [said]


def _of_user(message: anthropic.Message) -> list[Message]:
    """Results of tools first, each as a message of its own, then what the user says beside them."""
    blocks = _blocks(message)
    if any(isinstance(block, anthropic.ToolUseBlock) for block in blocks):
        raise UserError("a user message holds a tool_use; only assistant messages may")
    results = [block for block in blocks if isinstance(block, anthropic.ToolResultBlock)]
    said: list[Message] = [
        {"role": "tool", "content": _text(block.content or ""), "tool_call_id": block.tool_use_id} for block in results
    ]
    if len(results) < len(blocks) or not results:
        said.append({"role": "user", "content": _joined(blocks)})
    return said


def anthropic_tools(body: anthropic.Conversation) -> list[dict[str, Any]] | None:
    """As `openai_tools`."""
    for offered in body.tools or ():
        refuse_unsupported(offered)
    choice = "auto" if body.tool_choice is None else body.tool_choice.type
    if choice not in ("auto", "none"):
        raise UserError(f"tool_choice {choice!r} cannot be forced on this model; use 'auto' or 'none'")
    if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        raise UserError("disable_parallel_tool_use cannot be forced on this model; leave it out")
    if not body.tools or choice == "none":
        return None
    return [_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools]


def _blocks(message: anthropic.Message) -> list[anthropic.Block]:
    return [anthropic.TextBlock(message.content)] if isinstance(message.content, str) else message.content


def _joined(blocks: Sequence[anthropic.Block]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, anthropic.TextBlock))


# Both


def _text(content: str | Sequence[openai.TextPart] | Sequence[anthropic.TextBlock]) -> str:
    """Parts of a message become lines."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    function["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
    return {"type": "function", "function": function}
