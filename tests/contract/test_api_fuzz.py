"""Nonsense at every route: it is refused with an explanation, and the server goes on. Never a 500, never a hang."""

import copy
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.api_fixtures import Api, running_api
from tests.contract.test_api_rules import PROMPT, message
from tests.contract.test_every_route import LOSS
from tinsmith.api.app import ROUTES

ROUNDS = 40


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Both databases: what one of them cannot store, the other may take."""
    with ExitStack() as stack:
        options: dict[str, Any] = {"poll_seconds": 0.1, "max_body_bytes": 100_000}
        if request.param == "postgres":
            options["database_url"] = stack.enter_context(request.getfixturevalue("postgres").database())
        yield stack.enter_context(running_api(tmp_path_factory.mktemp("api"), **options))


@pytest.fixture(scope="module")
def bodies(api: Api) -> dict[str, dict[str, Any]]:
    """A body for every route that takes JSON, which is right but for what is done to it."""
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    tensor = {"dtype": "int64", "shape": [2, 1], "data": [5, -1], "sparse_crow_indices": None}
    path = f"tinker://{model}/weights/a"
    training = {"model_id": model, "seq_id": 1}
    return {
        "/client/config": {"sdk_version": "0.38.0"},
        "/client/dynamic_config": {"sdk_version": "0.38.0"},
        "/telemetry": {"events": [{}], "platform": "", "sdk_version": "", "session_id": "", "process_uuid": ""},
        "/create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "", "display_name": "x"},
        "/session_heartbeat": {"session_id": session},
        "/sessions/{session_id}/finish": {"reason": {"type": "success"}, "detail": "x"},
        "/create_model": {
            "session_id": session,
            "model_seq_id": 1,
            "base_model": "tiny",
            "user_metadata": {"a": 1},
            "lora_config": {"rank": 8, "seed": 1, "train_mlp": True},
            "optimizer_config": {"type": "adamw"},
        },
        "/get_info": {"model_id": model},
        "/optim_step": training | {"adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "eps": 1e-8}},
        "/create_custom_loss": LOSS | {"session_id": session},
        "/save_weights": training | {"path": "a", "ttl_seconds": 7200, "user_metadata": {"a": "b"}},
        "/save_weights_for_sampler": training | {"sampling_session_seq_id": 3, "kind": "snapshot"},
        "/save_weights_external": training | {"path": "a", "age_encryption_recipients": None},
        "/external_weights_upload_start": {"base_model": "tiny", "lora_config": {"rank": 8, "train_mlp": True}},
        "/external_weights_upload_finish": {"upload_id": "a" * 32},
        "/load_weights": {"session_id": session, "model_seq_id": 2, "path": path, "optimizer": True},
        "/weights_info": {"tinker_path": path},
        "/create_sampling_session": {"session_id": session, "sampling_session_seq_id": 1, "model_path": path},
        "/asample": {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "num_samples": 1,
            "prompt": PROMPT,
            "sampling_params": {
                "max_tokens": 3,
                "seed": 1,
                "stop": ["x"],
                "temperature": 1.0,
                "top_k": -1,
                "top_p": 1.0,
            },
            "prompt_logprobs": True,
            "prompt_logprobs_last_n": 1,
            "topk_prompt_logprobs": 2,
            "target_prompt_logprobs": tensor,
        },
        "/retrieve_future": {"request_id": f"{model}:0", "allow_metadata_only": True},
        "/cancel_future": {"request_id": f"{model}:0"},
        "/auth/token": {},
        "/sessions/search": {
            "session_id": session,
            "project_ids": ["p"],
            "user_metadata": {"a": "b"},
            "display_name": "x y",
            "owner": {"type": "user", "owner_urns": ["local"]},
            "statuses": [{"type": "client_finished", "reasons": ["success"]}],
            "limit": 2,
            "cursor": {"last_created_at": "2026-01-01T00:00:00+00:00", "last_session_id": session},
        },
        "/sessions/{session_id}/project": {"project_id": "p"},
        "/copy_weights": {"source_path": path, "session_id": session, "model_seq_id": 5, "ttl_seconds": 7200},
        "/join_sampling_session": {"sampling_session_id": sampler},
        "/retrieve_futures": {
            "target": {"sampling_session_id": sampler, "cloned_sampler_id": 0},
            "prev_cursor": 0,
            "timeout": 0.1,
            "retrieved_request_ids": [f"{sampler}:0"],
        },
        f"{CHECKPOINT}/publish": {},
        f"{CHECKPOINT}/ttl": {"ttl_seconds": 7200},
    }


CHECKPOINT = "/training_runs/{run_id}/checkpoints/{segment}/{name}"
JSON_ROUTES = [
    (method, path) for method, path, _ in ROUTES if method in ("POST", "PUT") and path != "/forward_backward"
]
URL_ROUTES = [(method, path) for method, path, _ in ROUTES if "{" in path]

NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63) - 1, 0.5, 1e308, -0.0,
    "", " ", "\x00", "\ud800", "é" * 40, "x" * 5000, "../../etc", "a/b", "tinker://", "tinker://a/weights/b",
    "tinker://\x00/weights/b", [], {}, [[]], [None], [{}], {"": {}}, ["a", 1], [1.5], [2**70], [-1], [10**30, 0.1],
    {"type": "nothing"}, [{"type": "image", "data": "", "format": "png"}], list(range(600)),
)  # fmt: skip

RAW = (
    b"", b"null", b"[]", b"3", b'"text"', b"{", b"{}", b'{"a":', b"\xff\xfe{}", b'{"a": "\xff"}', b'{"a": "\\ud800"}',
    b"NaN", b'{"seq_id": NaN}', b'{"seq_id": 1e999}', b"[" * 50_000, b'{"a":' * 20_000, b"\x00" * 100,
    b"\x28\xb5\x2f\xfd" * 10, b"x" * 200_001, b'{"user_metadata":' + b"[" * 5000 + b"]" * 5000 + b"}",
)  # fmt: skip


def spoil(body: Any, rng: random.Random) -> Any:
    """The body with one part of it, at any depth, replaced, removed, added or doubled."""
    body = copy.deepcopy(body)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(body)
    if not places or rng.random() < 0.1:
        body[rng.choice(["extra", "", "\x00"])] = rng.choice(NASTY)
        return body
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(NASTY)
    return body


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.request.content[:500], answer.text)
    if answer.status_code >= 400 and answer.status_code != 408:
        assert answer.json()["detail"]


def fill(path: str, value: str = "x") -> str:
    for name in ("session_id", "run_id", "sampler_id", "name"):
        path = path.replace("{" + name + "}", value)
    return path.replace("{segment}", "weights")


@pytest.mark.parametrize(("method", "path"), JSON_ROUTES)
def test_spoilt_bodies(api: Api, bodies: dict[str, dict[str, Any]], method: str, path: str) -> None:
    rng = random.Random(path)
    for _ in range(ROUNDS):
        body = spoil(bodies[path], rng)
        while rng.random() < 0.3:
            body = spoil(body, rng)
        content = json.dumps(body).encode()
        check(api.http.request(method, fill(path), content=content))


@pytest.mark.parametrize(("method", "path"), [*JSON_ROUTES, ("POST", "/forward_backward")])
def test_bodies_that_are_no_json(api: Api, method: str, path: str) -> None:
    for content in RAW:
        check(api.http.request(method, fill(path), content=content))
    for encoding in ("zstd", "gzip", "é"):
        headers = {"Content-Encoding": encoding.encode()}
        check(api.http.request(method, fill(path), content=RAW[-3], headers=headers))


@pytest.mark.parametrize(("method", "path"), URL_ROUTES)
def test_strange_names_in_urls(api: Api, method: str, path: str) -> None:
    for value in (
        "\x00",
        " ",
        "..",
        "a/b",
        "%2F",
        "é" * 200,
        "x" * 3000,
        "\n",
        "'; DROP TABLE jobs; --",
        "٣",
        "\u202e",
    ):
        check(api.http.request(method, fill(path, quote(value, safe="")), json={}))
    check(api.http.request(method, fill(path, "%ff%fe"), json={}))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "POST", "HEAD", "OPTIONS"])
def test_every_route_with_every_method(api: Api, method: str) -> None:
    for _, path, _ in ROUTES:
        answer = api.http.request(method, fill(path))
        assert answer.status_code < 500


@given(st.data())
def test_damaged_protobuf(api: Api, bodies: dict[str, dict[str, Any]], data: st.DataObject) -> None:
    intact = message(bodies["/get_info"]["model_id"], data.draw(st.integers(1, 2**31 - 1)), count=5)
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(intact) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(damaged[: data.draw(st.integers(0, len(intact)))]) if data.draw(st.booleans()) else bytes(damaged)
    headers = {}
    if data.draw(st.booleans()):
        content, headers = zstandard.compress(content), {"Content-Encoding": "zstd"}
        content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    check(api.http.post("/forward_backward", content=content, headers=headers))


def test_all_that_has_harmed_nobody(api: Api) -> None:
    model = api.model(api.session())
    assert api.http.get("/healthz").status_code == 200
    assert api.result(api.http.post("/forward_backward", content=message(model, 1))).status_code == 200
