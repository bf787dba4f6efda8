"""The doorbell of Postgres: LISTEN and NOTIFY, each on a connection of its own.

Rings are collected and sent by a background thread, so that nobody waits for the database to ring a bell.
"""

import time
from typing import Any

import psycopg

from tinsmith.store.bell import Bell, Courier, pack, packets, unpack

_PAYLOAD_BYTES = 7_900  # Postgres takes less than 8,000
_RECONNECT_SECONDS = 0.5

Connection = psycopg.Connection[tuple[Any, ...]]


class PostgresRinger:
    """Notifies a channel for each topic. Channels belong to the database."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._conn: Connection | None = None
        self._courier = Courier(self._deliver)

    def ring(self, topic: str, messages: list[str]) -> None:
        self._courier.send(topic, messages)

    def listen(self, topics: tuple[str, ...]) -> Bell:
        return PostgresBell(self._url, topics)

    def close(self) -> None:
        self._courier.close()
        if self._conn is not None:
            self._conn.close()

    def _deliver(self, topic: str, messages: list[str]) -> list[str]:
        """Notifies; returns all messages if the database is away."""
        payloads = [pack(group).decode() for group in packets(messages, _PAYLOAD_BYTES)]
        try:
            if self._conn is None:
                self._conn = connect(self._url)
            self._conn.execute(
                "SELECT pg_notify(%s, payload) FROM unnest(%s::text[]) AS payload", (_channel(topic), payloads)
            )
        except psycopg.Error:
            if self._conn is not None:
                self._conn.close()
                self._conn = None
            return messages
        return []


class PostgresBell(Bell):
    """Listens on a connection of its own; makes a new one when that is lost."""

    def __init__(self, url: str, topics: tuple[str, ...]) -> None:
        super().__init__()
        self._url = url
        self._topics = topics
        self._heard: dict[str, None] = {}
        self._conn: Connection | None = None
        self._connect()

    def _receive(self, until: float) -> list[str]:
        while not self._closed:
            if self._conn is None and self._connect():
                return list(self._topics)  # what was rung meanwhile is lost
            messages = self._drain()
            if messages or time.monotonic() >= until:
                return messages
            if self._conn is not None:
                self._sleep(until, self._conn.fileno())
            else:
                self._sleep(min(until, time.monotonic() + _RECONNECT_SECONDS))
        return []

    def _connect(self) -> bool:
        try:
            conn = connect(self._url)
            # While it waits for an answer, the driver takes notifications in; this is where it leaves them.
            conn.add_notify_handler(lambda notification: self._hear(notification.payload.encode()))
            for topic in self._topics:
                conn.execute(f"LISTEN {_channel(topic)}".encode())
        except psycopg.Error:
            return False
        self._conn = conn
        return True

    def _drain(self) -> list[str]:
        """What has arrived; forgets a connection that is lost."""
        if self._conn is not None:
            try:
                self._conn.pgconn.consume_input()
                while notification := self._conn.pgconn.notifies():
                    self._hear(notification.extra)
            except psycopg.Error:
                self._conn.close()
                self._conn = None
        messages, self._heard = list(self._heard), {}
        return messages

    def _hear(self, payload: bytes) -> None:
        self._heard.update(dict.fromkeys(unpack(payload)))

    def _hang_up(self) -> None:
        if self._conn is not None:
            self._conn.close()


def connect(database_url: str, name: str = "tinsmith doorbell") -> Connection:
    """A connection of one's own to the database at SQLAlchemy's URL. Raises psycopg.Error."""
    scheme, _, rest = database_url.partition("://")
    return psycopg.connect(
        f"{scheme.partition('+')[0]}://{rest}",
        autocommit=True,
        connect_timeout=5,
        application_name=name,
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
        tcp_user_timeout=60_000,
    )


def _channel(topic: str) -> str:
    return f"tinsmith_{topic}"
