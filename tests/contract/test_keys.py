"""Keys made, listed and revoked by the command line while a server runs: who is let in, and how much they may do."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import tinker
from typer.testing import CliRunner, Result

from tests.contract.api_fixtures import Api, running_api
from tests.contract.test_api_rules import PROMPT, message
from tinsmith import serve
from tinsmith.api.pacing import BURST_SECONDS, LARGEST_SECONDS, LONGEST_WAIT, Pacing
from tinsmith.cli import app
from tinsmith.config import Settings
from tinsmith.errors import BusyError, ConfigError, LimitError, NotFoundError, UserError
from tinsmith.store import keys, records, tables
from tinsmith.store.database import Database

PATIENCE = 30.0  # seconds in which a running server must have heard of a change


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server with a key in its settings, which looks for others more often than usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinsmith.api.auth.FRESH_SECONDS", 0.1)
        with running_api(tmp_path_factory.mktemp("api"), api_keys=("tml-given",)) as api:
            api.http = api.client("tml-given")
            yield api


def tinsmith(*arguments: str, folder: Path) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(folder)])


def create(api: Api, name: str, *arguments: str) -> str:
    result = tinsmith("create", name, *arguments, folder=api.settings.data_dir)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(tinsmith("list", "--json", folder=folder).stdout)
    return {row["name"]: row for row in rows}


def status_with(api: Api, key: str) -> int:
    with api.client(key) as client:
        return client.get("/sessions").status_code


def await_status(api: Api, key: str, status: int) -> bool:
    """Whether the server answers a key so before long."""
    deadline = time.monotonic() + PATIENCE
    while (found := status_with(api, key)) != status and time.monotonic() < deadline:
        time.sleep(0.05)
    return found == status


@pytest.fixture
def entered(api: Api, request: pytest.FixtureRequest) -> Iterator[Api]:
    """The server as the holder of a new key, with the limits of the test's parameter, meets it."""
    name = f"key of {request.node.name}"[:100]
    key = create(api, name, *getattr(request, "param", ()))
    assert await_status(api, key, 200)
    previous, api.http = api.http, api.client(key)
    yield api
    api.http.close()
    api.http = previous


def test_a_key_works_as_soon_as_it_is_made_and_no_longer_than_it_is_revoked(api: Api) -> None:
    assert status_with(api, "tml-given") == 200
    key = create(api, "anna")
    assert await_status(api, key, 200)
    folder = api.settings.data_dir
    assert tinsmith("revoke", "anna", folder=folder).stdout == f"revoked {key[:12]}… (anna)\n"
    assert await_status(api, key, 401)
    with api.client(key) as client:
        assert "is revoked" in client.get("/sessions").json()["detail"]
    assert listed(folder)["anna"]["state"] == "revoked"
    assert status_with(api, "tml-given") == 200


def test_an_expired_key_says_so(api: Api) -> None:
    key = create(api, "short", "--expires", "1")
    assert await_status(api, key, 200)
    api.database.write(change, "short", expires_at=time.time() - 1)
    assert await_status(api, key, 401)
    with api.client(key) as client:
        assert "(short) is expired" in client.get("/sessions").json()["detail"]


def change(conn: sa.Connection, /, name: str, **values: object) -> None:
    conn.execute(sa.update(tables.keys).where(tables.keys.c.name == name).values(values))


def test_the_sdk_takes_a_created_key(api: Api) -> None:
    key = create(api, "sdk")
    assert await_status(api, key, 200)
    client = tinker.RestClient(base_url=api.base_url, api_key=key)
    assert client.list_training_runs().result().training_runs == []


def test_a_list_shows_everything_but_the_secret(api: Api) -> None:
    limits = ("--tokens-per-second", "500", "--max-models", "2", "--max-storage", "1000000", "--weight", "2.5")
    key = create(api, "listed", "--admin", "--expires", "3", *limits)
    text = tinsmith("list", folder=api.settings.data_dir).stdout
    row = listed(api.settings.data_dir)["listed"]
    assert key[12:] not in text + json.dumps(row)
    (line,) = [line for line in text.splitlines() if line.startswith("listed ")]
    assert key[:12] in line and row["owner"] in line
    assert "admin" in line and "500 tokens/s, 2 models, 1,000,000 bytes" in line
    assert row["weight"] == 2.5 and line.endswith(" 2.5")
    assert (row["role"], row["state"], row["used_at"], row["max_models"]) == ("admin", "active", None, 2)
    assert row["expires_at"] > row["created_at"]


