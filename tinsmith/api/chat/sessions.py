"""The sessions and samplers behind chats: one session for each owner and API process, one sampler for each snapshot."""

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import sqlalchemy as sa

from tinsmith.api.calls import Call
from tinsmith.api.chat.targets import Target
from tinsmith.errors import UserError
from tinsmith.store import records

_KEEP_SECONDS = 60.0  # how often a session is told that its client is there


@dataclass(slots=True)
class _Session:
    id: str
    kept_at: float
    samplers: dict[Target, str] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)


class ChatSessions:
    """Made when first needed, and again if their owner has finished them."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}  # by owner

    async def sampler(self, call: Call, target: Target) -> str:
        """The id of the owner's sampler of these weights."""
        session = await self.keep(call)
        if target not in session.samplers:
            record = records.SamplerRecord(
                id=f"{session.id}:sample:{next(session.numbers)}",
                session_id=session.id,
                owner=call.owner,
                base=target.base,
                base_name=target.base_name,
                snapshot=target.snapshot,
                model_id=target.model_id,
                created_at=time.time(),
            )
            await call.services.database.write_async(records.create_sampler, record)
            session.samplers[target] = record.id
        return session.samplers[target]

    async def keep(self, call: Call) -> _Session:
        """The owner's session, made if there is none (any more), with word that its client is there."""
        now, database = time.monotonic(), call.services.database
        session = self._sessions.get(call.owner)
        if session is not None and now - session.kept_at < _KEEP_SECONDS:
            return session
        if session is not None:
            session.kept_at = now
            with suppress(UserError):  # finished by its owner
                await database.write_async(records.touch_session, session.id, call.owner, time.time())
                return session
        session = _Session(secrets.token_hex(8), now)
        await database.write_async(_create_session, session.id, call.owner)
        self._sessions[call.owner] = session
        return session


def _create_session(conn: sa.Connection, session_id: str, owner: str) -> None:
    now = time.time()
    session = records.Session(
        id=session_id,
        owner=owner,
        state="open",
        tags=["chat"],
        user_metadata={},
        sdk_version="",
        project_id=None,
        display_name="OpenAI and Anthropic clients",
        finish_reason=None,
        created_at=now,
        seen_at=now,
    )
    records.create_session(conn, session)
