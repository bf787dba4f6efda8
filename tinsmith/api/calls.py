"""What every route is given: the shared parts of the process, and one authenticated call.

Who may do what is decided here: a handler uses and changes objects as `Call.owner` and looks at them as `Call.viewer`;
the store finds nothing that does not belong to whom it is given.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from tinsmith.api.auth import Access, Caller
from tinsmith.api.backlog import Backlog
from tinsmith.api.bodies import SMALL_BODY, decode_json, plain, read_raw
from tinsmith.api.catalog import Catalog
from tinsmith.api.observation import new_registry, trace_of
from tinsmith.api.pacing import Pacing
from tinsmith.api.presence import Presence
from tinsmith.api.turns import Turns
from tinsmith.api.waiting import Waiters
from tinsmith.config import Settings
from tinsmith.errors import NotFoundError, UserError
from tinsmith.observe import REQUESTS, note
from tinsmith.store import records
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell
from tinsmith.wire.codec import Limits

Body = TypeVar("Body")

_BASES = 65536  # known at once


@dataclass(frozen=True, slots=True)
class Services:
    """The parts that all routes of one process share."""

    settings: Settings
    database: Database
    doorbell: Doorbell
    catalog: Catalog
    waiters: Waiters
    access: Access
    pacing: Pacing
    backlog: Backlog
    presence: Presence
    turns: Turns

    bases: dict[tuple[str, str], str] = field(default_factory=dict)  # (model or sampler, owner) → base, as it was found
    arriving: set[str] = field(default_factory=set)  # addresses to which a file is being uploaded
    registry: CollectorRegistry = field(default_factory=new_registry)

    def limits(self, base: str) -> Limits:
        """Bounds for requests with tokens. Raises UnavailableError until the engine has said what it takes."""
        capabilities = self.catalog.capabilities(base)
        return Limits(capabilities.vocab_size, capabilities.max_context, self.settings.max_body_bytes)

    async def base_of(self, subject: str, owner: str) -> str:
        """The base of an owner's model or sampler, before anything else is looked up; it never changes.

        Raises NotFoundError, but not in a server of a single model, which is then meant.
        """
        if len(self.catalog.served) == 1:
            return self.catalog.served[0].base
        base = self.bases.get((subject, owner))
        if base is None:
            base = await self.database.read_async(records.base_of, subject, owner)
            if len(self.bases) >= _BASES:
                self.bases.clear()
            self.bases[subject, owner] = base
        return self.catalog.find_base(base, repr(subject)).base


@dataclass(frozen=True, slots=True)
class Call:
    """One request of one caller."""

    services: Services
    request: Request
    caller: Caller

    @property
    def owner(self) -> str:
        """To whom everything belongs that the call makes, uses or changes."""
        return self.caller.owner

    @property
    def trace(self) -> str:
        """The id that log lines about the request, and about its job, name."""
        return trace_of(self.request)

    def accepted(self, request_id: str) -> None:
        """Notes that the request has become a job."""
        path = self.request.url.path
        note(REQUESTS, logging.INFO, "accepted", trace=self.trace, request=request_id, path=path, owner=self.owner)

    @property
    def viewer(self) -> str:
        """Whose objects the call may list and describe: an admin's call, everybody's. For nothing else."""
        return records.EVERYBODY if self.caller.is_admin else self.caller.owner

    async def reader(self, token: str | None) -> str:
        """As whom checkpoints may be read: the caller, or who has the given key or token. Raises UnauthorizedError."""
        return self.owner if token is None else (await self.services.access.holder(token)).owner

    async def admit(self, subject: str, seq: int, size: int, tokens: int = 0, *, ordered: bool = True) -> None:
        """Counts a request of `size` bytes against what may be under way, and its tokens against its caller's rate.

        `ordered` says that the subject's later requests wait for it. Raises BusyError, LimitError.
        """
        await self.services.backlog.admit(self.owner, subject, seq, size, ordered=ordered)
        if tokens:  # a debt is no reason to hold up what costs nothing
            self.services.pacing.spend(self.owner, tokens, self.caller.tokens_per_second)

    async def content(self, limit: int) -> bytes:
        """The body, decompressed. Raises TooLargeError beyond `limit` bytes, UserError."""
        return plain(self.request, await read_raw(self.request, limit), limit)

    async def json(self, kind: type[Body], limit: int = SMALL_BODY) -> Body:
        """The body as a `kind` of `wire.types.Request`. Raises UserError, TooLargeError."""
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
    """`handler` as Starlette calls it, behind authentication.

    What it has written outlives a power cut when the client gets the answer; the engine may begin on it before.
    """

    async def authenticated(request: Request) -> Response:
        try:
            return await handler(Call(services, request, await services.access.caller(request)))
        finally:
            await services.database.settle()

    return authenticated


def answer(body: msgspec.Struct | dict[str, Any], status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
