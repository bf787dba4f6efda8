"""Every route of the application, asked by somebody without a key, with a wrong one, and with another tenant's.

The routes come from the application's own table: a new one fails here until it is right, or named as an exception.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
from starlette.routing import BaseRoute, Mount, Route

from tests.contract.api_fixtures import Api, forged, get, running_api
from tests.contract.test_api_rules import PROMPT, find, message
from tinsmith.manifests import seal_folder
from tinsmith.store import keys, records

PREFIX = "/api/v1"
ANNA, BEN = "tml-anna", "tml-ben"

OPEN = {f"{PREFIX}/healthz": 200, f"{PREFIX}/traces/{{token}}": 404}
OPEN |= {f"{PREFIX}/{each}/{{token}}/{{name}}": 404 for each in ("files", "uploads")}
"""Routes that take no key, and their answer: health, and downloads and uploads, whose address is the permission."""

NOBODYS = {
    "/client/config": {"sdk_version": "0.38.0"},
    "/client/dynamic_config": {"sdk_version": "0.38.0"},
    "/get_server_capabilities": None,
    "/openapi.json": None,
    "/auth/token": {},
    "/auth/apikey/me": None,
    "/telemetry": {"events": [], "platform": "", "sdk_version": "", "session_id": "s"},
    "/create_session": {"tags": []},
    "/external_weights_upload_start": {"base_model": "tiny", "lora_config": {"rank": 4}},
}
"""Routes that concern no stored object, with a body that they take."""

REFUSED = {("DELETE", "/auth/apikey/me")}  # a key of the settings cannot be given back

CHATS = {
    *(f"{prefix}/{path}" for prefix in ("/oai/api/v1", "/v1") for path in ("chat/completions", "completions")),
    *(f"{prefix}/messages{of}" for prefix in ("/anthropic/api/v1", "/v1") for of in ("", "/count_tokens")),
}
MODEL_LISTS = {"/oai/api/v1/models", "/anthropic/api/v1/models", "/v1/models"}
"""Of what one may name, where a chat's clients look; nobody sees others' there."""

OPERATORS = {"/metrics", "/status"}
"""Of the whole server, for admins alone."""

LISTS = {"/sessions", "/training_runs", "/checkpoints", "/audit", "/billing/usage/checkpoints/current"}
LISTS |= {"/sessions/search", "/billing/usage/events"}

READ_BY_ADMINS = LISTS | {
    "/sessions/{session_id}/trace_export",
    *("/sessions/{session_id}", "/training_runs/{run_id}", "/training_runs/{run_id}/checkpoints"),
    *("/samplers/{sampler_id}", "/get_info", "/weights_info"),
}
"""What an admin may see of everybody. Everything else is the owner's alone."""


LOSS = {
    "custom_loss_seq_id": 0,
    "name": "loss",
    "inputs": [{"name": "logprobs", "rank": 1}],
    "graph": {
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "logprobs"}]},
            {"op": "output", "name": "output", "target": "output", "args": [[{"ref": "sum_1"}, {"dict": {}}]]},
        ]
    },
}
"""The smallest custom loss."""


@dataclass(frozen=True)
class Belongings:
    """What Anna has on the server."""

    session: str
    model: str
    sampler: str
    sample: str
    upload: str
    since: datetime

    @property
    def queries(self) -> dict[str, str]:
        """By path: of the time when Anna did what she did, also behind the end of its hour or day."""
        begin = self.since.replace(minute=0, second=0, microsecond=0)
        window = {"starting_on": begin.isoformat(), "ending_before": (begin + timedelta(hours=2)).isoformat()}
        day = {"day": self.since.date().isoformat()}
        return {"/billing/usage/events": f"?{urlencode(window)}", "/audit": f"?{urlencode(day)}"}

    @property
    def path(self) -> str:
        return f"tinker://{self.model}/weights/mine"

    def fill(self, path: str) -> str:
        """A route's path with Anna's ids in it."""
        names = {"session_id": self.session, "run_id": self.model, "sampler_id": self.sampler}
        names |= {"segment": "weights", "name": "mine", "model:path": self.path}
        for name, value in names.items():
            path = path.replace("{" + name + "}", value)
        assert "{" not in path, f"{path} has a parameter that Belongings.fill does not know"
        return path


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("routes"), api_keys=(ANNA, BEN), poll_seconds=0.1) as api:
        api.http = api.client(ANNA)
        yield api


@pytest.fixture(scope="module")
def belongings(api: Api) -> Belongings:
    since, session = datetime.now(UTC), api.session()
    model, sampler = api.model(session), api.sampler(session)
    sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {"max_tokens": 1}}
    for seq, kind in enumerate(("weights", "weights_external"), 1):
        api.result(api.post(f"/save_{kind}", model_id=model, seq_id=seq, path="mine"))
    sampled = str(api.post("/asample", **sample).json()["request_id"])
    begun = api.post("/external_weights_upload_start", base_model="tiny", lora_config={"rank": 4}).json()
    return Belongings(session, model, sampler, sampled, str(begun["upload_id"]), since)


