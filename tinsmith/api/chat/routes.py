"""The routes for OpenAI's and Anthropic's clients: /oai/api/v1, /anthropic/api/v1, and both together under /v1."""

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.responses import Response

from tinsmith.api.calls import Call, Handler
from tinsmith.api.chat import anthropic, openai
from tinsmith.api.chat.errors import ANTHROPIC, dialect_of
from tinsmith.api.chat.parts import Chat

OPENAI_PREFIX, ANTHROPIC_PREFIX, PREFIX = "/oai/api/v1", "/anthropic/api/v1", "/v1"
ChatHandler = Callable[[Chat, Call], Awaitable[Response]]


async def _list_models(chat: Chat, call: Call) -> Response:
    """GET /v1/models, in the form that the client's headers ask for."""
    list_models = anthropic.list_models if dialect_of(call.request) == ANTHROPIC else openai.list_models
    return await list_models(chat, call)


async def _get_model(chat: Chat, call: Call) -> Response:
    """GET /v1/models/{model}, likewise."""
    get_model = anthropic.get_model if dialect_of(call.request) == ANTHROPIC else openai.get_model
    return await get_model(chat, call)


_CHATS: tuple[tuple[str, str, ChatHandler], ...] = (
    ("POST", "/chat/completions", openai.chat_completions),
    ("POST", "/completions", openai.completions),
)
_MESSAGES: tuple[tuple[str, str, ChatHandler], ...] = (
    ("POST", "/messages", anthropic.messages),
    ("POST", "/messages/count_tokens", anthropic.count_tokens),
)
_OPENAI_MODELS, _ANTHROPIC_MODELS = (
    (("GET", "/models", dialect.list_models), ("GET", "/models/{model:path}", dialect.get_model))
    for dialect in (openai, anthropic)
)
_MODELS = (("GET", "/models", _list_models), ("GET", "/models/{model:path}", _get_model))


def chat_routes(chat: Chat) -> list[tuple[str, str, Handler]]:
    """(method, path, handler) of each."""
    of_prefix = {
        OPENAI_PREFIX: (*_CHATS, *_OPENAI_MODELS),
        ANTHROPIC_PREFIX: (*_MESSAGES, *_ANTHROPIC_MODELS),
        PREFIX: (*_CHATS, *_MESSAGES, *_MODELS),
    }
    return [
        (method, prefix + path, partial(handler, chat))
        for prefix, routes in of_prefix.items()
        for method, path, handler in routes
    ]
