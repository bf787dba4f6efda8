"""Tools, as the official clients offer them, read the model's calls, and send results back."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.contract.api_fixtures import CAPABILITIES, Api, running_api
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.demo import tiny_folder
from tinsmith.wire.packing import SampleCall

TEMPLATE = """{%- if tools %}
<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{%- endif %}
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
SAID = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 16, "b": "ü"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}]
CLAUDE_TOOLS: Any = [{"name": "add", "description": "Adds.", "input_schema": PARAMETERS}]
ASKED: Any = [{"role": "user", "content": "Add!"}]
ARGUMENTS = {"a": 16, "b": "ü"}


def model_folder(folder: Path, template: str) -> Path:
    """The tiny model's tokenizer with another chat template."""
    shutil.copytree(tiny_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = model_folder(tmp_path_factory.mktemp("models") / "tools", TEMPLATE)
    capable = replace(CAPABILITIES, vocab_size=1280, max_context=2048)
    options: dict[str, Any] = {"models": (str(folder),), "aliases": {"tools": str(folder)}}
    with running_api(tmp_path_factory.mktemp("api"), capable, **options) as api:
        words = Vocabulary(folder)
        api.engine.says = [*words.encode(SAID), *words.encode("<|im_end|>")]
        yield api


@pytest.fixture(scope="module")
def chats(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.base_url}/v1", api_key="tml-test", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(api: Api) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=api.base_url, api_key="tml-test", max_retries=0) as client:
        yield client


def prompt(api: Api) -> str:
    """What the engine was asked to go on with last."""
    tokens = SampleCall.from_bytes(api.engine.jobs[-1][1]).prompt_P.tolist()
    return Vocabulary(tiny_folder()).decode(tokens, specials=True)


def test_openais_client_gets_calls_whole_and_in_a_stream(api: Api, chats: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tools", "messages": ASKED, "tools": TOOLS}
    (choice,) = chats.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I add.")
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", ARGUMENTS)
    assert f"<|im_start|>system{json.dumps(TOOLS[0])}" in prompt(api)
    with chats.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", "I add.")
    (streamed,) = final.message.tool_calls or []
    assert json.loads(streamed.function.arguments) == ARGUMENTS
    results = [{"role": "tool", "tool_call_id": call.id, "content": "35"}]
    chats.chat.completions.create(**asked | {"messages": [*ASKED, choice.message, *results]})
    assert '<tool_call>{"name": "add", "arguments": {"a": 16, "b": "ü"}}</tool_call><|im_end|>' in prompt(api)
    assert "<|im_start|>tool\n35<|im_end|><|im_start|>assistant\n" in prompt(api)


def test_anthropics_client_gets_calls_whole_and_in_a_stream(api: Api, claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tools", "messages": ASKED, "tools": CLAUDE_TOOLS, "max_tokens": 900}
    message = claude.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    text, call = message.content
    assert text.type == "text" and call.type == "tool_use"
    assert (text.text, call.name, call.input) == ("I add.", "add", ARGUMENTS)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].type == "tool_use" and final.content[1].input == ARGUMENTS
    assert final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "35"}]}
    said = {"role": "assistant", "content": message.content}
    answered = {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]}
    claude.messages.create(**asked | {"messages": [*ASKED, said, answered]})
    assert "<|im_start|>tool\n35<|im_end|><|im_start|>user\nWell?<|im_end|>" in prompt(api)


def test_without_tools_what_looks_like_a_call_is_text(chats: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = chats.chat.completions.create(model="tools", messages=ASKED, **extra).choices
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", SAID, None)
    message = claude.messages.create(model="tools", messages=ASKED, max_tokens=900)
    assert [block.type for block in message.content] == ["text"]


def test_a_call_that_is_cut_off_is_text(chats: openai.OpenAI) -> None:
    (choice,) = chats.chat.completions.create(model="tools", messages=ASKED, tools=TOOLS, max_tokens=12).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    said = choice.message.content or ""
    assert SAID.startswith(said) and "<tool_call>" in said


@pytest.mark.parametrize(
    "wrong",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        {"parallel_tool_calls": False},
        {"tools": [{"type": "function", "function": {"name": "add", "strict": True}}]},
    ],
)
def test_what_cannot_be_forced_on_a_model_is_refused(chats: openai.OpenAI, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"tool_choice|parallel_tool_calls|strict"):
        chats.chat.completions.create(**{"model": "tools", "messages": ASKED, "tools": TOOLS} | wrong)
