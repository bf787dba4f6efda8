"""Request bodies, off the wire and bounded: streamed, decompressed, decoded from JSON. Knows no route."""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

import msgspec
from starlette.requests import Request

from tinsmith.errors import TooLargeError, UserError
from tinsmith.wire.codec import decompress

SMALL_BODY = 2**20  # bytes, of every request that carries no tokens
THREAD_BYTES = 2**18  # larger bodies are decoded and encoded beside the event loop

_PLACE = re.compile(r" - at `\$((?:\.\w+|\[\d+\])+)`$")  # as msgspec ends its messages
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_THREADS = ThreadPoolExecutor(2, "tinsmith-bodies")  # more would only keep the event loop from the interpreter

Body = TypeVar("Body")
Asked = ParamSpec("Asked")
Made = TypeVar("Made")


class OverlongBodyError(TooLargeError):
    """The body is larger than the server takes; `beginning` is what was read of it."""

    def __init__(self, limit: int, beginning: bytes) -> None:
        super().__init__(f"the body is larger than {limit} bytes, the most that this server takes here")
        self.beginning = beginning


async def compute(size: int, function: Callable[Asked, Made], *args: Asked.args, **kwargs: Asked.kwargs) -> Made:
    """Calls a function that works on so many bytes: beside the event loop if they are many."""
    if size > THREAD_BYTES:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, partial(function, *args, **kwargs))
    return function(*args, **kwargs)


async def read_raw(request: Request, limit: int) -> bytes:
    """The body as sent. Raises OverlongBodyError beyond `limit` bytes.

    Somewhat more is still taken and thrown away: a client hears of an error only once it has sent its body.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part[: max(limit - size, 0)])
        size += len(part)
        if size > 2 * limit:
            break
    if size > limit:
        raise OverlongBodyError(limit, b"".join(parts))
    return b"".join(parts)


def plain(request: Request, raw: bytes, limit: int) -> bytes:
    """The body's content, at most `limit` bytes of it, by its Content-Encoding. Raises TooLargeError, UserError."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return raw
    if encoding != "zstd":
        raise UserError(f"Content-Encoding {encoding!r} is not taken; use zstd, or none")
    return decompress(raw, limit)


def decode_json(content: bytes, kind: type[Body]) -> Body:
    """The body as a `kind`. Raises UserError that names the field and what it may be."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"the request is not valid: {_explain(str(error), content)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from error


def _explain(message: str, content: bytes) -> str:
    """msgspec's message says where something is and what may be there; added is what was there."""
    place = _PLACE.search(message)
    if "got `null`" in message and "`float`" in message:
        return f"{message} (clients send NaN and infinity as null)"
    if place is None or ", got " in message or len(content) > SMALL_BODY:
        return message
    try:
        value = _follow(msgspec.json.decode(content), place[1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # behind the place that was reached
        return message
    if " of length " in message and isinstance(value, str | list | dict):
        value = len(value)
    found = f", got {value}" if isinstance(value, int | float) else ""
    return f"{message[: place.start()]}{found}{place[0]}"


def _follow(value: Any, place: str) -> Any:
    """What stands at a place such as `.sampling_params.stop[3]`; None if a name occurs twice and leads elsewhere."""
    for name, index in _STEP.findall(place):
        if name and isinstance(value, dict):
            value = value.get(name)
        elif index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            return None
    return value
