"""What strangers can send before anybody asks who they are, and names that want to be something else."""

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import zstandard

from tests.contract.api_fixtures import FOREVER, Api, running_api
from tests.contract.test_api_rules import message
from tinsmith.api import connections
from tinsmith.api.connections import MAX_HEAD_BYTES, BoundedConnection
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
    with socket.create_connection((address.hostname, address.port), timeout=FOREVER) as connection:
        yield connection


def sent(connection: socket.socket, part: bytes, times: int) -> int:
    """How many parts were taken before the server closed the connection."""
    for number in range(times):
        try:
            connection.sendall(part)
        except OSError:
            return number
    return times


def closed(connection: socket.socket) -> bool:
    """Whether the server has ended the connection, politely or not."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


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


def drip(connection: socket.socket, piece: bytes, pause: float = 0.05) -> None:
    """Sends a little at a time until the server has had enough of it."""
    connection.settimeout(0.001)
    for _ in range(400):
        time.sleep(pause)
        try:
            connection.sendall(piece)
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        raise AssertionError("the server took all of it")
    connection.settimeout(FOREVER)


BODY = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
CHUNKED = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("beginning", "piece", "said"),
    [
        (HEAD, b"X: y\r\n", "the first line and the headers did not arrive within 0.5 seconds"),
        (b"GET /", b"y", "the first line and the headers did not arrive within 0.5 seconds"),
        (BODY, b" ", "less than 4096 bytes of the body arrived within 0.5 seconds"),
        (CHUNKED, b"1\r\n \r\n", "less than 4096 bytes of the body arrived within 0.5 seconds"),
        (CHUNKED + b"0\r\n", b"X: y\r\n", "less than 4096 bytes of the body arrived within 0.5 seconds"),
    ],
    ids=["headers", "a line", "a body", "chunks", "trailers"],
)
def test_who_sends_a_byte_at_a_time_is_cut_off(
    api: Api, monkeypatch: pytest.MonkeyPatch, beginning: bytes, piece: bytes, said: str
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.5)
    for before in (b"", HEAD + b"\r\n"):  # also on a connection that has been good for something
        with connected(api) as connection:
            if before:
                connection.sendall(before)
                assert answered(connection) == 200
            connection.sendall(beginning)
            drip(connection, piece)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert (response.status, json.loads(response.read())["detail"]) == (408, said)


@pytest.mark.parametrize("before", [b"", HEAD + b"\r\n"], ids=["new", "used"])
def test_who_sends_nothing_but_empty_lines_or_nothing_at_all_is_cut_off(
    api: Api, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    for piece in (b"\r\n", b""):
        with connected(api) as connection:
            if before:
                connection.sendall(before)
                assert answered(connection) == 200
            if piece:
                drip(connection, piece)
            elif not before:  # an idle connection that was good for something may stay for two minutes
                assert connection.recv(1) == b""


def test_a_slow_body_that_moves_is_read_to_its_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_BYTES", 1000)
    before = set(connected_now(api))
    with connected(api) as connection:
        connection.sendall(BODY)
        while not (mine := connected_now(api) - before):
            time.sleep(0.001)
        (served,) = mine
        for _ in range(20):
            connection.sendall(b" " * 5000)
            look_once_it_has_come(served)
        assert answered(connection) == 400  # no JSON


def look_once_it_has_come(served: Any) -> None:
    """As if a connection's time was over at the moment when some of the body had come."""

    async def look() -> None:
        served._look_at_body()

    while served._body_bytes < connections.BODY_BYTES:
        time.sleep(0.001)
    asyncio.run_coroutine_threadsafe(look(), served.loop).result(FOREVER)


def test_a_body_that_the_server_itself_makes_wait_is_read_to_its_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.2)
    caller = api.access.caller

    async def slow_caller(request: Any) -> Any:
        await asyncio.sleep(1)
        return await caller(request)

    monkeypatch.setattr(api.access, "caller", slow_caller)
    body = b"\0" * (6 * MEGABYTE)
    head = f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(api) as connection:
        connection.sendall(head.encode() + body)
        assert answered(connection) == 400


def test_a_waiting_answer_is_no_slow_request(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = api.sampler(api.session())
    body = {"sampling_session_id": sampler, "seq_id": 0, "sampling_params": {}}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
    with api.engine.working:
        request_id = api.post("/asample", prompt=prompt, **body).json()["request_id"]
        waiting = json.dumps({"request_id": request_id}).encode()
        head = f"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: x\r\nContent-Length: {len(waiting)}\r\n\r\n"
        for name in ("HEAD_SECONDS", "BODY_SECONDS", "READ_SECONDS"):
            monkeypatch.setattr(connections, name, 0.2)
        with connected(api) as connection:
            connection.sendall(head.encode() + waiting)
            time.sleep(1)
            api.engine.working.release()
            assert answered(connection) == 200
            api.engine.working.acquire()


def test_who_does_not_read_an_answer_is_cut_off(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    assert left(api, before := 1)  # that of all other tests
    with connected(api) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = b"GET /" + b"y" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"  # its refusal is as long
        assert sent(connection, asked, 500) < 500
    assert left(api, before)


def connected_now(api: Api) -> set[object]:
    connections_now: set[object] = api.server.server_state.connections
    return connections_now


def left(api: Api, count: int) -> bool:
    """Whether the server has no more than so many connections, soon."""
    for _ in range(1200):
        if len(connected_now(api)) <= count:
            return True
        time.sleep(0.05)
    return False


def test_one_connection_too_many_is_told_to_try_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    assert left(api, 1)
    api.http.get("/healthz")  # whose connection is the first
    monkeypatch.setattr(BoundedConnection, "limit", 1 + 3)
    with connected(api) as first, connected(api) as second, connected(api) as third, connected(api) as fourth:
        for connection in (first, second, third):
            connection.sendall(HEAD + b"\r\n")
            assert answered(connection) == 200
        fourth.sendall(HEAD + b"\r\n")
        response = http.client.HTTPResponse(fourth)
        response.begin()
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert "connections, as many as it takes" in json.loads(response.read())["detail"]
        assert closed(fourth)
        monkeypatch.setattr(connections, "_TURNED_AWAY", 0)
        with connected(api) as fifth:
            assert sent(fifth, HEAD + b"\r\n", 100) < 100 or closed(fifth)
        first.sendall(HEAD + b"\r\n")
        assert answered(first) == 200


@pytest.mark.parametrize(
    ("files", "most", "raised", "limit"),
    [(1024, 2048, 2048, 1536), (1024, -1, 8704, 8192), (20_000, 20_000, None, 8192), (256, 256, None, 64)],
)
def test_connections_leave_files_for_everything_else(
    monkeypatch: pytest.MonkeyPatch, files: int, most: int, raised: int | None, limit: int
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (files, most))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: set_to.append(limits))
    assert connections.connection_limit() == limit
    assert set_to == ([] if raised is None else [(raised, most)])


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
