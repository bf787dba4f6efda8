"""Tokens instead of keys: exchanged, used by the SDK, never longer good than their key; and keys that are replaced."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import jwt
import pytest
import tinker

from tests.contract.api_fixtures import Api, forged, running_api
from tests.contract.test_keys import await_status, create, listed, status_with, tinsmith
from tinsmith.store import audit


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("tokens"), api_keys=("tml-given", "eyJ-given")) as api:
        api.http = api.client("tml-given")
        yield api


def exchange(api: Api, key: str) -> str:
    with api.client(key) as client:
        answer = client.post("/auth/token", json={})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["jwt"])


def refusal(api: Api, key: str) -> httpx.Response:
    with api.client(key) as client:
        answer = client.get("/sessions")
    assert answer.status_code == 401
    return answer


def test_a_token_is_as_good_as_its_key(api: Api) -> None:
    key = create(api, "token", "--admin")
    assert await_status(api, key, 200)
    token = exchange(api, key)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["name"]) == (listed(api.settings.data_dir)["token"]["owner"], "token")
    assert claims["exp"] - claims["iat"] == 3600
    others = api.session()
    for _ in range(2):
        with api.client(token) as client:
            assert others in client.get("/sessions").json()["sessions"], "an admin sees everybody's"
            session = client.post("/create_session", json={"tags": []}).json()["session_id"]
    with api.client(key) as client:
        assert client.get(f"/sessions/{session}").status_code == 200
    assert status_with(api, "eyJ-given") == 200, "a key may begin as tokens do"


@pytest.mark.parametrize("spoil", ["signature", "claims", "other secret", "no token"])
def test_a_forged_token_is_refused_so_that_clients_fetch_another(api: Api, spoil: str) -> None:
    token = exchange(api, "tml-given")
    head, claims, signature = token.split(".")
    spoilt = {
        "signature": forged(token),
        "claims": f"{head}.{claims[:-2]}AA.{signature}",
        "other secret": jwt.encode(jwt.decode(token, options={"verify_signature": False}), bytes(32)),
        "no token": "eyJ0.x.y",
    }[spoil]
    answer = refusal(api, spoilt)
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    unsigned = jwt.encode(jwt.decode(token, options={"verify_signature": False}), None, "none")
    assert refusal(api, unsigned).status_code == 401


def test_a_token_ends_with_its_time_and_never_outlives_the_one_it_came_from(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.access.tokens, "lifetime", 1200.0)
    token = exchange(api, "tml-given")
    monkeypatch.setattr(api.access.tokens, "lifetime", 3600.0)
    child = exchange(api, token)
    assert status_with(api, token) == status_with(api, child) == 200
    with monkeypatch.context() as later:
        later.setattr("tinsmith.api.tokens.time", clock(1200.0))
        assert all("expired" in refusal(api, each).json()["detail"] for each in (token, child))
    with monkeypatch.context() as earlier:
        earlier.setattr("tinsmith.api.tokens.time", clock(-7200.0))
        of_then = exchange(api, "tml-given")
    assert 'error="invalid_token"' in refusal(api, of_then).headers["www-authenticate"]


def clock(seconds: float) -> SimpleNamespace:
    """For tokens alone: the server in this process needs the true time, too."""
    return SimpleNamespace(time=lambda: time.time() + seconds)


def test_a_token_ends_with_its_key(api: Api) -> None:
    key = create(api, "short-lived")
    assert await_status(api, key, 200)
    token = exchange(api, key)
    with api.client(key) as client:
        described = client.get("/auth/apikey/me").json()
        assert (described["name"], described["note"]) == ("short-lived", "user")
        assert client.delete("/auth/apikey/me").status_code == 200
    assert listed(api.settings.data_dir)["short-lived"]["state"] == "revoked"
    assert await_status(api, token, 401)
    assert "short-lived) is revoked" in refusal(api, token).json()["detail"]
    assert "www-authenticate" not in refusal(api, key).headers, "a new token would not help"


def test_a_key_of_the_settings_is_described_and_not_revoked(api: Api) -> None:
    assert api.http.get("/auth/apikey/me").json()["details"]["org_details"] == {"name": "tinsmith"}
    assert api.http.delete("/auth/apikey/me").status_code == 400
    assert status_with(api, "tml-given") == 200


def test_the_sdk_works_by_tokens_and_knows_who_it_is(api: Api) -> None:
    key = create(api, "who")
    assert await_status(api, key, 200)
    me = tinker.RestClient(base_url=api.base_url, api_key=key).whoami().result()
    assert me.user_urn == listed(api.settings.data_dir)["who"]["owner"]
    assert me.org_urn == "tml:organization:tinsmith"
    assert tinker.RestClient(base_url=api.base_url, api_key=key).list_training_runs().result().training_runs == []


def test_the_sdk_survives_a_change_of_the_servers_secret(api: Api) -> None:
    client = tinker.RestClient(base_url=api.base_url, api_key="tml-given")
    assert client.list_sessions().result() is not None
    api.access.tokens._secret = bytes(32)
    api.access.tokens._read.clear()
    assert client.list_sessions().result() is not None
    api.access.tokens._secret = None


def test_servers_without_keys_or_without_tokens_serve_the_sdk(tmp_path: Path) -> None:
    with running_api(tmp_path / "open") as free:
        assert tinker.RestClient(base_url=free.base_url, api_key="tml-any").whoami().result().user_urn == "local"
    with running_api(tmp_path / "plain", token_minutes=0.0) as plain:
        assert plain.post("/auth/token").status_code == 400
        client = tinker.RestClient(base_url=plain.base_url, api_key="tml-any")
        assert client.list_sessions().result().sessions == []
        with pytest.raises(RuntimeError, match="JWT"):
            client.whoami().result()


def rotate(api: Api, name: str, *options: str) -> str:
    result = tinsmith("rotate", name, *options, folder=api.settings.data_dir)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_a_rotated_key_has_a_new_secret_and_everything_else_as_it_was(api: Api) -> None:
    old = create(api, "rotated", "--admin", "--max-models", "3")
    assert await_status(api, old, 200)
    before = listed(api.settings.data_dir)["rotated"]
    with api.client(old) as client:
        session = client.post("/create_session", json={"tags": []}).json()["session_id"]
    new = rotate(api, "rotated")
    assert await_status(api, new, 200) and await_status(api, old, 401)
    rows = json.loads(tinsmith("list", "--json", folder=api.settings.data_dir).stdout)
    after = next(row for row in rows if row["name"] == "rotated" and row["state"] == "active")
    same = ("name", "owner", "role", "max_models", "expires_at")
    assert {field: after[field] for field in same} == {field: before[field] for field in same}
    with api.client(new) as client:
        assert client.post("/session_heartbeat", json={"session_id": session}).status_code == 200


def test_a_rotated_key_can_stay_good_for_a_while(api: Api) -> None:
    old = create(api, "slow")
    new = rotate(api, old, "--overlap", "2")
    assert await_status(api, new, 200) and await_status(api, old, 200)
    rows = listed(api.settings.data_dir)
    assert rows[f"slow ({old[:12]})"]["expires_at"] is not None and rows["slow"]["expires_at"] is None
    entries = api.database.read(audit.entries, rows["slow"]["owner"], 0.0, time.time() + 1)
    assert [entry.event for entry in entries] == ["key_create", "key_create", "key_rotate"]
    assert entries[-1].details["instead_of"] == old[:12]
