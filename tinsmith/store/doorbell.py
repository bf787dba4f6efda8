"""Wakes the process that waits for work or for results, so that nobody polls on the hot path.

SQLite: Unix datagram sockets in a private folder derived from the database's URL. Postgres: LISTEN/NOTIFY. A lost ring
costs a delay, never a result: every listener also looks at the database now and then. Knows nothing of jobs.
"""

from typing import Protocol

from tinsmith.store.bell import Bell
from tinsmith.store.notifications import PostgresRinger
from tinsmith.store.sockets import SocketRinger

__all__ = ["TOPICS", "Bell", "Doorbell"]

TOPICS = ("jobs", "done", "engine", "tokens")


class Doorbell:
    """Topics: `jobs` (work was submitted; messages are request ids that were given up), `done` (messages are request
    ids), `engine` (its state changed), `tokens` (messages are those of `wire.progress`)."""

    def __init__(self, database_url: str) -> None:
        """Everybody with the same database hears everybody. Raises ConfigError if there is no private place for it."""
        is_local = database_url.startswith("sqlite")
        self._ringer: _Ringer = SocketRinger(database_url) if is_local else PostgresRinger(database_url)

    def ring(self, topic: str, messages: list[str] | None = None) -> None:
        """Wakes every listener of `topic`, in all processes; without `messages` they hear the topic's name.

        Thread-safe. Never blocks, never raises.
        """
        self._ringer.ring(topic, [topic] if messages is None else messages)

    def listen(self, *topics: str) -> Bell:
        """A bell that hears what is rung from now on."""
        if not topics or not set(topics) <= set(TOPICS):
            raise ValueError(f"cannot listen to {topics}; the topics are {', '.join(TOPICS)}")
        return self._ringer.listen(topics)

    def close(self) -> None:
        """Delivers what can be delivered and stops ringing. Bells are closed by those who listen."""
        self._ringer.close()


class _Ringer(Protocol):
    def ring(self, topic: str, messages: list[str]) -> None: ...
    def listen(self, topics: tuple[str, ...]) -> Bell: ...
    def close(self) -> None: ...
