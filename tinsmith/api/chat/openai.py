"""OpenAI's routes: chat/completions, completions and models."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from itertools import count

from msgspec import Struct
from starlette.responses import Response

from tinsmith.api.bodies import compute
from tinsmith.api.calls import Call, answer
from tinsmith.api.chat import openai_types as types
from tinsmith.api.chat.continuations import samples_of
from tinsmith.api.chat.conversations import of_openai, openai_tools
from tinsmith.api.chat.echoes import Echo, joined, without_samples
from tinsmith.api.chat.errors import OPENAI, error_body
from tinsmith.api.chat.events import WAITING, EventStream, event
from tinsmith.api.chat.generation import Ask, Reading
from tinsmith.api.chat.openai_answers import ChatWriter, TextWriter, Writer, usage_of
from tinsmith.api.chat.parts import Chat, Subject, chat_prompt, read_body, subject_of, tokens_of
from tinsmith.api.chat.targets import list_named, resolve
from tinsmith.api.chat.transcripts import Transcript
from tinsmith.api.chat.unsupported import refuse_unsupported
from tinsmith.errors import TinsmithError, UserError
from tinsmith.wire.packing import SampleOutput
from tinsmith.wire.progress import Progress

_COMPLETION_TOKENS = 16  # the dialect's default for completions; chats go on to the context's end
_MOST_PROMPTS = 128
_MOST_ECHOED = 2**20  # tokens of prompts in one answer, and the likeliest in their places
_TOKEN_BYTES = 100  # of an answer, roughly
_DONE = b"data: [DONE]\n\n"

log = logging.getLogger(__name__)


async def chat_completions(chat: Chat, call: Call) -> Response:
    """POST /chat/completions."""
    body = await read_body(call, types.ChatRequest)
    refuse_unsupported(body)
    if body.top_logprobs and not body.logprobs:
        raise UserError(f"top_logprobs is {body.top_logprobs}, but logprobs is not true")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise UserError("max_tokens and max_completion_tokens differ; give one of them")
    tools = openai_tools(body)
    subject = await subject_of(call, chat, body.model)
    prompt = await chat_prompt(subject, of_openai(body.messages), tools, options=body.chat_template_kwargs)
    longest = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    ask = _ask(body, prompt, longest, body.top_logprobs or 0)
    writer = ChatWriter(body.model, subject.vocabulary, logprobs=bool(body.logprobs))

    def transcript(ask: Ask) -> Transcript:
        return Transcript(subject.vocabulary, ask.stops, tools=tools is not None)

    return await _answer(chat, call, body, subject, [ask], writer, transcript)


async def completions(chat: Chat, call: Call) -> Response:
    """POST /completions."""
    body = await read_body(call, types.CompletionRequest)
    refuse_unsupported(body)
    if body.max_tokens == 0 and not body.echo:
        raise UserError("max_tokens is 0, which needs echo; without it, 1 or more are allowed")
    if body.echo and body.stream:
        raise UserError("echo and stream are both true; leave out one of them")
    subject = await subject_of(call, chat, body.model)
    prompts = await _prompts(subject, body.prompt)
    longest = _COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    asks = [_ask(body, prompt.tokens, longest, body.logprobs or 0) for prompt in prompts]
    logprobs = body.logprobs is not None

    def transcript(ask: Ask) -> Transcript:
        return Transcript(subject.vocabulary, ask.stops, after=ask.prompt)

    if not body.echo:
        writer = TextWriter(body.model, subject.vocabulary, logprobs=logprobs)
        return await _answer(chat, call, body, subject, asks, writer, transcript)
    _check_echoed(asks)
    fronts = [front for echo in prompts for front in [echo.front(subject.vocabulary)] * asks[0].samples]
    writer = TextWriter(body.model, subject.vocabulary, logprobs=logprobs, fronts=fronts)
    asks = [replace(ask, scores_prompt=logprobs) for ask in asks]
    outputs = await _sample_all(chat, call, subject, asks)
    if body.max_tokens == 0:  # what a prompt's scores cost is one token
        outputs = [without_samples(output) for output in outputs]
    return await _written(subject, asks, outputs, writer, transcript, prompts)


async def list_models(chat: Chat, call: Call) -> Response:
    """GET /models."""
    named = await list_named(call, chat.began_at)
    return answer(types.ModelList([types.Model(one.name, int(one.created_at), one.context) for one in named]))


async def get_model(chat: Chat, call: Call) -> Response:
    """GET /models/{model}."""
    name = call.path("model")
    target = await resolve(call, name)
    context = call.services.catalog.capabilities(target.base).max_context
    return answer(types.Model(name, int(chat.began_at), context))


def _ask(body: types.Generating, prompt: list[int], max_tokens: int | None, top: int) -> Ask:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Ask(
        prompt,
        samples=1 if body.n is None else body.n,
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=-1 if body.top_k is None else body.top_k,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stops=stops,
        top_logprobs=top,
    )


def _check_echoed(asks: Sequence[Ask]) -> None:
    """Raises UserError for prompts of which an answer cannot hold as much as is asked for."""
    echoed = sum(len(ask.prompt) * ask.samples * (1 + ask.top_logprobs) for ask in asks)
    if echoed > _MOST_ECHOED:
        raise UserError(
            f"the echoes would have {echoed} tokens, counting the likeliest in their places, and {_MOST_ECHOED} are "
            "allowed in an answer; ask for fewer prompts at once, a smaller n, or a smaller logprobs"
        )


async def _prompts(subject: Subject, given: str | Sequence[str | int | list[int]]) -> list[Echo]:
    """Each prompt. Raises UserError for a list that mixes kinds, or has none or too many."""
    if isinstance(given, str):
        return [Echo(given, await tokens_of(subject, given))]
    tokens = [entry for entry in given if isinstance(entry, int)]
    if tokens and len(tokens) == len(given):
        return [Echo(None, tokens)]
    if tokens or not 0 < len(given) <= _MOST_PROMPTS:
        raise UserError(f"prompt must be a text, one prompt's token ids, or a list of 1 to {_MOST_PROMPTS} of either")
    texts = {entry: Echo(entry, await tokens_of(subject, entry)) for entry in given if isinstance(entry, str)}
    lists = [entry for entry in given if not isinstance(entry, int)]
    return [texts[entry] if isinstance(entry, str) else Echo(None, entry) for entry in lists]


async def _answer(
    chat: Chat,
    call: Call,
    body: types.Generating,
    subject: Subject,
    asks: Sequence[Ask],
    writer: Writer,
    transcript: Callable[[Ask], Transcript],
) -> Response:
    """Samples all prompts, and writes what they say, as a `transcript` of each sample reads it."""
    if not body.stream:
        outputs = await _sample_all(chat, call, subject, asks)
        return await _written(subject, asks, outputs, writer, transcript)
    if len(asks) > 1:
        raise UserError(f"stream is true, but prompt holds {len(asks)} prompts; ask for them one by one, or without it")
    reading = await chat.generation.read(call, subject.target, asks[0])
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    transcripts = [transcript(asks[0]) for _ in range(asks[0].samples)]
    return EventStream(_events(reading, transcripts, writer, len(asks[0].prompt) if with_usage else None))


async def _written(
    subject: Subject,
    asks: Sequence[Ask],
    outputs: Sequence[SampleOutput],
    writer: Writer,
    transcript: Callable[[Ask], Transcript],
    echoes: Sequence[Echo] = (),
) -> Response:
    """What all prompts' samples say, each behind its prompt if there are `echoes`."""
    repeated = sum(len(echo.tokens) for echo in echoes) * asks[0].samples
    tokens = repeated + sum(len(output.tokens_S) for output in outputs)
    size = tokens * (1 + asks[0].top_logprobs) * _TOKEN_BYTES
    echo_of: Sequence[Echo | None] = echoes or [None] * len(asks)

    def whole() -> Response:
        places = count()
        for ask, output, echo in zip(asks, outputs, echo_of, strict=True):
            beginning = [] if echo is None else [echo.read(subject.vocabulary)]
            prompt = None if echo is None else echo.scored(output)
            for sample, stopped in zip(samples_of("", output), output.stopped, strict=True):
                reader = transcript(ask)
                said = reader.feed(sample.tokens)
                rest, ending = reader.end(stopped=bool(stopped))
                scored = sample if prompt is None else joined(prompt, sample)
                writer.add(next(places), scored, [*beginning, *said, *rest], ending)
        return answer(writer.whole(usage_of(sum(len(ask.prompt) for ask in asks), outputs)))

    return await compute(size, whole)


