"""Tokens: JWTs that stand for an API key for a while, so that the key itself travels rarely.

A token names the key's digest and is signed with a secret of the server's, kept in the database: every process knows
it, and tokens outlive restarts. Whether the key is still good is looked up with every request, not here.
"""

import time
from dataclasses import dataclass
from typing import Any

import jwt

from tinsmith.errors import UnauthorizedError
from tinsmith.store.database import Database
from tinsmith.store.server_secrets import require_secret

ORGANIZATION = "tinsmith"
START = "eyJ"  # of every JWT
_ALGORITHM = "HS256"
_REMEMBERED = 4096  # tokens whose signatures were checked


class InvalidTokenError(UnauthorizedError):
    """The token is expired, forged, or its key is gone; whoever has the key can get a new one."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a valid token says: the digest of the key it stands for (empty: a server without keys), and its end."""

    digest: str
    expires_at: float


class Tokens:
    """Issues and reads the tokens of one server. Belongs to one event loop."""

    def __init__(self, database: Database, lifetime: float) -> None:
        """`lifetime` in seconds; 0 issues none."""
        self._database = database
        self.lifetime = lifetime
        self._secret: bytes | None = None
        self._read: dict[str, Token] = {}

    async def issue(self, owner: str, digest: str, name: str, until: float | None = None) -> str:
        """A token for the key with this digest; it ends with the token that it was asked for with, if any (`until`)."""
        now = time.time()
        expires = now + self.lifetime if until is None else min(now + self.lifetime, until)
        claims = {
            "iss": ORGANIZATION,
            "org_id": ORGANIZATION,
            "sub": owner,
            "name": name,
            "key": digest,
            "iat": int(now),
            "exp": int(expires),
        }
        return jwt.encode(claims, await self._key(), _ALGORITHM)

    async def read(self, text: str) -> Token:
        """Raises InvalidTokenError for anything but a token of this server's that has not expired."""
        token = self._read.get(text)
        if token is None:
            token = self._verified(text, await self._key())
            if len(self._read) >= _REMEMBERED:
                self._read.clear()
            self._read[text] = token
        if token.expires_at <= time.time():
            raise InvalidTokenError("the token has expired; get a new one from /auth/token with the API key")
        return token

    def _verified(self, text: str, key: bytes) -> Token:
        try:
            claims: dict[str, Any] = jwt.decode(
                text, key, [_ALGORITHM], options={"require": ["exp", "key"], "verify_iat": False}, issuer=ORGANIZATION
            )
        except jwt.ExpiredSignatureError:
            raise InvalidTokenError("the token has expired; get a new one from /auth/token with the API key") from None
        except jwt.PyJWTError as error:
            raise InvalidTokenError(f"this server did not issue the token ({error})") from None
        return Token(str(claims["key"]), float(claims["exp"]))

    async def _key(self) -> bytes:
        if self._secret is None:
            self._secret = await self._database.write_async(require_secret, "tokens")
        return self._secret
