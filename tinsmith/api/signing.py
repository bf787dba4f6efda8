"""Signed parts of addresses: whoever has one may do what it stands for, without a key. Knows no route.

All API processes over one data folder sign with the same secret, which the first one to need it makes.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from itsdangerous import BadSignature, URLSafeSerializer

from tinsmith.errors import NotFoundError


def sign(data_dir: Path, purpose: str, value: Any) -> str:
    """A token for a JSON value, good for one purpose only."""
    token: str = _serializer(data_dir, purpose).dumps(value)
    return token


def read_token(data_dir: Path, purpose: str, token: str) -> Any:
    """The value of a token. Raises NotFoundError if it was not signed here, for this purpose."""
    try:
        return _serializer(data_dir, purpose).loads(token)
    except BadSignature:
        raise NotFoundError("there is no such file") from None


def _serializer(data_dir: Path, purpose: str) -> URLSafeSerializer:
    return URLSafeSerializer(_secret(data_dir / "download.key"), salt=purpose)


def _secret(file: Path) -> bytes:
    if not file.exists():
        draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, secrets.token_bytes(32))
        os.close(descriptor)
        with suppress(FileExistsError):
            os.link(draft, file)  # unlike a rename, it never replaces another process's key
        draft.unlink()
    return file.read_bytes()