def requests(mine: Belongings, own_session: str) -> dict[str, Any]:
    """A right body for every route that needs one, about Anna's objects; `own_session` is the caller's."""
    training = {"model_id": mine.model, "seq_id": 9}
    said = {"messages": [{"role": "user", "content": "Hi"}]}
    kinds = {path: {"prompt": "Hi"} if path.removesuffix("/completions").endswith("v1") else said for path in CHATS}
    chats = {path: {"model": mine.path} | body for path, body in kinds.items()}
    chats |= {path: body | {"max_tokens": 3} for path, body in chats.items() if path.endswith("/messages")}
    return chats | {
        "/retrieve_future": {"request_id": f"{mine.model}:1"},
        "/asample": {"sampling_session_id": mine.sampler, "seq_id": 9, "prompt": PROMPT, "sampling_params": {}},
        "/forward_backward": message(mine.model, 9),
        "/optim_step": training | {"adam_params": {}},
        "/session_heartbeat": {"session_id": mine.session},
        "/sessions/search": {"owner": {"type": "accessible"}},
        "/sessions/{session_id}/project": {"project_id": "theirs"},
        "/join_sampling_session": {"sampling_session_id": mine.sampler},
        "/retrieve_futures": {"target": {"sampling_session_id": mine.sampler}, "timeout": 0},
        "/create_custom_loss": LOSS | {"session_id": mine.session},
        "/copy_weights": {"source_path": mine.path, "destination_project_id": "theirs"},
        "/sessions/{session_id}/finish": {"reason": {"type": "errored"}},
        "/create_model": {"session_id": mine.session, "model_seq_id": 9, "base_model": "tiny"},
        "/get_info": {"model_id": mine.model},
        "/save_weights": training | {"path": "theirs"},
        "/save_weights_for_sampler": training | {"path": "theirs"},
        "/save_weights_external": training | {"path": "theirs"},
        "/external_weights_upload_finish": {"upload_id": mine.upload},
        "/load_weights": {"session_id": own_session, "model_seq_id": 0, "path": mine.path, "optimizer": True},
        "/weights_info": {"tinker_path": mine.path},
        "/create_sampling_session": {
            "session_id": own_session, "sampling_session_seq_id": 0, "model_path": mine.path
        },
        "/cancel_future": {"request_id": mine.sample},
        "/training_runs/{run_id}/checkpoints/{segment}/{name}/publish": {},
        "/training_runs/{run_id}/checkpoints/{segment}/{name}/ttl": {"ttl_seconds": None},
    }  # fmt: skip


