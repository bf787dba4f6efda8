"""Wakes the process that waits for work or for results, so that nobody polls on the hot path.

SQLite: Unix datagram sockets in a private folder derived from the database's URL. Postgres: LISTEN/NOTIFY. A lost ring
costs a delay, never a result: every listener also looks at the database now and then.
"""


class Bell:
    """One listener's end."""

    def wait(self, timeout: float) -> list[str]:
        """Messages rung since the last call; empty after `timeout` seconds. Several rings may come as one."""
        raise NotImplementedError

    def close(self) -> None: ...


class Doorbell:
    """Topics: `jobs` (work was submitted), `done` (messages are request ids), `engine` (its state changed)."""

    def __init__(self, database_url: str) -> None: ...

    def ring(self, topic: str, messages: list[str] | None = None) -> None:
        """Wakes every listener of `topic`, in all processes. Never blocks, never raises."""

    def listen(self, *topics: str) -> Bell:
        raise NotImplementedError

    def close(self) -> None: ...
