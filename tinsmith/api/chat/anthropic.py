"""Anthropic's routes: messages, messages/count_tokens and models."""

import logging
from collections.abc import AsyncGenerator
from datetime import UTC, datetime

from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.chat import anthropic_types as types
from tinsmith.api.chat.anthropic_answers import Events, MessageWriter, message_of, usage_of
from tinsmith.api.chat.conversations import anthropic_tools, of_anthropic
from tinsmith.api.chat.errors import ANTHROPIC, error_body
from tinsmith.api.chat.events import EventStream, event
from tinsmith.api.chat.generation import Ask, Reading
from tinsmith.api.chat.parts import Chat, Subject, chat_prompt, read_body, subject_of
from tinsmith.api.chat.targets import Named, list_named, resolve
from tinsmith.api.chat.transcripts import Transcript
from tinsmith.api.chat.unsupported import refuse_unsupported
from tinsmith.errors import TinsmithError
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress

log = logging.getLogger(__name__)


async def messages(chat: Chat, call: Call) -> Response:
    """POST /messages."""
    body = await read_body(call, types.MessagesRequest)
    subject = await subject_of(call, chat, body.model)
    prompt = await _prompt(subject, body)
    ask = Ask(
        prompt,
        max_tokens=body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=-1 if body.top_k is None else body.top_k,
        top_p=1.0 if body.top_p is None else body.top_p,
        stops=tuple(body.stop_sequences or ()),
    )
    transcript = Transcript(subject.vocabulary, ask.stops, tools=anthropic_tools(body) is not None)
    if body.stream:
        reading = await chat.generation.read(call, subject.target, ask)
        return EventStream(_events(reading, transcript, MessageWriter(body.model, len(prompt)), len(prompt)))
    output = await chat.generation.sample(call, subject.target, ask)
    pieces = transcript.feed(output.tokens_S.tolist())
    rest, ending = transcript.end(stopped=bool(output.stopped[0]))
    return answer(message_of(body.model, pieces + rest, ending, usage_of(len(prompt), output)))


async def count_tokens(chat: Chat, call: Call) -> Response:
    """POST /messages/count_tokens."""
    body = await read_body(call, types.CountRequest)
    subject = await subject_of(call, chat, body.model)
    return answer(types.TokenCount(len(await _prompt(subject, body))))


async def list_models(chat: Chat, call: Call) -> Response:
    """GET /models."""
    models = [_model(one) for one in await list_named(call, chat.began_at)]
    return answer(types.ModelList(models, models[0].id, models[-1].id))


async def get_model(chat: Chat, call: Call) -> Response:
    """GET /models/{model}."""
    name = call.path("model")
    target = await resolve(call, name)
    return answer(_model(Named(name, chat.began_at, call.services.catalog.capabilities(target.base).max_context)))


def _model(named: Named) -> types.Model:
    created = datetime.fromtimestamp(int(named.created_at), UTC).isoformat()
    return types.Model(named.name, named.name, created, named.context)


async def _prompt(subject: Subject, body: types.Conversation) -> list[int]:
    """A conversation that ends with the assistant's words goes on from there."""
    refuse_unsupported(body)
    said = of_anthropic(body.system, body.messages)
    return await chat_prompt(subject, said, anthropic_tools(body), continues=body.messages[-1].role == "assistant")


async def _events(
    reading: Reading, transcript: Transcript, writer: MessageWriter, prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    try:
        for each in writer.opening():
            yield _encoded(each)
        async for part in reading:
            for each in _told(part, transcript, writer, prompt_tokens):
                yield _encoded(each)
    except TinsmithError as error:
        yield event(error_body(ANTHROPIC, error.status, str(error)), "error")
    except Exception:  # nobody else could tell the client
        log.exception("a stream broke")
        yield event(error_body(ANTHROPIC, 500, "the server failed on this request; its log says why"), "error")
    finally:
        await reading.aclose()


def _told(
    part: Progress | SampleOutput | None, transcript: Transcript, writer: MessageWriter, prompt_tokens: int
) -> Events:
    if part is None:
        return [types.Ping()]
    if isinstance(part, Progress):
        return writer.news(transcript.feed(part.tokens))
    pieces, ending = transcript.end(stopped=bool(part.stopped[0]))
    return writer.closing(pieces, ending, usage_of(prompt_tokens, part))


def _encoded(told: types.Event) -> bytes:
    return event(told, str(told.__struct_config__.tag))
