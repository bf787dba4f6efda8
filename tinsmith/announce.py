"""What `tinsmith serve` tells the person at the terminal: what it chose, how loading goes, and how to connect.

Talks to its own server over HTTP, like any client. On a terminal it is coloured and has a spinner; elsewhere it
is plain lines.
"""

import http.client
import json
import socket
import threading
from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console
from rich.status import Status
from rich.text import Text

from tinsmith import __version__
from tinsmith.config import Settings, is_loopback, mask_password
from tinsmith.served import Served

POLL_SECONDS = 0.2
_EVERY_ADDRESS = ("0.0.0.0", "::")


class Announcer:
    """Prints for one server; `settings.port` is the bound one, `keys` the number of keys, None if any key will do."""

    def __init__(
        self, settings: Settings, served: Sequence[Served], keys: int | None, console: Console | None = None
    ) -> None:
        self._settings = settings
        self._served = served
        self._keys = keys
        self._console = console or Console(soft_wrap=True, highlight=False)

    def chosen(self) -> None:
        """The settings that decide who can use the server and where its data are."""
        settings = self._settings
        rows = [
            *[("model", model.name) for model in self._served],
            *[("alias", f"{alias} = {model}") for alias, model in settings.aliases.items()],
            ("address", base_url(settings)),
            ("access", self._access()),
            ("data", str(settings.data_dir)),
            ("database", mask_password(settings.database_url) or "SQLite in the data folder"),
        ]
        self._print(f"Tinsmith {__version__}", style="bold")
        for name, value in rows:
            self._print(f"  {name:<9} {value}")

    def wait_until_ready(self, stopping: threading.Event) -> None:
        """Follows the server's health until it is ready (then says how to connect), or until `stopping`."""
        spinner = self._console.status("starting") if self._console.is_terminal else nullcontext()
        shown = ""
        with spinner as status:
            while not stopping.wait(POLL_SECONDS):
                ready, progress = self._health()
                if ready:
                    break
                if progress and progress != shown:
                    shown = progress
                    self._show(status, progress)
        if not stopping.is_set():
            self._ready()

    def _show(self, status: Status | None, progress: str) -> None:
        if status is None:
            self._print(f"loading: {progress}")
        else:
            status.update(Text(progress))

    def _health(self) -> tuple[bool, str]:
        """Whether the server is ready; if not, what it is doing (empty while it does not answer)."""
        connection = http.client.HTTPConnection(_own_host(self._settings.host), self._settings.port, timeout=5)
        try:
            connection.request("GET", "/api/v1/healthz")
            response = connection.getresponse()
            body = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            return False, ""
        finally:
            connection.close()
        return response.status == 200, str(body.get("progress") or body.get("status") or "")

    def _ready(self) -> None:
        settings = self._settings
        key = "tml-local" if self._keys is None else "<one of your API keys>"
        names = ", ".join(model.name for model in self._served)
        self._print(f"Tinsmith is ready: {names} at {base_url(settings)}", style="bold green")
        self._print(f"  export TINKER_BASE_URL={base_url(settings)} TINKER_API_KEY={key}")

    def _access(self) -> str:
        if self._keys is not None:
            return f"{self._keys} API key(s)" if self._keys else "nobody; make a key with tinsmith keys create"
        reach = "this machine" if is_loopback(self._settings.host) else "anyone who can reach the address"
        return f"{reach}, with any key that starts with tml-"

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))


def base_url(settings: Settings) -> str:
    """The URL for clients: of this machine's name when the server listens on every address."""
    host = socket.gethostname() if settings.host in _EVERY_ADDRESS else settings.host
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _own_host(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
