"""API keys: who may use the server, as which owner, and how much. Only digests are stored.

One round of SHA-256 is enough for them. Slow hashes protect passwords, which people choose and attackers guess; a key
is 256 random bits, which nobody finds by trying, however fast.

A revoked key stays in the table: its owner's data has a name, and a server that once had keys does not open its doors
because the last one is gone. Functions take a connection inside a transaction.
"""

import hashlib
import secrets
import time
from dataclasses import asdict, dataclass, replace

import sqlalchemy as sa

from tinsmith.errors import LimitError, NotFoundError, UserError
from tinsmith.store import audit
from tinsmith.store.prepared import Prepared
from tinsmith.store.tables import checkpoints, insert, keys

KEY_START = "tml-"
"""What clients want a key to begin with."""

USER, ADMIN = "user", "admin"

_ALL = Prepared(any=sa.select(keys).order_by(keys.c.created_at, keys.c.digest))  # columns are in the order of fields
_PREFIX_LENGTH = len(KEY_START) + 8
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Key:
    """One key without its secret. Times in seconds since the epoch; None is never, or no limit."""

    digest: str
    name: str
    prefix: str
    owner: str
    role: str
    created_at: float
    used_at: float | None = None
    expires_at: float | None = None
    revoked_at: float | None = None
    tokens_per_second: float | None = None
    max_models: int | None = None
    max_storage: int | None = None
    weight: float = 1.0

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


def digest_of(secret: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def owner_of(digest: str) -> str:
    """The name under which the objects of a key's holder are kept."""
    return digest[:16]


def new_key(name: str, role: str = USER) -> tuple[str, Key]:
    """A random secret, and its key without expiry or limits. Raises UserError if the name is not allowed."""
    fits = 0 < len(name) <= _LONGEST_NAME and name.isprintable() and name.strip() == name
    if not fits or name.startswith(KEY_START):
        raise UserError(
            f"a key cannot be called {name[:_LONGEST_NAME]!r}; names have 1 to {_LONGEST_NAME} printable characters, "
            f"no space at their ends, and do not begin with {KEY_START}"
        )
    secret = KEY_START + secrets.token_hex(32)
    digest = digest_of(secret)
    return secret, Key(digest, name, secret[:_PREFIX_LENGTH], owner_of(digest), role, time.time())


def create_key(conn: sa.Connection, key: Key) -> None:
    """Adds a key. Raises UserError if its name is taken by one that is not revoked."""
    statement = insert(conn, keys).values(asdict(key)).on_conflict_do_nothing().returning(keys.c.digest)
    if conn.execute(statement).first() is None:
        raise UserError(f"there is a key called {key.name!r} already; choose another name, or revoke that one first")
    audit.note(conn, key.owner, "key_create", name=key.name, key=key.prefix, role=key.role)


def list_keys(conn: sa.Connection) -> list[Key]:
    """All keys, also expired and revoked ones, oldest first."""
    return [Key(*row) for row in _ALL(conn, {})]


def weights(conn: sa.Connection) -> dict[str, float]:
    """How many times the usual share an owner's key gives it; of those who get another than that."""
    newest_last = conn.execute(sa.select(keys.c.owner, keys.c.weight).order_by(keys.c.created_at))
    return {owner: weight for owner, weight in {row.owner: row.weight for row in newest_last}.items() if weight != 1.0}


def revoke_key(conn: sa.Connection, name_or_prefix: str) -> Key:
    """Ends a key, called by its name or by its beginning. Raises NotFoundError, or UserError if several begin so."""
    key = _require_one(conn, name_or_prefix)
    revoke_digest(conn, key.digest)
    return replace(key, revoked_at=time.time())


def revoke_digest(conn: sa.Connection, digest: str) -> bool:
    """Ends a key; whether there was one to end."""
    is_good = (keys.c.digest == digest) & keys.c.revoked_at.is_(None)
    ended = sa.update(keys).where(is_good).values(revoked_at=time.time())
    row = conn.execute(ended.returning(keys.c.owner, keys.c.name, keys.c.prefix)).first()
    if row is not None:
        audit.note(conn, row.owner, "key_revoke", name=row.name, key=row.prefix)
    return row is not None


def rotate_key(conn: sa.Connection, name_or_prefix: str, overlap: float) -> tuple[str, Key]:
    """A new secret, and its key with the name, owner, role, expiry and limits of an old one.

    The old one ends, at once or `overlap` seconds from now under another name. Raises as `revoke_key` does.
    """
    old, now = _require_one(conn, name_or_prefix), time.time()
    secret, made = new_key(old.name)
    new = replace(old, digest=made.digest, prefix=made.prefix, created_at=now, used_at=None)
    changes: dict[str, object] = {"revoked_at": now}
    if overlap:
        ends = now + overlap if old.expires_at is None else min(now + overlap, old.expires_at)
        changes = {"expires_at": ends, "name": f"{old.name} ({old.prefix})"}
    conn.execute(sa.update(keys).where(keys.c.digest == old.digest).values(changes))
    create_key(conn, new)
    audit.note(conn, old.owner, "key_rotate", name=old.name, key=new.prefix, instead_of=old.prefix)
    return secret, new


def _require_one(conn: sa.Connection, name_or_prefix: str) -> Key:
    found = [key for key in list_keys(conn) if key.revoked_at is None and _is_called(key, name_or_prefix)]
    shown = name_or_prefix[:_PREFIX_LENGTH] if name_or_prefix.startswith(KEY_START) else name_or_prefix
    if not found:
        raise NotFoundError(f"there is no key {shown!r} that is still good (tinsmith keys list)")
    if len(found) > 1:
        names = ", ".join(repr(key.name) for key in found)
        raise UserError(f"{len(found)} keys begin with {shown!r} ({names}); give more of it, or a name")
    return found[0]


def _is_called(key: Key, text: str) -> bool:
    if not text.startswith(KEY_START):
        return key.name == text
    return key.prefix.startswith(text) or key.digest == digest_of(text)


def touch_key(conn: sa.Connection, digest: str, now: float) -> None:
    """Notes that a key was used."""
    conn.execute(sa.update(keys).where(keys.c.digest == digest).values(used_at=now))


def check_storage(
    conn: sa.Connection, owner: str, model_id: str, kind: str, path: str, size_bytes: int | None = None
) -> None:
    """Raises LimitError if a new checkpoint at `path` takes more room than its owner's key has.

    Before its size is known, it is taken to be as large as the model's largest checkpoint of that kind; if there is
    none, anything may do.
    """
    newest = sa.select(keys.c.name, keys.c.max_storage).where(keys.c.owner == owner).order_by(keys.c.created_at.desc())
    key = conn.execute(newest.limit(1)).first()  # an owner has several after a rotation
    if key is None or key.max_storage is None:
        return
    is_other = checkpoints.c.path != path  # what is overwritten makes room
    size = checkpoints.c.size_bytes
    stored = sa.select(sa.func.sum(size)).where(checkpoints.c.owner == owner, is_other)
    largest = sa.select(sa.func.max(size)).where(checkpoints.c.model_id == model_id, checkpoints.c.kind == kind)
    used, needed = int(conn.scalar(stored) or 0), size_bytes or int(conn.scalar(largest) or 1)
    if used + needed > key.max_storage:
        raise LimitError(
            f"key {key.name!r} stores {used} bytes of at most {key.max_storage}, and this checkpoint needs {needed}; "
            "delete checkpoints (tinker checkpoint delete), or give them a lifetime (ttl_seconds)"
        )
