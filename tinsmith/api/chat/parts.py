"""What all handlers of this folder share: tokenizers, generation, the prompt that a conversation becomes."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from tinsmith.api.bodies import SMALL_BODY
from tinsmith.api.calls import Call
from tinsmith.api.chat.conversations import check_tools
from tinsmith.api.chat.generation import Generation
from tinsmith.api.chat.streams import TokenStreams
from tinsmith.api.chat.targets import Target, Vocabularies, resolve
from tinsmith.api.chat.templates import Message
from tinsmith.api.chat.transcripts import ToolCall
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.errors import UserError

Body = TypeVar("Body")

_CHARACTERS = 64  # of a body for each token of the context; what is longer cannot fit anyhow


@dataclass(frozen=True, slots=True)
class Chat:
    """The parts of one API process that only these routes need."""

    streams: TokenStreams
    generation: Generation
    vocabularies: Vocabularies = field(default_factory=Vocabularies)
    began_at: float = field(default_factory=time.time)

    @classmethod
    def over(cls, streams: TokenStreams) -> "Chat":
        return cls(streams, Generation(streams))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request is about: weights, and the words of their base model."""

    target: Target
    vocabulary: Vocabulary
    max_context: int


async def read_body(call: Call, kind: type[Body]) -> Body:
    """Raises UserError, TooLargeError."""
    longest = max(call.services.catalog.contexts().values())
    return await call.json(kind, min(SMALL_BODY + _CHARACTERS * longest, call.services.settings.max_body_bytes))


async def subject_of(call: Call, chat: Chat, model: str) -> Subject:
    """Raises NotFoundError, UserError, UnavailableError."""
    target = await resolve(call, model)
    vocabulary = await chat.vocabularies.find(call, target.base)
    return Subject(target, vocabulary, call.services.catalog.capabilities(target.base).max_context)


async def chat_prompt(
    subject: Subject,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    *,
    continues: bool = False,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """The conversation's tokens, up to where the answer begins. Raises UserError."""

    def tokens() -> list[int]:
        template = subject.vocabulary.template
        if tools is not None:
            check_tools(template)
        return _tokens(subject, template.render(messages, tools=tools, continues=continues, options=options))

    return await run_in_threadpool(tokens)  # long conversations are not to hold up everybody else


async def tokens_of(subject: Subject, text: str) -> list[int]:
    """The tokens of a text by itself. Raises UserError."""
    return await run_in_threadpool(_tokens, subject, text, specials=True)


def _tokens(subject: Subject, text: str, *, specials: bool = False) -> list[int]:
    """Raises UserError for a text that cannot fit, without looking at all of it."""
    if len(text) > subject.max_context * subject.vocabulary.longest_token:
        raise UserError(f"the prompt has {len(text)} characters, more than {subject.max_context} tokens can have")
    return subject.vocabulary.encode(text, specials=specials)


def new_id(kind: str) -> str:
    """`chatcmpl-…`, `msg_…` and the like; they name an answer and lead to nothing."""
    return f"{kind}{secrets.token_hex(12)}"


def arguments_text(call: ToolCall) -> str:
    """A call's arguments as the JSON that clients parse."""
    return json.dumps(call.arguments, ensure_ascii=False)
