"""Heartbeats of many sessions, from a process of their own: what they wait for is the server, not their own client.

    python -m benchmarks.beats URL SESSION …

Every session beats once a second, at a moment of its own, over a connection of its own. Every line on stdin asks for
what was seen since the last one: a line of JSON, seconds of the beats that were answered and the errors of the others.
The end of stdin ends the process.
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

BEAT_SECONDS = 1.0  # of every session; clients beat every ten seconds
PATIENCE = 120.0  # for one answer

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Beats:
    """That process, as its parent sees it: it beats from the beginning to the end of a `with` block."""

    def __init__(self, base_url: str, sessions: list[str]) -> None:
        self._command = [sys.executable, "-m", "benchmarks.beats", base_url, *sessions]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=2**24)
        await self.take()  # it has begun
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def take(self) -> tuple[list[float], list[str]]:
        """Seconds of the beats answered since the last call, and the errors of the others."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        seconds, errors = json.loads(await self._process.stdout.readline())
        return seconds, errors


class Heart:
    """All sessions' beats, and what became of them."""

    def __init__(self, base_url: str) -> None:
        address = urlsplit(base_url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._seconds: list[float] = []
        self._errors: list[str] = []

    def take(self) -> str:
        seen = json.dumps([self._seconds, self._errors])
        self._seconds, self._errors = [], []
        return seen

    async def beat(self, session: str, offset: float) -> None:
        """For ever."""
        await asyncio.sleep(offset)
        connection: Connection | None = None
        while True:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(PATIENCE):
                    connection = connection or await asyncio.open_connection(self._host, self._port)
                    status = await self._ask(connection, session)
                if status != 200:
                    self._errors.append(f"heartbeat: {status}")
            except (OSError, EOFError, TimeoutError) as error:
                self._errors.append(f"heartbeat: {type(error).__name__}: {error}")
                connection = None
            self._seconds.append(time.perf_counter() - began)
            await asyncio.sleep(BEAT_SECONDS)

    async def _ask(self, connection: Connection, session: str) -> int:
        """Sends a heartbeat; the answer's status."""
        reader, writer = connection
        body = json.dumps({"session_id": session, "type": "session_heartbeat"})
        head = f"POST /api/v1/session_heartbeat HTTP/1.1\r\nhost: {self._host}:{self._port}\r\nx-api-key: tml-local\r\n"
        about = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(f"{head}{about}{body}".encode())
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        sizes = [line.partition(":")[2] for line in headers if line.lower().startswith("content-length:")]
        await reader.readexactly(int(sizes[0]))
        return int(status.split()[1])


async def run(base_url: str, sessions: list[str]) -> None:
    """Until the end of stdin."""
    heart, lines = Heart(base_url), asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    beats = [asyncio.create_task(heart.beat(one, BEAT_SECONDS * n / len(sessions))) for n, one in enumerate(sessions)]
    while await lines.readline():
        print(heart.take(), flush=True)
    for beat in beats:
        beat.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*beats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("sessions", nargs="+")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.url, arguments.sessions))


if __name__ == "__main__":
    main()