def test_a_keys_use_is_noted_but_not_with_every_request(api: Api) -> None:
    key = create(api, "used")
    assert await_status(api, key, 200)
    first = listed(api.settings.data_dir)["used"]["used_at"]
    assert first is not None
    with statements(api.database._writing) as written:
        assert [status_with(api, key) for _ in range(20)] == [200] * 20
    assert not any("UPDATE keys" in statement for statement in written)
    api.database.write(change, "used", used_at=time.time() - 61)
    api.access._noted.clear()
    deadline = time.monotonic() + PATIENCE
    while listed(api.settings.data_dir)["used"]["used_at"] < first and time.monotonic() < deadline:
        status_with(api, key)
    assert listed(api.settings.data_dir)["used"]["used_at"] >= first


@contextmanager
def statements(engine: sa.Engine) -> Iterator[list[str]]:
    """What the database is asked through SQLAlchemy until the block ends."""
    found: list[str] = []

    def note(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        found.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    yield found
    sa.event.remove(engine, "before_cursor_execute", note)


def test_keys_that_nobody_knows_cost_the_database_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.api.auth.FRESH_SECONDS", 3600.0)
    looks = []

    def look(conn: sa.Connection, list_keys: Callable[[sa.Connection], list[keys.Key]] = keys.list_keys) -> object:
        looks.append(conn)
        return list_keys(conn)

    monkeypatch.setattr(keys, "list_keys", look)
    monkeypatch.setattr(api.access, "_read_at", -math.inf)
    assert {status_with(api, f"tml-guess-{number}") for number in range(50)} == {401}
    assert len(looks) == 1
    assert len(api.access._stored) == len(listed(api.settings.data_dir))


def test_a_loopback_server_is_open_until_its_first_key_and_then_for_ever_closed(tmp_path: Path) -> None:
    with running_api(tmp_path) as api:
        session = api.session()
        key = create(api, "first")
        assert await_status(api, "tml-any", 401)
        assert status_with(api, key) == 200
        tinsmith("revoke", "first", folder=tmp_path)
        assert await_status(api, key, 401)
        assert status_with(api, "tml-any") == 401
    with running_api(tmp_path, no_auth=True) as api:
        assert session in api.http.get("/sessions").json()["sessions"]


def test_a_reachable_server_that_loses_its_last_key_lets_nobody_in(tmp_path: Path) -> None:
    with running_api(tmp_path, host="0.0.0.0") as api:
        assert status_with(api, "tml-any") == 401


def test_the_owner_of_a_key_in_the_settings_stays_who_it_was(api: Api) -> None:
    session = api.session()
    found = api.database.read(lambda conn: conn.scalar(sa.select(tables.sessions.c.owner).filter_by(id=session)))
    assert found == "8769e163620e1262"


def keys_of(settings: Settings) -> int | None:
    """How many keys clients of a server may use; None if any will do."""
    return serve._look_up(settings)[1]


def test_a_server_counts_its_keys_before_it_starts(tmp_path: Path) -> None:
    outside, inside = Settings(data_dir=tmp_path, host="0.0.0.0"), Settings(data_dir=tmp_path)
    with pytest.raises(ConfigError, match="tinsmith keys create"):
        keys_of(outside)
    assert keys_of(inside) is None
    assert keys_of(replace(outside, no_auth=True)) is None
    assert keys_of(replace(outside, api_keys=("tml-x",))) == 1
    tinsmith("create", "anna", folder=tmp_path)
    assert keys_of(outside) == keys_of(inside) == 1
    tinsmith("revoke", "anna", folder=tmp_path)
    assert keys_of(inside) == 0
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        keys_of(outside)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("revoke", "nobody"), NotFoundError, "'nobody'"),
        (("create", "tml-name"), UserError, "tml-name"),
        (("create", "given"), UserError, "'given' already"),
        (("list", "--data-dir", "/nonexistent"), ConfigError, "/nonexistent"),
    ],
)
def test_what_cannot_be_done_with_keys_is_explained(
    tmp_path: Path, arguments: tuple[str, ...], error: type[Exception], said: str
) -> None:
    tinsmith("create", "given", folder=tmp_path)
    folder = () if "--data-dir" in arguments else ("--data-dir", str(tmp_path))
    result = CliRunner().invoke(app, ["keys", *arguments, *folder])
    assert isinstance(result.exception, error)
    assert said in str(result.exception)


@pytest.mark.parametrize("option", [("--expires", "0"), ("--max-models", "0"), ("--tokens-per-second", "-1")])
def test_limits_must_be_positive(tmp_path: Path, option: tuple[str, str]) -> None:
    assert tinsmith("create", "anna", *option, folder=tmp_path).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_keys_can_be_made_for_a_database_by_its_url_or_the_servers_settings_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    file = tmp_path / "server.toml"
    file.write_text(f'database_url = "{url}"\nhost = "0.0.0.0"\n')
    runner = CliRunner()
    assert runner.invoke(app, ["keys", "create", "anna", "--database-url", url]).stdout.startswith("tml-")
    assert "anna" in runner.invoke(app, ["keys", "list", "--config", str(file)]).stdout
    database = Database(url)
    assert [key.name for key in database.read(keys.list_keys)] == ["anna"]
    database.close()


