"""HTTP connections that nobody can keep for nothing: bounded request heads, time for heads and bodies, and a number.

uvicorn's own take a head of any size into memory, and wait for ever for clients that send a byte a minute, never read
their answer, or send nothing at all.
"""

import asyncio
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
"""Of a request's first line and headers together, or of its trailers; more passes only if it comes in one piece."""

HEAD_SECONDS = 20.0
"""From a new connection, or a request's first byte, to the end of its head."""

BODY_SECONDS, BODY_BYTES = 30.0, 4096
"""In so many seconds so much of a body must arrive, or its end, unless the server itself makes the client wait."""

READ_SECONDS = 120.0
"""For a client to take up some of an answer that is ready."""

MAX_CONNECTIONS = 8192
ACCEPTED_AT_ONCE = 32  # connections in one round of the event loop: all that have come would hold everything else up
BACKLOG = 2048  # connections that the kernel keeps until they are accepted
_SPARE_FILES = 512  # descriptors for the database, bells, files, and for connections that are told to go
_TURNED_AWAY = 256  # connections beyond the limit that are told so; further ones are dropped

_LARGE_HEAD = "the first line and the headers are larger than {} bytes, the most that this server takes"
_SLOW_HEAD = "the first line and the headers did not arrive within {:g} seconds"
_SLOW_BODY = "less than {} bytes of the body arrived within {:g} seconds"
_FULL = "this server has {} connections, as many as it takes; try again soon"
_PHRASES = {
    408: b"408 Request Timeout",
    431: b"431 Request Header Fields Too Large",
    503: b"503 Service Unavailable",
}


def connection_limit() -> int:
    """How many connections this process may have, after raising its limit of open files to what they need."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _SPARE_FILES
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    if files != resource.RLIM_INFINITY and files < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return max(64, wanted - _SPARE_FILES)


class PatientServer(uvicorn.Server):
    """Accepts new connections a few at a time. Its configuration's `backlog` must be ACCEPTED_AT_ONCE."""

    def __init__(self, config: uvicorn.Config, leave: Callable[[], None]) -> None:
        """When the server ends, `leave` makes requests that wait for something answer."""
        super().__init__(config)
        self._leave = leave

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """The event loop takes one number for how many to accept at once and for how many the kernel keeps."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Connections are told first that their answer is the last one."""
        asyncio.get_running_loop().call_soon(self._leave)
        await super().shutdown(sockets)


class BoundedConnection(HttpToolsProtocol):
    """One client's connection. It ends when too much arrives that is neither a body nor the end of a head, or too
    little in too long a time; beyond `limit` connections, with its first request."""

    limit = MAX_CONNECTIONS  # of all connections of the process

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pending_bytes = 0
        self._body_bytes = 0  # since the body was last looked at
        self._is_one_too_many = False
        self._arrival: asyncio.TimerHandle | None = None  # what is to be there in time
        self._departure: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_one_too_many = len(self.connections) > self.limit
        if len(self.connections) > self.limit + _TURNED_AWAY:
            transport.abort()
            return
        self._await(HEAD_SECONDS, self._give_up_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await_nothing()
        self._stop_departure()
        super().connection_lost(exc)

    # What arrives

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._pending_bytes += len(data)
        if self._arrival is None and self._is_idle():
            self._await(HEAD_SECONDS, self._give_up_head)
        super().data_received(data)
        if self._pending_bytes > MAX_HEAD_BYTES:
            self._refuse(431, _LARGE_HEAD.format(MAX_HEAD_BYTES))

    def on_message_begin(self) -> None:
        self._await(HEAD_SECONDS, self._give_up_head)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._pending_bytes = self._body_bytes = 0
        if self._is_one_too_many:
            self._refuse(503, _FULL.format(self.limit))
            return
        self._await(BODY_SECONDS, self._look_at_body)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending_bytes = 0
        self._body_bytes += len(body)
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._await_nothing()
        if not self.transport.is_closing():
            super().on_message_complete()

    def _is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _give_up_head(self) -> None:
        if self._pending_bytes:
            self._refuse(408, _SLOW_HEAD.format(HEAD_SECONDS))
        else:
            self.transport.close()

    def _look_at_body(self) -> None:
        if not self.flow.read_paused and self._body_bytes < BODY_BYTES:
            self._refuse(408, _SLOW_BODY.format(BODY_BYTES, BODY_SECONDS))
            return
        self._body_bytes = 0
        self._await(BODY_SECONDS, self._look_at_body)

    def _await(self, seconds: float, otherwise: Callable[[], None]) -> None:
        self._await_nothing()
        self._arrival = self.loop.call_later(seconds, otherwise)

    def _await_nothing(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    # What leaves

    def pause_writing(self) -> None:
        """The client does not take up what it is sent."""
        super().pause_writing()
        self._stop_departure()
        self._departure = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_departure()
        super().resume_writing()

    def _stop_departure(self) -> None:
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None

    def _refuse(self, status: int, reason: str) -> None:
        """Ends the connection, with an answer unless that would come into the middle of another one."""
        self._await_nothing()
        if not self.pipeline and (self._is_idle() or not self.cycle.response_started):
            body = b'{"detail":"%b"}' % reason.encode()
            head = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-type: application/json\r\n" % _PHRASES[status]
            again = b"retry-after: 1\r\nx-should-retry: true\r\n" if status == 503 else b""
            self.transport.write(head + again + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
