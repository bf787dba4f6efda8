"""What the terminal is told."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from tinsmith.announce import Announcer, base_url
from tinsmith.config import Settings, load_settings
from tinsmith.served import choose_served


def told(settings: Settings, *, keys: int | None = None, terminal: bool = False) -> tuple[Announcer, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, soft_wrap=True, force_terminal=terminal, color_system=None)
    return Announcer(settings, choose_served(settings, ()), keys, console), text


class Health(BaseHTTPRequestHandler):
    """Answers as a server that is loading in two stages and then ready."""

    answers: list[tuple[int, str]]

    def do_GET(self) -> None:
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def loading_server():
    Health.answers = [
        (503, '{"status":"loading","progress":"reading weights"}'),
        (503, '{"status":"loading","progress":"reading weights"}'),
        (503, '{"status":"loading","progress":"making room"}'),
        (200, '{"status":"ok"}'),
    ]
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_who_can_use_the_server_is_said_without_saying_the_keys() -> None:
    settings = load_settings(None, {}, {"api_keys": ["tml-secret"], "host": "0.0.0.0"})
    for keys, said in ((3, "3 API key(s)"), (0, "nobody; make a key"), (None, "anyone who can reach the address")):
        announcer, text = told(settings, keys=keys)
        announcer.chosen()
        assert said in text.getvalue()
        assert "secret" not in text.getvalue()


def test_aliases_and_a_database_without_its_password_are_shown() -> None:
    overrides = {"aliases": ["Qwen/Qwen3-8B=tiny"], "database_url": "postgresql://me:pw@db/t"}
    announcer, text = told(load_settings(None, {}, overrides))
    announcer.chosen()
    assert "Qwen/Qwen3-8B = tiny" in text.getvalue()
    assert "postgresql://me:***@db/t" in text.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_loading_is_followed_until_the_server_is_ready(loading_server: HTTPServer, terminal: bool) -> None:
    settings = Settings(port=loading_server.server_port)
    announcer, text = told(settings, terminal=terminal)
    announcer.wait_until_ready(threading.Event())
    url = f"http://127.0.0.1:{settings.port}"
    assert f"Tinsmith is ready: tiny at {url}" in text.getvalue()
    assert f"export TINKER_BASE_URL={url} TINKER_API_KEY=tml-local" in text.getvalue()
    if not terminal:
        assert text.getvalue().splitlines()[:2] == ["loading: reading weights", "loading: making room"]


def test_nothing_is_announced_when_the_server_stops_first() -> None:
    announcer, text = told(Settings(port=1))
    stopping = threading.Event()
    stopping.set()
    announcer.wait_until_ready(stopping)
    assert "ready" not in text.getvalue()


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")])
def test_the_url_names_the_host_that_clients_can_reach(host: str, url: str) -> None:
    assert base_url(Settings(host=host)) == url
    assert "0.0.0.0" not in base_url(Settings(host="0.0.0.0"))
