"""What every route is given: the shared parts of the process, and one authenticated call."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.api.auth import owner_of
from tinsmith.api.bodies import SMALL_BODY, decode_json, plain, read_raw
from tinsmith.api.catalog import Catalog
from tinsmith.api.waiting import Waiters
from tinsmith.config import Settings
from tinsmith.errors import NotFoundError, UserError
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.wire.codec import Limits

Body = TypeVar("Body")


@dataclass(frozen=True, slots=True)
class Services:
    """The parts that all routes of one process share."""

    settings: Settings
    database: Database
    doorbell: Doorbell
    catalog: Catalog
    waiters: Waiters

    def limits(self) -> Limits:
        """Bounds for requests with tokens. Raises UnavailableError until the engine has said what it takes."""
        capabilities = self.catalog.capabilities()
        return Limits(capabilities.vocab_size, capabilities.max_context, self.settings.max_body_bytes)


@dataclass(frozen=True, slots=True)
class Call:
    """One request of one owner."""

    services: Services
    request: Request
    owner: str

    async def content(self, limit: int) -> bytes:
        """The body, decompressed. Raises TooLargeError beyond `limit` bytes, UserError."""
        return plain(self.request, await read_raw(self.request, limit), limit)

    async def json(self, kind: type[Body], limit: int = SMALL_BODY) -> Body:
        """The body as a `kind` of wire.types. Raises UserError, TooLargeError."""
        return decode_json(await self.content(limit), kind)

    def path(self, name: str) -> str:
        """A part of the URL's path. Raises NotFoundError for what no stored id can be."""
        value: str = self.request.path_params[name]
        if not value.isprintable():
            raise NotFoundError(f"there is nothing called {value!r}")
        return value

    def page(self, default: int = 20, most: int = 1000) -> tuple[int, int]:
        """`limit` and `offset` of the query. Raises UserError."""
        return self._number("limit", default, 1, most), self._number("offset", 0, 0, 2**31 - 1)

    def _number(self, name: str, default: int, low: int, high: int) -> int:
        text = self.request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
            raise UserError(f"query parameter {name!r} is {text!r}; allowed: {low} to {high}")
        return int(text)


Handler = Callable[[Call], Awaitable[Response]]


def endpoint(services: Services, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """`handler` as Starlette calls it, behind authentication."""

    async def authenticated(request: Request) -> Response:
        return await handler(Call(services, request, owner_of(request, services.settings)))

    return authenticated


def answer(body: msgspec.Struct | dict[str, Any], status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