def walk(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of all routes."""
    for route in routes:
        if isinstance(route, Mount):
            yield from walk(route.routes, prefix + route.path)
            continue
        assert isinstance(route, Route), f"a new kind of route, which this test must learn: {route}"
        for method in sorted(route.methods or ()):
            yield method, prefix + route.path


def ask(client: httpx.Client, base_url: str, method: str, path: str, body: Any = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    return client.request(method, base_url + path, content=content)


@pytest.mark.parametrize("key", [None, "tml-wrong", "tml-ann", ""])
def test_without_a_right_key_every_route_is_closed(api: Api, belongings: Belongings, key: str | None) -> None:
    answers = {}
    with api.client(key) as stranger:
        for method, path in walk(api.routes):
            filled = path.replace("{token}", "nonsense") if path in OPEN else path
            answers[method, path] = ask(stranger, api.base_url, method, belongings.fill(filled)).status_code
    assert len(answers) > 35
    assert answers == {(method, path): OPEN.get(path, 401) for method, path in answers}


def statuses(api: Api, mine: Belongings, client: httpx.Client) -> dict[tuple[str, str], httpx.Response]:
    """What every route about stored objects answers to a request about Anna's."""
    own_session = client.post("/create_session", json={"tags": []}).json()["session_id"]
    bodies = requests(mine, own_session)
    answers = {}
    for method, full in walk(api.routes):
        path = full.removeprefix(PREFIX)
        if full not in OPEN and path not in NOBODYS:
            filled = mine.fill(full) + mine.queries.get(path, "")
            answers[method, path] = ask(client, api.base_url, method, filled, bodies.get(path))
    return answers


def assert_untouched(api: Api, mine: Belongings) -> None:
    assert find(api, f"{mine.model}:9") is None
    assert api.http.post("/session_heartbeat", json={"session_id": mine.session}).status_code == 200
    assert api.http.get(f"/sessions/{mine.session}").json()["training_run_ids"] == [mine.model]
    (checkpoint,) = [
        each
        for each in api.http.get(f"/training_runs/{mine.model}/checkpoints").json()["checkpoints"]
        if each["tinker_path"] == mine.path
    ]
    assert (checkpoint["public"], checkpoint["expires_at"]) == (False, None)


def test_to_another_tenant_nothing_of_annas_exists(api: Api, belongings: Belongings) -> None:
    with api.client(BEN) as ben:
        answers = statuses(api, belongings, ben)
    for (method, path), answer in answers.items():
        if path in LISTS | MODEL_LISTS:
            assert answer.status_code == 200
            assert belongings.session not in answer.text, (method, path)
        elif path in OPERATORS:
            assert answer.status_code == 403
        else:
            assert answer.status_code == 404, (method, path, answer.text)
    assert_untouched(api, belongings)


def test_an_admin_sees_everything_and_touches_nothing(api: Api, belongings: Belongings) -> None:
    secret, key = keys.new_key("operator", keys.ADMIN)
    api.database.write(keys.create_key, key)
    with api.client(secret) as admin:
        while admin.get("/sessions").status_code == 401:
            time.sleep(0.05)
        answers = statuses(api, belongings, admin)
    for (method, path), answer in answers.items():
        may = path in READ_BY_ADMINS | MODEL_LISTS | OPERATORS
        assert answer.status_code == (200 if may else 404), (method, path, answer.text)
    assert all(belongings.session not in answers["GET", path].text for path in MODEL_LISTS)
    by_session = LISTS - {"/billing/usage/checkpoints/current"}
    lists = {path: answer.text for (method, path), answer in answers.items() if path in by_session and method != "HEAD"}
    assert [path for path, text in lists.items() if belongings.session not in text] == []
    assert_untouched(api, belongings)


def test_the_routes_about_nobodys_objects_take_any_right_key(api: Api) -> None:
    with api.client(BEN) as ben:
        for method, full in walk(api.routes):
            path = full.removeprefix(PREFIX)
            if path in NOBODYS:
                answer = ask(ben, api.base_url, method, full, NOBODYS[path])
                assert answer.status_code == (400 if (method, path) in REFUSED else 200), (path, answer.text)


@pytest.fixture
def exported(api: Api, belongings: Belongings, tmp_path: Path) -> str:
    """The address of one exported file, in whose folder lies also what nobody may have."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    seal_folder(folder, "")
    path = f"tinker://{belongings.model}/external_weights/mine"
    api.database.write(records.update_checkpoint, path, folder=str(folder))
    route = f"/training_runs/{belongings.model}/checkpoints/external_weights/mine/external_weights_urls"
    urls = api.http.get(route).json()["urls"]
    assert set(urls) == {"adapter_model.safetensors"}
    return urls["adapter_model.safetensors"]


def fetch(url: str) -> tuple[int, bytes]:
    answer = get(url)
    return answer.status_code, answer.content


def test_a_signed_address_is_for_the_files_of_its_own_checkpoint(exported: str) -> None:
    assert fetch(exported) == (200, b"weights")
    base, token, name = exported.rsplit("/", 2)
    payload, signature = token.rsplit(".", 1)
    for wrong in (forged(token), f"{payload[:-2]}AA.{signature}", payload, f"{payload}."):
        assert fetch(f"{base}/{wrong}/{name}")[0] == 404
    for other in ("manifest.json", "../adapter_model.safetensors", "..", "/etc/passwd", "adapter_model.safetensors\0"):
        assert fetch(f"{base}/{token}/{quote(other, safe='')}")[0] == 404, other


def test_an_address_signed_by_another_server_opens_nothing(exported: str, api: Api, tmp_path: Path) -> None:
    secret = api.settings.data_dir / "download.key"
    ours = secret.read_bytes()
    try:
        secret.write_bytes(bytes(32))
        assert fetch(exported)[0] == 404
    finally:
        secret.write_bytes(ours)
    assert fetch(exported)[0] == 200


def test_a_signed_address_ends_with_its_time(
    api: Api, belongings: Belongings, exported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = f"/training_runs/{belongings.model}/checkpoints/external_weights/mine/external_weights_urls"
    monkeypatch.setattr("tinsmith.api.downloads.LIFETIME_SECONDS", -1.0)
    late = api.http.get(route).json()["urls"]["adapter_model.safetensors"]
    assert fetch(late)[0] == 410
    assert fetch(exported)[0] == 200


def test_a_damaged_export_is_refused_by_name(api: Api, belongings: Belongings, exported: str, tmp_path: Path) -> None:
    route = f"/training_runs/{belongings.model}/checkpoints/external_weights/mine/external_weights_urls"
    (tmp_path / "export" / "adapter_model.safetensors").write_bytes(b"heights")
    answer = api.http.get(route)
    assert answer.status_code == 500
    assert "export: adapter_model.safetensors does not match its checksum" in answer.text


def test_a_signed_address_ends_with_its_checkpoint(api: Api, belongings: Belongings, exported: str) -> None:
    path = f"tinker://{belongings.model}/external_weights/mine"
    checkpoint = api.database.read(records.find_checkpoint, path)
    assert checkpoint is not None
    api.database.write(records.delete_checkpoint, path)
    assert fetch(exported)[0] == 410
    api.database.write(records.create_checkpoint, replace(checkpoint, expires_at=time.time() - 1))
    assert fetch(exported)[0] == 410
    api.database.write(records.update_checkpoint, path, expires_at=None)
    assert fetch(exported)[0] == 200
