"""Who is asking: an API key, or a token that stands for one, becomes a caller: an owner's name, a role and limits.

Keys come from the settings and from the database, which other processes change while the server runs. Its keys are read
all at once and at most once in `FRESH_SECONDS`, however many requests come with keys that nobody knows.
"""

import asyncio
import math
import time
from dataclasses import dataclass, replace

from starlette.requests import Request

from tinsmith.api.tokens import START, InvalidTokenError, Tokens
from tinsmith.config import Settings, is_loopback
from tinsmith.errors import UnauthorizedError
from tinsmith.store import keys
from tinsmith.store.database import Database
from tinsmith.store.keys import Key

LOCAL_OWNER = "local"
FRESH_SECONDS = 2.0  # for how long what was read of the keys is taken for true
_USE_SECONDS = 60.0  # how exactly a key's last use is noted


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. Limits that are None are not set."""

    owner: str
    is_admin: bool = False
    tokens_per_second: float | None = None
    max_models: int | None = None
    digest: str = ""  # of the key; empty where none is needed
    name: str = ""  # of the key
    until: float | None = None  # when the token ends that was shown instead of the key

    @property
    def has_key(self) -> bool:
        """Whether this is the holder of a key, and not everybody."""
        return bool(self.digest)


_LOCAL = Caller(LOCAL_OWNER)


class Access:
    """The keys of one server. Belongs to one event loop."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._open = settings.no_auth
        self._open_without_keys = is_loopback(settings.host)
        self._given = {
            digest: Caller(keys.owner_of(digest), digest=digest, name="--api-key")
            for digest in map(keys.digest_of, settings.api_keys)
        }
        self.tokens = Tokens(database, 60 * settings.token_minutes)
        self._stored: dict[str, Key] = {}
        self._read_at = -math.inf
        self._reading: asyncio.Task[None] | None = None
        self._noted: dict[str, float] = {}  # when the last use of a stored key was written

    async def caller(self, request: Request) -> Caller:
        """The holder of the key or token that the request carries, as X-API-Key or Authorization: Bearer.

        A server that was told so, or has never had a key and is reachable from its own machine only, takes any key or
        none. Raises UnauthorizedError.
        """
        if self._open or not await self._needs_keys():
            return _LOCAL  # whatever key was sent
        return await self.holder(_secret(request))

    async def holder(self, secret: str) -> Caller:
        """Whose key, or token, it is. Raises UnauthorizedError."""
        if self._open or not await self._needs_keys():
            return _LOCAL
        stored = await self._current()
        digest = keys.digest_of(secret)
        # Timing tells nothing here: who tries keys does not choose their digests.
        if digest in self._given or digest in stored or not secret.startswith(START):
            return await self._key_holder(digest, stored)
        token = await self.tokens.read(secret)
        try:
            return replace(await self._key_holder(token.digest, stored), until=token.expires_at)
        except UnauthorizedError as error:
            raise InvalidTokenError(f"the token's key is not good any more: {error}") from None

    async def _needs_keys(self) -> bool:
        return bool(not self._open_without_keys or self._given or await self._current())

    async def _key_holder(self, digest: str, stored: dict[str, Key]) -> Caller:
        if caller := self._given.get(digest):
            return caller
        if (key := stored.get(digest)) is None:
            raise UnauthorizedError("this server does not know the API key")
        now = time.time()
        if (state := key.state(now)) != "active":
            raise UnauthorizedError(f"API key {key.prefix}… ({key.name}) is {state}; ask for a new one")
        await self._note_use(key, now)
        is_admin = key.role == keys.ADMIN
        return Caller(key.owner, is_admin, key.tokens_per_second, key.max_models, digest, key.name)

    async def _current(self) -> dict[str, Key]:
        """The stored keys by digest; requests that find them old wait for the same look at the database."""
        if time.monotonic() - self._read_at >= FRESH_SECONDS:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
            await asyncio.shield(self._reading)  # one waiting client that goes away ends it for none of the others
        return self._stored

    async def _read(self) -> None:
        began = time.monotonic()
        self._stored = {key.digest: key for key in await self._database.read_async(keys.list_keys)}
        self._read_at = began

    async def _note_use(self, key: Key, now: float) -> None:
        if now - max(key.used_at or 0.0, self._noted.get(key.digest, 0.0)) > _USE_SECONDS:
            self._noted[key.digest] = now
            await self._database.write_async(keys.touch_key, key.digest, now)


def _secret(request: Request) -> str:
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    key = request.headers.get("x-api-key") or (credentials.strip() if scheme.lower() == "bearer" else "")
    if not key:
        raise UnauthorizedError("no API key; send it as X-API-Key (TINKER_API_KEY) or as Authorization: Bearer")
    return key