async def _sample_all(chat: Chat, call: Call, subject: Subject, asks: Sequence[Ask]) -> list[SampleOutput]:
    """The results of all prompts; if one fails, the others are given up."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(chat.generation.sample(call, subject.target, ask)) for ask in asks]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _events(
    reading: Reading, transcripts: Sequence[Transcript], writer: Writer, counted: int | None
) -> AsyncGenerator[bytes, None]:
    """A stream's events. `counted` is the length of the prompt if the client wants to know what the request counts."""
    try:
        for index in range(len(transcripts)):
            for chunk in writer.opening(index):
                yield event(chunk)
        async for part in reading:
            for chunk in _chunks(part, transcripts, writer):
                yield event(chunk)
            if part is None:
                yield WAITING
            elif isinstance(part, SampleOutput) and counted is not None:
                yield event(writer.usage(usage_of(counted, [part])))
        yield _DONE
    except TinsmithError as error:
        yield event(error_body(OPENAI, error.status, str(error)))
    except Exception:  # nobody else could tell the client
        log.exception("a stream broke")
        yield event(error_body(OPENAI, 500, "the server failed on this request; its log says why"))
    finally:
        await reading.aclose()


def _chunks(part: Progress | SampleOutput | None, transcripts: Sequence[Transcript], writer: Writer) -> list[Struct]:
    if isinstance(part, Progress):
        return writer.news(part.index, part, transcripts[part.index].feed(part.tokens))
    if part is None:
        return []
    chunks: list[Struct] = []
    for index, transcript in enumerate(transcripts):
        pieces, ending = transcript.end(stopped=bool(part.stopped[index]))
        chunks += writer.closing(index, pieces, ending)
    return chunks
