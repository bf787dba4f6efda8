"""What strangers can send before anybody asks who they are, and names that want to be something else."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

import pytest
import zstandard

from tests.contract.api_fixtures import Api, running_api
from tests.contract.test_api_rules import message
from tinsmith.api.connections import MAX_HEAD_BYTES
from tinsmith.api.paths import check_name, parse_path
from tinsmith.errors import UserError

MEGABYTE = 2**20
HEAD = b"GET /api/v1/sessions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("door"), max_body_bytes=8 * MEGABYTE) as api:
        yield api


@contextmanager
def connected(api: Api) -> Iterator[socket.socket]:
    address = urlsplit(api.base_url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        yield connection


def sent(connection: socket.socket, part: bytes, times: int) -> int:
    """How many parts were taken before the server closed the connection."""
    for number in range(times):
        try:
            connection.sendall(part)
        except OSError:
            return number
    return times


def answered(connection: socket.socket) -> int:
    response = http.client.HTTPResponse(connection)
    response.begin()
    assert response.read()
    return response.status


@pytest.mark.parametrize(
    ("beginning", "part"),
    [
        (HEAD, b"X-Many: " + b"y" * 1000 + b"\r\n"),
        (HEAD + b"X-Endless: ", b"y" * 1000),
        (b"GET /", b"y" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X-Trailer: " + b"y" * 1000 + b"\r\n"),
    ],
    ids=["many headers", "an endless header", "an endless line", "endless trailers"],
)
def test_a_head_that_does_not_end_is_not_read_for_ever(api: Api, beginning: bytes, part: bytes) -> None:
    with connected(api) as connection:
        connection.sendall(beginning)
        assert sent(connection, part, 50_000) < 50_000
    assert api.http.get("/healthz").status_code == 200


def test_a_head_that_is_too_large_is_refused_with_the_limit(api: Api) -> None:
    with connected(api) as connection:
        connection.sendall(HEAD)
        sent(connection, b"X-Many: " + b"y" * 1000 + b"\r\n", MAX_HEAD_BYTES // 1000 + 1)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 431
        assert str(MAX_HEAD_BYTES) in json.loads(response.read())["detail"]


def test_large_bodies_and_many_requests_on_one_connection_are_no_large_heads(api: Api) -> None:
    model = api.model(api.session())
    with connected(api) as connection:
        for seq in range(1, 4):
            body = message(model, seq, token=9999, count=200_000)
            head = f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert answered(connection) == 400
        for _ in range(MAX_HEAD_BYTES // len(HEAD) + 10):
            connection.sendall(HEAD + b"\r\n")
            assert answered(connection) == 200
        assert len(body) > 8 * MAX_HEAD_BYTES


def test_a_small_request_cannot_become_a_large_one(api: Api) -> None:
    bomb = zstandard.compress(b'{"tags": ["' + b"x" * 100 * MEGABYTE + b'"]}')
    assert len(bomb) < MEGABYTE // 10
    answer = api.http.post("/create_session", content=bomb, headers={"Content-Encoding": "zstd"})
    assert (answer.status_code, str(MEGABYTE) in answer.json()["detail"]) == (413, True)
    assert api.http.post("/create_session", content=b" " * (MEGABYTE + 1)).status_code == 413


@pytest.mark.parametrize(("depth", "status"), [(16, 200), (17, 400), (400, 400), (900, 400), (100_000, 400)])
def test_nesting_has_a_bound(api: Api, depth: int, status: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        value = opening * depth + (b"" if closing == b"]" else b"1") + closing * depth
        answer = api.http.post("/create_session", content=b'{"user_metadata": {"a": %b}}' % value)
        assert answer.status_code == status, answer.text
    assert api.http.post("/create_session", content=b"[" * depth).status_code == 400
    events = b'{"events": [{"a": %b}], "platform": "", "sdk_version": "", "session_id": ""}'
    telemetry = events % (b"[" * depth + b"]" * depth)
    assert api.http.post("/telemetry", content=telemetry).status_code in (200, 400)


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../up", "a/../b", "/etc/passwd", "a\\b", "a/b", "", " a", "a ", "a\0b", "a\nb", "a\x7f", "\ud800"),
        *("a\u200bb", "\u202eexe", "a\u2028b", "\ufeffa", "a\u00a0b", "é" * 101, "x" * 201),
    ],
    ids=ascii,
)
def test_names_that_could_lead_elsewhere_or_look_like_others_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not allowed"):
        check_name(name)


@pytest.mark.parametrize("name", ["000123", "final", "épreuve", "試し", "a.b-c_d", "step=10", "🙂", "x" * 200])
def test_ordinary_names_of_any_language_are_taken(name: str) -> None:
    assert check_name(name) == name
    assert parse_path(f"tinker://s:train:0/weights/{name}").name == name


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "\0", "\u202e", "%2e%2e%2f", "..%2f..%2fetc"])
def test_addresses_with_such_names_lead_nowhere(api: Api, name: str) -> None:
    encoded = quote(name, safe="")
    for path in (f"/training_runs/{encoded}", f"/training_runs/m/checkpoints/weights/{encoded}/publish"):
        method = "POST" if path.endswith("publish") else "GET"
        assert api.http.request(method, path).status_code == 404
    assert api.http.get(f"/files/{encoded}/{encoded}").status_code == 404
