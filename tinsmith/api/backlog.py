"""Back-pressure: new requests are told to come again while too many are under way, of one key or of all.

The database knows how many there are. It is asked when a quarter of what was free then has been taken since, and once
the bounds are reached; in between, what this process accepts is added. So several API processes together may exceed
the bounds by a quarter of their room each. A request that accepted ones wait for is let in up to twice the bounds: it
makes room, and whoever sends the last ones first gets no more than that.
"""

import asyncio
import math
import time

from tinsmith.config import Settings
from tinsmith.errors import BusyError
from tinsmith.store import backlog
from tinsmith.store.backlog import Amount
from tinsmith.store.database import Database

RETRY_SECONDS = 2.0
_LOOK_SECONDS = 0.25  # between two looks, at least
_OVERDRAFT = 2  # times the bounds, for what accepted requests wait for
_TRUSTED = 4  # a look is good until this part of what was free has been taken


class Backlog:
    """What is under way, as far as this process knows. Belongs to one event loop."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._most = Amount(settings.max_outstanding, settings.max_outstanding_bytes)
        self._most_each = Amount(settings.max_outstanding_per_key, settings.max_outstanding_bytes_per_key)
        self._known: dict[str, Amount] = {}
        self._added: dict[str, Amount] = {}  # since then
        self._looked_at = -math.inf
        self._looking: asyncio.Task[None] | None = None

    async def admit(self, owner: str, subject: str, seq: int, size: int, *, ordered: bool) -> None:
        """Counts a request of `size` bytes as under way. Raises BusyError if there is no room for it."""
        new = Amount(1, size)
        if self._is_doubtful(owner, new):
            await self._look()
        full = self._full(owner, new)
        if full and not await self._is_due(owner, subject, seq, new, ordered=ordered):
            raise BusyError(f"{full}; try again in {RETRY_SECONDS:g} s", RETRY_SECONDS)
        self._added[owner] = self._added.get(owner, Amount()) + new

    async def _is_due(self, owner: str, subject: str, seq: int, new: Amount, *, ordered: bool) -> bool:
        """Whether the request was accepted before, or accepted ones wait for it and it is not far too much."""
        read = self._database.read_async
        if await read(backlog.is_due, subject, seq, ordered=False):
            return True
        if not ordered or self._full(owner, new, _OVERDRAFT):
            return False
        return await read(backlog.is_due, subject, seq, ordered=True)

    def _is_doubtful(self, owner: str, new: Amount) -> bool:
        if time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return False
        known, added = self._known.get(owner, Amount()), self._added.get(owner, Amount())
        return (
            not math.isfinite(self._looked_at)
            or _is_much(added + new, self._most_each, known)
            or _is_much(_total(self._added) + new, self._most, _total(self._known))
        )

    async def _look(self) -> None:
        """Those who find the numbers old wait for the same look."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._read())
        await asyncio.shield(self._looking)

    async def _read(self) -> None:
        self._looked_at = time.monotonic()
        self._added = {}
        self._known = await self._database.read_async(backlog.outstanding)

    def _full(self, owner: str, new: Amount, times: int = 1) -> str:
        """What there would be too much of, with so many times the bounds; empty if nothing."""
        mine = self._known.get(owner, Amount()) + self._added.get(owner, Amount())
        everything = _total(self._known) + _total(self._added)
        for whose, have, most in (("this key has", mine, self._most_each), ("there are", everything, self._most)):
            if have.requests + new.requests > most.requests * times:
                return f"{whose} {have.requests} requests under way, of at most {most.requests}"
            if have.size and have.size + new.size > most.size * times:
                return f"{whose} requests of {have.size} bytes under way, of at most {most.size}"
        return ""


def _is_much(added: Amount, most: Amount, known: Amount) -> bool:
    return added.requests * _TRUSTED > most.requests - known.requests or added.size * _TRUSTED > most.size - known.size


def _total(amounts: dict[str, Amount]) -> Amount:
    return sum(amounts.values(), Amount())
