"""Chat templates: a model's own Jinja source makes one prompt text of a conversation.

The environment is the one that such templates are written for: sandboxed and immutable, block trimming, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that escapes nothing, and `generation` blocks (which only mark text).
Knows no tokens and no HTTP.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinsmith.errors import UserError

Message = dict[str, Any]
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


class _GenerationBlocks(Extension):
    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One model's template. `texts` are its special tokens by their names (bos_token, eos_token, …)."""

    def __init__(self, source: str, texts: Mapping[str, str]) -> None:
        """Raises UserError for a source that is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of this model cannot be used: {error}") from error
        self._texts = dict(texts)
        self.takes_tools = "tools" in source
        # The form that Hermes and Qwen models write calls in; others (XML parameters, Python) are not parsed here.
        self.writes_tool_calls = self.takes_tools and "<tool_call>" in source and "<function=" not in source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        continues: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, up to where the model's answer begins.

        If the conversation `continues`, its last message is the beginning of that answer. `options` are further
        variables of the template. Raises UserError for a conversation that the template does not take.
        """
        reserved = sorted({*_GIVEN, *self._texts}.intersection(options or {}))
        if reserved:
            raise UserError(f"chat_template_kwargs sets {', '.join(reserved)}, which belong to the server")
        try:
            text = self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=not continues,
                **{**self._texts, **(options or {})},
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise UserError(f"the chat template of this model does not take this conversation: {error}") from error
        return _up_to(text, messages[-1]["content"].rstrip()) if continues else text


def _up_to(text: str, beginning: str) -> str:
    """The text without what the template puts behind the last message."""
    place = text.rfind(beginning)
    if not beginning or place < 0:
        raise UserError("the last message is the assistant's and empty (or changed by the template); leave it out")
    return text[: place + len(beginning)]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
