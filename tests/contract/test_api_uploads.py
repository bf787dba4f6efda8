"""Uploading an adapter over HTTP: begun, put at signed addresses, finished; whose it is, and how much it may be."""

import errno
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.api_fixtures import FOREVER, Api, forged, get, running_api
from tinsmith.api import uploads
from tinsmith.store import keys, records

FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"weights" * 1000}
LORA = {"rank": 4, "train_mlp": False}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("uploads")
    with running_api(folder, api_keys=("tml-anna", "tml-ben")) as api:
        api.http = api.client("tml-anna")
        yield api


@pytest.fixture(autouse=True)
def nothing_left(api: Api) -> Iterator[None]:
    yield
    for folder in (api.settings.data_dir / "uploads").glob("*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def start(api: Api, **fields: Any) -> dict[str, Any]:
    answer = api.post("/external_weights_upload_start", **({"base_model": "tiny", "lora_config": LORA} | fields))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def put(url: str, content: bytes) -> httpx.Response:
    """As any HTTP client does: without a key."""
    return httpx.put(url, content=content, trust_env=False, timeout=FOREVER)


def put_all(begun: dict[str, Any]) -> None:
    for name, url in begun["urls"].items():
        assert put(url, FILES[name]).status_code == 200


def finish(api: Api, begun: dict[str, Any]) -> httpx.Response:
    return api.post("/external_weights_upload_finish", upload_id=begun["upload_id"])


def test_an_upload_becomes_a_checkpoint_once_however_often_it_is_finished(api: Api) -> None:
    begun = start(api, destination_project_id="p1")
    assert set(begun["urls"]) == set(FILES)
    assert 3000 < datetime.fromisoformat(begun["expires"]).timestamp() - time.time() <= 3600
    put_all(begun)
    answer = finish(api, begun)
    assert answer.status_code == 200, answer.text
    model_id = f"upload-{begun['upload_id']}:train:0"
    assert answer.json() == {"tinker_path": f"tinker://{model_id}/external_weights/upload"}
    ((seq, kind, body),) = api.engine.bodies(model_id)
    request = json.loads(body)
    promised = {"rank": 4, "train_attn": True, "train_mlp": False, "train_unembed": True}
    assert (seq, kind, request["promised"]) == (0, "import_weights", promised)
    assert Path(request["folder"]).parent == api.settings.data_dir / "uploads"
    assert not Path(request["folder"]).exists()
    assert finish(api, begun).json() == answer.json()
    assert len(api.engine.bodies(model_id)) == 1
    session = api.database.read(records.require_session, f"upload-{begun['upload_id']}", records.EVERYBODY)
    assert (session.state, session.project_id) == ("finished", "p1")


def test_an_upload_needs_all_its_files(api: Api) -> None:
    begun = start(api)
    put(begun["urls"]["adapter_config.json"], FILES["adapter_config.json"])
    answer = finish(api, begun)
    assert (answer.status_code, "adapter_model.safetensors" in answer.json()["detail"]) == (400, True)
    put_all(begun)
    assert finish(api, begun).status_code == 200


def test_an_upload_is_its_owners(api: Api) -> None:
    begun = start(api)
    put_all(begun)
    with api.client("tml-ben") as ben:
        answer = ben.post("/external_weights_upload_finish", json={"upload_id": begun["upload_id"]})
    assert answer.status_code == 404
    assert api.engine.bodies(f"upload-{begun['upload_id']}:train:0") == []
    path = finish(api, begun).json()["tinker_path"]
    with api.client("tml-ben") as ben:
        assert ben.post("/external_weights_upload_finish", json={"upload_id": begun["upload_id"]}).status_code == 404
        assert ben.post("/weights_info", json={"tinker_path": path}).status_code == 404
    assert api.post("/weights_info", tinker_path=path).json()["base_model"] == "tiny"


@pytest.mark.parametrize("upload_id", ["nothing", "..", "a/b", "a\x00b", "a" * 32, "x:train:0:0"])
def test_an_upload_that_is_not_there_is_not_found(api: Api, upload_id: str) -> None:
    assert api.post("/external_weights_upload_finish", upload_id=upload_id).status_code in (400, 404)


def test_an_address_is_for_its_own_file(api: Api) -> None:
    begun, other = start(api), start(api)
    url = begun["urls"]["adapter_config.json"]
    base, token, name = url.rsplit("/", 2)
    payload, signature = token.rsplit(".", 1)
    for wrong in (forged(token), f"{payload[:-2]}AA.{signature}", payload):
        assert put(f"{base}/{wrong}/{name}", b"{}").status_code == 404
    for wrong in ("adapter_model.safetensors", "upload.json", "..%2Fx", "adapter_config.json%00"):
        assert put(f"{base}/{token}/{wrong}", b"{}").status_code == 404, wrong
    downloads = url.replace("/uploads/", "/files/")
    assert get(downloads).status_code == 404
    assert set(other["urls"].values()).isdisjoint(begun["urls"].values())


def test_a_file_larger_than_an_adapter_can_be_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(api)
    assert put(begun["urls"]["adapter_config.json"], b"x" * (2**20 + 1)).status_code == 413
    monkeypatch.setattr(uploads, "_SPARE_BYTES", 1000)
    monkeypatch.setattr(uploads, "_BYTES_PER_PARAMETER", 0)
    small = start(api)
    assert put(small["urls"]["adapter_model.safetensors"], b"x" * 1001).status_code == 413
    assert put(small["urls"]["adapter_model.safetensors"], b"x" * 1000).status_code == 200
    folder = api.settings.data_dir / "uploads" / small["upload_id"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_model.safetensors", "upload.json"]


def test_a_file_is_taken_from_one_sender_at_a_time(api: Api) -> None:
    begun = start(api)
    url = begun["urls"]["adapter_model.safetensors"]
    folder = api.settings.data_dir / "uploads" / begun["upload_id"]
    started, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"first"
        started.set()
        go_on.wait(FOREVER)
        yield b"last"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: httpx.put(url, content=slowly(), trust_env=False, timeout=FOREVER))
        assert started.wait(FOREVER)
        while not list(folder.glob(".*")):
            time.sleep(0.01)
        second = put(url, b"another")
        assert second.status_code == 429 and "retry-after" in second.headers
        go_on.set()
        assert first.result().status_code == 200
    assert [file.read_bytes() for file in folder.glob("*safetensors")] == [b"firstlast"]
    assert put(url, b"another").status_code == 200


def test_an_upload_ends_with_its_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LIFETIME_SECONDS", -1.0)
    late = start(api)
    assert put(late["urls"]["adapter_config.json"], b"{}").status_code == 410
    monkeypatch.undo()
    start(api)
    assert not (api.settings.data_dir / "uploads" / late["upload_id"]).exists()
    assert put(late["urls"]["adapter_config.json"], b"{}").status_code == 410


def test_uploads_that_nobody_finishes_are_bounded(api: Api) -> None:
    for _ in range(uploads.MOST_OPEN):
        begun = start(api)
    answer = api.post("/external_weights_upload_start", base_model="tiny", lora_config=LORA)
    assert (answer.status_code, "begun and not finished" in answer.json()["detail"]) == (403, True)
    with api.client("tml-ben") as ben:
        body = {"base_model": "tiny", "lora_config": LORA}
        assert ben.post("/external_weights_upload_start", json=body).status_code == 200
    put_all(begun)
    assert finish(api, begun).status_code == 200
    start(api)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base_model": "Qwen/Qwen3-8B"}, "does not serve 'Qwen/Qwen3-8B'"),
        ({"lora_config": {"rank": 0}}, "only adapters can be uploaded"),
        ({"lora_config": {"rank": 65}}, "1 to 64 are allowed"),
        ({"lora_config": None}, "lora_config"),
    ],
)
def test_an_upload_that_cannot_be_taken_is_refused_at_once(api: Api, fields: dict[str, Any], said: str) -> None:
    answer = api.post("/external_weights_upload_start", **({"base_model": "tiny", "lora_config": LORA} | fields))
    assert answer.status_code == 400
    assert said in answer.json()["detail"]


def test_a_key_whose_storage_is_full_begins_no_upload(api: Api) -> None:
    secret, key = keys.new_key("full")
    limited = keys.Key(**{name: getattr(key, name) for name in key.__slots__} | {"max_storage": 100})
    api.database.write(keys.create_key, limited)
    body = {"base_model": "tiny", "lora_config": LORA}
    with api.client(secret) as client:
        while (answer := client.post("/external_weights_upload_start", json=body)).status_code == 401:
            time.sleep(0.05)
        begun = answer.json()
        put_all(begun)
        assert client.post("/external_weights_upload_finish", json={"upload_id": begun["upload_id"]}).is_success
        answer = client.post("/external_weights_upload_start", json=body)
    assert (answer.status_code, "'full' stores 123 bytes" in answer.json()["detail"]) == (403, True)


def test_a_full_disk_is_said_to_be_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(api)

    def full(_file: Any, _data: bytearray) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(uploads, "_write", full)
    answer = put(begun["urls"]["adapter_config.json"], b"{}")
    assert (answer.status_code, "no space is left" in answer.json()["detail"]) == (500, True)
    monkeypatch.undo()
    put_all(begun)
    assert finish(api, begun).status_code == 200