def new_model(api: Api, session: str, number: int) -> httpx.Response:
    return api.post(
        "/create_model", session_id=session, model_seq_id=number, base_model="tiny", lora_config={"rank": 8}
    )


@pytest.mark.parametrize("entered", [("--max-models", "2")], indirect=True)
def test_models_beyond_a_keys_limit_are_refused_at_once_until_a_session_ends(entered: Api) -> None:
    session, other = entered.session(), entered.session()
    assert [new_model(entered, session, 0).status_code, new_model(entered, other, 0).status_code] == [200, 200]
    refused = new_model(entered, session, 1)
    assert refused.status_code == 403
    assert "2 open models of at most 2" in refused.json()["detail"]
    assert session in refused.json()["detail"]
    assert new_model(entered, session, 0).status_code == 200, "a retry is no new model"
    saved = entered.post("/save_weights", model_id=f"{session}:train:0", seq_id=1, path="a")
    path = entered.result(saved).json()["path"]
    load = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
    assert entered.post("/load_weights", **load).status_code == 403
    entered.post(f"/sessions/{other}/finish", reason={"type": "success"})
    assert entered.post("/load_weights", **load).status_code == 200
    entered.database.write(records.update_model, f"{session}:train:0", state="failed")
    assert new_model(entered, session, 2).status_code == 200


@pytest.mark.parametrize("entered", [("--tokens-per-second", "10")], indirect=True)
def test_training_and_samples_over_a_keys_rate_are_to_be_sent_again(entered: Api) -> None:
    session = entered.session()
    model, sampler = entered.model(session), entered.sampler(session)
    sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {"max_tokens": 5}}
    assert entered.http.post("/forward_backward", content=message(model, 1, count=200)).status_code == 200
    for _ in range(2):
        refused = [
            entered.http.post("/forward_backward", content=message(model, 2, count=3)),
            entered.post("/asample", **sample),
        ]
        assert [answer.status_code for answer in refused] == [429, 429]
        assert all(5 < int(answer.headers["retry-after"]) <= 11 for answer in refused)
        assert all(answer.headers["x-should-retry"] == "true" for answer in refused)
    assert entered.post("/optim_step", model_id=model, seq_id=3, adam_params={}).status_code == 200
    entered.pacing._buckets.clear()  # as if the time had passed
    late = entered.http.post("/forward_backward", content=message(model, 2, count=3))
    assert entered.result(late).status_code == 200
    assert entered.post("/asample", **sample).status_code == 200
    assert [seq for seq, _, _ in entered.engine.bodies(model)][:3] == [0, 1, 3]


@pytest.mark.parametrize("entered", [("--tokens-per-second", "1")], indirect=True)
def test_a_request_that_no_waiting_could_help_is_refused_for_good(entered: Api) -> None:
    model = entered.model(entered.session())
    refused = entered.http.post("/forward_backward", content=message(model, 1, count=250))
    assert (refused.status_code, "at most 240" in refused.json()["detail"]) == (403, True)
    assert entered.http.post("/forward_backward", content=message(model, 2, count=100)).status_code == 200


def test_a_bucket_lets_its_rate_through_and_a_burst() -> None:
    now, taken, waits = 1000.0, 0, []
    pacing = Pacing(lambda: now)
    for _ in range(2000):
        try:
            pacing.spend("anna", 70, 100.0)
            taken += 70
        except BusyError as error:
            waits.append(error.retry_seconds)
        now += 0.1
    assert 100 * 200 <= taken <= 100 * (200 + BURST_SECONDS) + 70
    assert set(waits) == {1.0}


def test_a_debt_is_paid_before_anything_else_is_taken_and_nobody_elses_business() -> None:
    now = 0.0
    pacing = Pacing(lambda: now)
    pacing.spend("anna", int(10 * LARGEST_SECONDS), 10.0)
    with pytest.raises(BusyError) as early:
        pacing.spend("anna", 1, 10.0)
    now = LARGEST_SECONDS - BURST_SECONDS - 1
    with pytest.raises(BusyError) as late:
        pacing.spend("anna", 1, 10.0)
    assert (early.value.retry_seconds, late.value.retry_seconds) == (LONGEST_WAIT, 2.0)
    pacing.spend("ben", 1, 10.0)
    pacing.spend("anna", 10**9, None)
    now += 2.0
    pacing.spend("anna", 1, 10.0)
    with pytest.raises(LimitError, match=r"2401 tokens.* at most 2400"):
        pacing.spend("anna", 2401, 10.0)
