"""As much of the Hugging Face hub as an upload of a small folder needs: it takes files and remembers them."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """`files` holds what was uploaded, by repository and name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[tuple[str, str], bytes] = {}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub on a free loopback port, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = _handler(hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _full_name(asked: dict[str, Any]) -> str:
    return f"{asked.get('organization') or 'anna'}/{asked['name']}"


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/api/whoami-v2":
                self._answer({"name": "anna", "type": "user", "orgs": [], "auth": {}})
            else:
                self._answer({"error": "nothing here"}, 404)

        def do_HEAD(self) -> None:
            self._answer({}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == "/api/repos/create":
                self._answer({"url": f"{hub.url}/{_full_name(json.loads(body))}"})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self._answer({"files": files})
            elif "/commit/" in self.path:
                self._commit([json.loads(line) for line in body.splitlines()])
            else:
                self._answer({"error": "nothing here"}, 404)

        def _commit(self, lines: list[dict[str, Any]]) -> None:
            repository = self.path.partition("/commit/")[0].removeprefix("/api/models/")
            for line in lines:
                if line["key"] == "file":
                    hub.files[repository, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{hub.url}/{repository}/commit/0", "commitOid": "0" * 40, "success": True})

        def _answer(self, body: dict[str, Any], status: int = 200) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
