"""Turns on the event loop: a crowd of requests is begun a few at a time, so that nothing else waits for all of it.

An event loop runs whatever is ready, all of it, before it looks for anything new; two thousand requests that arrive
together would be two thousand steps in front of the next heartbeat. Here they are suspended tasks instead, of which
each round of the loop begins a few: of every key in turn, of one key's sessions in turn (where it is known which a
request belongs to), of one session in order of arrival. What clients send to know whether the server lives, and what
costs next to nothing, does not queue.

Knows paths and keys as they were sent; nothing of what requests are about, or whether the key is any good.
"""

import asyncio
from collections import OrderedDict, deque

from starlette.types import ASGIApp, Receive, Scope, Send

EACH_ROUND = 8
"""Requests begun in one round of the event loop: some milliseconds of work."""

_WITHOUT_TURN = frozenset(
    f"/api/v1{path}" for path in ("/session_heartbeat", "/healthz", "/client/config", "/client/dynamic_config")
)


class _Queues:
    """What waits of everybody: of each key in turn, and of each of its sessions."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, OrderedDict[str, deque[asyncio.Future[None]]]] = OrderedDict()  # the next first

    def __bool__(self) -> bool:
        return bool(self._keys)

    def append(self, key: bytes, session: str, turn: "asyncio.Future[None]") -> None:
        self._keys.setdefault(key, OrderedDict()).setdefault(session, deque()).append(turn)

    def pop(self) -> "asyncio.Future[None]":
        """The next one of all."""
        key, sessions = self._keys.popitem(last=False)
        session, turns = sessions.popitem(last=False)
        turn = turns.popleft()
        if turns:
            sessions[session] = turns
        if sessions:
            self._keys[key] = sessions
        return turn


class Turns:
    """Who goes on in the next round of the event loop. Belongs to one event loop."""

    def __init__(self, each_round: int = EACH_ROUND) -> None:
        self._each_round = each_round
        self._left = each_round  # of this round
        self._waiting = _Queues()
        self._is_counting = False  # whether the next round is told to this

    async def take(self, key: bytes, session: str = "") -> None:
        """Returns when it is the caller's turn; at once while there are few. A cancelled caller loses its place."""
        loop = asyncio.get_running_loop()
        if not self._is_counting:
            self._is_counting = True
            loop.call_soon(self._begin_round)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(key, session, turn)
        await turn

    def _begin_round(self) -> None:
        self._left = self._each_round
        while self._left and self._waiting:
            turn = self._waiting.pop()
            if not turn.cancelled():
                turn.set_result(None)
                self._left -= 1
        self._is_counting = bool(self._waiting)
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._begin_round)


class InTurn:
    """ASGI middleware: every request takes a turn before anything is done about it."""

    def __init__(self, app: ASGIApp, turns: Turns) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _WITHOUT_TURN:
            await self._turns.take(key_sent(scope))
        await self._app(scope, receive, send)


def key_sent(scope: Scope) -> bytes:
    """The API key, or token, that a request carries: the one that is looked at; empty if it carries none."""
    first: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        first.setdefault(name, value)
    return first.get(b"x-api-key") or first.get(b"authorization", b"")
