"""HTTP connections with bounded request heads. uvicorn's own take a head of any size, from anybody, into memory."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
"""Of a request's first line and headers together, or of its trailers; more passes only if it comes in one piece."""

_REFUSAL = b'{"detail":"the first line and the headers are larger than %d bytes, the most that this server takes"}'
_ANSWER = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b"
)


class BoundedConnection(HttpToolsProtocol):
    """One client's connection, which ends when too much arrives that is neither a body nor the end of a head."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pending_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._pending_bytes += len(data)
        super().data_received(data)
        if self._pending_bytes > MAX_HEAD_BYTES:
            self._refuse()

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # not into the middle of another answer
            body = _REFUSAL % MAX_HEAD_BYTES
            self.transport.write(_ANSWER % (len(body), body))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._pending_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending_bytes = 0
        super().on_body(body)
