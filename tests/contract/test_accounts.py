"""Audit, usage, search, projects, traces, copies and clients of samplers, over HTTP against a canned engine."""

import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import tinker
from tinker import types

from tests.contract.api_fixtures import Api, forged, get, running_api
from tests.contract.test_api_rules import message, sample
from tinsmith.store import keys, queue, records, tables, usage
from tinsmith.wire.jobs import Usage

ANNA, BEN = "tml-anna", "tml-ben"
PARAMS = types.SamplingParams(max_tokens=1)
PRICES = {"price_train": 2.0, "price_sample": 8.0, "price_storage": 3.6}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("accounts")
    with running_api(folder, api_keys=(ANNA, BEN), **PRICES) as api:
        api.http = api.client(ANNA)
        yield api


@pytest.fixture
def session(api: Api) -> str:
    return api.session()


@pytest.fixture
def ben(api: Api) -> Iterator[httpx.Client]:
    with api.client(BEN) as client:
        yield client


def owner(key: str) -> str:
    return keys.owner_of(keys.digest_of(key))


def saved(api: Api, model: str, folder: Path, name: str = "mine", seq: int = 1) -> str:
    """A checkpoint with files."""
    path: str = api.result(api.post("/save_weights", model_id=model, seq_id=seq, path=name)).json()["path"]
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "manifest.json").write_text("{}")
    api.database.write(records.update_checkpoint, path, folder=str(folder))
    return path


def checkpoint_url(path: str, action: str = "") -> str:
    run, segment, name = path.removeprefix("tinker://").split("/")
    return f"/training_runs/{run}/checkpoints/{segment}/{name}{action}"


def test_acts_on_checkpoints_and_projects_are_in_the_audit_log(api: Api, session: str, tmp_path: Path) -> None:
    path = saved(api, api.model(session), tmp_path / "a")
    api.http.post(checkpoint_url(path, "/publish"))
    api.http.put(checkpoint_url(path, "/ttl"), json={"ttl_seconds": 3600})
    api.http.delete(checkpoint_url(path, "/publish"))
    api.http.put(f"/sessions/{session}/project", json={"project_id": "p"})
    api.http.delete(checkpoint_url(path))
    mine = acts_on(api, session)
    events = ["create", "publish", "set_ttl", "unpublish", "delete"]
    assert [entry["event"] for entry in mine if entry["tinker_path"]] == [f"checkpoint_{event}" for event in events]
    assert mine[0]["event_details"]["owner"] == owner(ANNA)
    (assigned,) = acts_on(api, session, event_type="projects")
    assert assigned["event_details"]["project_id"] == "p"
    assert acts_on(api, session, day="2026-07-13") == []
    for wrong in ({"day": "tomorrow"}, {"event_type": "cats"}):
        assert api.http.get("/audit", params=wrong).status_code == 400


def acts_on(api: Api, named: str, **query: str) -> list[dict[str, Any]]:
    """The entries of the audit log that name something of this test's."""
    entries = api.http.get("/audit", params=query).json()["entries"]
    return [entry for entry in entries if named in json.dumps(entry)]


def window(hours: int = 3) -> dict[str, str]:
    begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    return {"starting_on": begin.isoformat(), "ending_before": (begin + timedelta(hours=hours)).isoformat()}


def test_usage_is_reported_by_the_hour_with_prices(api: Api, session: str) -> None:
    api.http.put(f"/sessions/{session}/project", json={"project_id": "p"})
    used = Usage(owner(ANNA), f"{session}:train:0:1", {"train": 500_000, "prefill": 7, "sample": 250_000})
    api.database.write(usage.add, "tiny", [used], time.time())
    account = usage.Account(owner(ANNA), session, "tiny")
    api.database.write(usage.begin_storage, f"tinker://{session}", account, 10**9, time.time() - 1800)
    report = api.http.get("/billing/usage/events", params=window()).json()
    events = [event for event in report["data"] if event["session_id"] == session]
    train, sampled, prefill = (event for event in events if "token_count" in event["event_info"])
    assert train["event_info"] == {"type": "training", "token_count": 500_000}
    assert (train["estimated_cost_usd"], train["effective_rate_usd_per_million_tokens"]) == (1.0, 2.0)
    assert (train["project_id"], train["user_id"], train["base_model"]) == ("p", owner(ANNA), "tiny")
    assert sampled["estimated_cost_usd"] == 2.0
    assert prefill["event_info"] == {"type": "sampling_prefill", "cached": False, "token_count": 7}
    assert prefill["estimated_cost_usd"] is None
    stored = [event for event in events if event["event_info"]["type"] == "storage"]
    hours = sum(event["event_info"]["gigabyte_hours"] for event in stored)
    assert hours == pytest.approx(0.5, abs=0.1)
    assert sum(event["estimated_cost_usd"] for event in stored) == pytest.approx(hours * 3.6 / 720)
    assert [event["event_info"]["count"] for event in events if event["event_info"]["type"] == "checkpoint"] == [1]
    assert report["sessions"][session] == {"user_metadata": {}}


def test_what_others_use_is_nobodys_business_but_an_admins(api: Api, session: str, ben: httpx.Client) -> None:
    used = Usage(owner(ANNA), f"{session}:train:0:1", {"train": 5})
    api.database.write(usage.add, "tiny", [used], time.time())
    assert ben.get("/billing/usage/events", params=window()).json() == {
        "data": [],
        "sessions": {},
        "cost_data_through": None,
    }
    assert ben.get("/audit").json() == {"entries": []}
    assert ben.get("/billing/usage/checkpoints/current").json()["data"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"starting_on": "yesterday"},
        {"starting_on": "2026-07-13T00:30:00Z"},
        {"starting_on": "2026-07-13T00:00:00"},
        {"starting_on": "2999-07-13T00:00:00Z", "ending_before": "2999-07-14T00:00:00Z"},
        {"starting_on": "0001-01-01T00:00:00+14:00"},
        {"ending_before": "9999-12-31T23:00:00-01:00"},
        {"ending_before": "2026-07-01T00:00:00Z"},
    ],
)
def test_windows_that_cannot_be_reported_are_refused(api: Api, wrong: dict[str, str]) -> None:
    query = {"starting_on": "2026-07-13T00:00:00Z", "ending_before": "2026-07-28T00:00:00Z"} | wrong
    assert api.http.get("/billing/usage/events", params=query).status_code == 400


def test_what_is_stored_now_is_reported_by_project(api: Api, tmp_path: Path) -> None:
    session = api.session()
    api.http.put(f"/sessions/{session}/project", json={"project_id": "shelf"})
    model = api.model(session)
    for seq, name in enumerate("ab", 1):
        saved(api, model, tmp_path / name, name, seq)
    found = api.http.get("/billing/usage/checkpoints/current", params={"project_id": "shelf"}).json()
    (row,) = found["data"]
    assert (row["checkpoint_count"], row["size_bytes"], row["org_user_urn"]) == (2, 246, owner(ANNA))
    assert row["estimated_monthly_cost_usd"] == pytest.approx(3.6 * 246e-9)
    assert found["effective_rate_usd_per_gigabyte_month"] == 3.6
    assert len(api.http.get("/billing/usage/checkpoints/current").json()["data"]) >= 1
    assert api.http.get("/billing/usage/checkpoints/current", params={"project_id": "\0"}).status_code == 400


def create(api: Api, **fields: Any) -> str:
    return str(api.post("/create_session", tags=[], **fields).json()["session_id"])


def search(client: httpx.Client, **query: Any) -> list[str]:
    answer = client.post("/sessions/search", json=query)
    assert answer.status_code == 200, answer.text
    return [session["session_id"] for session in answer.json()["sessions"]]


def test_sessions_are_found_by_what_they_are(api: Api, ben: httpx.Client) -> None:
    night = create(api, display_name="Nightly 100% RUN", user_metadata={"team": "a", "n": "1"}, project_id="x")
    other = create(api, display_name="nightly", user_metadata={"team": "a"})
    done = create(api, display_name="nightly done")
    api.post(f"/sessions/{done}/finish", reason={"type": "errored"}, detail="no luck")
    assert search(api.http, display_name="run nightly") == [night]
    assert search(api.http, display_name="100%") == [night]
    assert search(api.http, display_name="NIGHTLY") == [done, other, night]
    assert search(api.http, user_metadata={"team": "a"}) == [other, night]
    assert search(api.http, user_metadata={"team": "a", "n": "1"}) == [night]
    assert search(api.http, project_ids=["x"]) == [night]
    assert search(api.http, session_id=other, display_name="100%") == [other, night]
    assert search(api.http, display_name="nightly", statuses=[{"type": "active"}]) == [other, night]
    finished = [{"type": "client_finished", "reasons": ["success"]}]
    assert search(api.http, display_name="nightly", statuses=finished) == []
    ended = [{"type": "client_finished"}, {"type": "failed"}]
    assert search(api.http, display_name="nightly", statuses=ended) == [done]
    assert search(ben, display_name="nightly", owner={"type": "accessible"}) == []
    assert search(ben, owner={"type": "user", "owner_urns": [owner(ANNA)]}) == []
    assert search(api.http, owner={"type": "user", "owner_urns": [owner(ANNA)]}, session_id=done) == [done]
    (summary,) = api.http.post("/sessions/search", json={"session_id": done}).json()["sessions"]
    assert summary["status"] == {"type": "client_finished", "reason": {"type": "errored"}, "detail": "no luck"}
    assert (summary["project_id"], summary["checkpoints_count"], summary["owner"]) == ("default", 0, owner(ANNA))


def test_a_search_is_read_page_by_page(api: Api) -> None:
    made = [create(api, display_name="paged") for _ in range(5)]
    found: list[str] = []
    cursor = None
    while True:
        query = {"display_name": "paged", "limit": 2} | ({"cursor": cursor} if cursor else {})
        page = api.http.post("/sessions/search", json=query).json()
        found += [session["session_id"] for session in page["sessions"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert found == made[::-1]
    wrong = {"last_created_at": "then", "last_session_id": "s"}
    assert api.post("/sessions/search", cursor=wrong).status_code == 400


def test_a_silent_sessions_state_is_unknown(api: Api, session: str) -> None:
    api.database.write(silence, session)
    (summary,) = api.http.post("/sessions/search", json={"session_id": session}).json()["sessions"]
    assert summary["status"] is None


def silence(conn: sa.Connection, session: str) -> None:
    conn.execute(sa.update(tables.sessions).where(tables.sessions.c.id == session).values(seen_at=1.0))


def test_a_trace_holds_every_request_of_a_session_and_needs_no_key(api: Api, session: str) -> None:
    model, sampler = api.model(session), api.sampler(session)
    api.result(api.http.post("/forward_backward", content=message(model, 1)))
    api.result(sample(api, sampler, 0, sampling_params={"max_tokens": 3}))
    answer = api.http.get(f"/sessions/{session}/trace_export").json()
    assert answer["status"] == "ready"
    events = get(answer["url"]).json()["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    began = [(threads[event["tid"]], event["name"]) for event in events if event["ph"] == "b"]
    assert began == [(model, "create_model"), (model, "forward_backward"), (sampler, "sample")]
    assert len([event for event in events if event["ph"] == "e"]) == 3
    base, token = answer["url"].rsplit("/", 1)
    assert get(f"{base}/{forged(token)}").status_code == 404


def test_a_traces_address_expires(api: Api, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.api.traces.LIFETIME_SECONDS", -1.0)
    url = api.http.get(f"/sessions/{session}/trace_export").json()["url"]
    assert get(url).status_code == 410


def copy(client: httpx.Client, source: str, key: str = "", **fields: Any) -> httpx.Response:
    headers = {"X-Idempotency-Key": key} if key else {}
    return client.post("/copy_weights", json={"source_path": source, **fields}, headers=headers)


def test_a_copy_has_the_same_files_and_outlives_its_original(api: Api, session: str, tmp_path: Path) -> None:
    source = saved(api, api.model(session), tmp_path / "files")
    answers = [copy(api.http, source, "once", destination_project_id="archive", ttl_seconds=3600) for _ in range(2)]
    path = answers[0].json()["tinker_path"]
    assert path == answers[1].json()["tinker_path"] != source
    found = api.database.read(records.find_checkpoint, path)
    assert found is not None and found.expires_at is not None
    assert Path(found.folder, "adapter_model.safetensors").samefile(tmp_path / "files" / "adapter_model.safetensors")
    assert len(list(Path(found.folder).parent.iterdir())) == 1
    api.http.delete(checkpoint_url(source))
    assert Path(found.folder, "adapter_model.safetensors").read_bytes() == b"weights"
    run = path.removeprefix("tinker://").partition("/")[0]
    assert api.post("/optim_step", model_id=run, seq_id=1, adam_params={}).status_code == 410
    assert search(api.http, project_ids=["archive"]) == [run.partition(":")[0]]
    assert copy(api.http, path, destination_project_id="archive").json()["tinker_path"] != path


def test_a_copy_touches_no_folder_of_a_session_that_is_not_there(api: Api, session: str, tmp_path: Path) -> None:
    source = saved(api, api.model(session), tmp_path / "files")
    outside = tmp_path / "outside"
    relative = os.path.relpath(outside, api.settings.data_dir / "checkpoints")
    for place in (f"{outside}/run", f"{relative}/run"):
        assert copy(api.http, source, session_id=place, model_seq_id=0).status_code == 404
    assert not outside.exists()


def test_a_copy_into_a_session_takes_a_free_run_of_it(api: Api, session: str, tmp_path: Path) -> None:
    model = api.model(session)
    source = saved(api, model, tmp_path / "files")
    place = {"session_id": session, "model_seq_id": 1}
    path = copy(api.http, source, **place).json()["tinker_path"]
    assert path == f"tinker://{session}:train:1/weights/mine"
    assert copy(api.http, source, **place).json()["tinker_path"] == path, "a retry"
    assert copy(api.http, source, session_id=session, model_seq_id=0).status_code == 400
    assert copy(api.http, source).status_code == 400
    assert copy(api.http, source, session_id="nobodys", model_seq_id=0).status_code == 404


def test_anothers_checkpoint_is_copied_if_published_or_with_a_token_of_its_owner(
    api: Api, session: str, ben: httpx.Client, tmp_path: Path
) -> None:
    source = saved(api, api.model(session), tmp_path / "files")
    place = {"destination_project_id": "bens"}
    assert copy(ben, source, **place).status_code == 404
    assert copy(ben, source, weights_access_token="tml-wrong", **place).status_code == 401
    token = api.http.post("/auth/token", json={}).json()["jwt"]
    for access in (ANNA, token):
        path = copy(ben, source, weights_access_token=access, **place).json()["tinker_path"]
        assert ben.get(checkpoint_url(path, "")[: checkpoint_url(path).index("/checkpoints")]).status_code == 200
        assert api.post("/weights_info", tinker_path=path).status_code == 404
    assert copy(ben, source, **place).status_code == 404
    api.http.post(checkpoint_url(source, "/publish"))
    assert copy(ben, source, **place).status_code == 200
    read = [entry["tinker_path"] for entry in acts_on(api, session) if entry["event"] == "checkpoint_read"]
    assert set(read) == {source}


def test_another_tenants_token_opens_a_checkpoint_for_training_on(
    api: Api, session: str, ben: httpx.Client, tmp_path: Path
) -> None:
    source = saved(api, api.model(session), tmp_path / "files")
    theirs = ben.post("/create_session", json={"tags": []}).json()["session_id"]
    load = {"session_id": theirs, "model_seq_id": 0, "path": source, "optimizer": False}
    assert ben.post("/load_weights", json=load).status_code == 404
    assert ben.post("/load_weights", json=load | {"weights_access_token": ANNA}).status_code == 200
    again = {"model_id": f"{theirs}:train:0", "path": source, "optimizer": False}
    assert ben.post("/load_weights", json=again | {"seq_id": 1}).status_code == 404
    assert ben.post("/load_weights", json=again | {"seq_id": 2, "weights_access_token": ANNA}).status_code == 200


def ends(api: Api, sampler: str, cursor: int, client: int = 0, **fields: Any) -> dict[str, Any]:
    target = {"sampling_session_id": sampler, "cloned_sampler_id": client}
    answer = api.post("/retrieve_futures", target=target, prev_cursor=cursor, **fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_client_hears_once_of_each_of_its_samples_ends(api: Api, session: str) -> None:
    sampler = api.sampler(session)
    clone = int(api.post("/join_sampling_session", sampling_session_id=sampler).json()["client_counter"])
    assert clone == 1
    heard, cursor = [], 0
    for seq in (0, 1, clone * 10**9):
        sample(api, sampler, seq, sampling_params={"max_tokens": 1})
    while len(heard) < 2:
        news = ends(api, sampler, cursor)
        heard += news["completions"]
        assert (news["cursor"] > cursor) == bool(news["completions"])
        cursor = news["cursor"]
    assert sorted(end["request_id"] for end in heard) == [f"{sampler}:0", f"{sampler}:1"]
    assert all(end["state"] == "finished" and end["response_payload_uncompressed_size"] > 0 for end in heard)
    assert ends(api, sampler, cursor, timeout=0) == {"completions": [], "cursor": cursor}
    while not (others := ends(api, sampler, 0, clone)["completions"]):
        pass
    (other,) = others
    assert other["request_id"] == f"{sampler}:{clone * 10**9}"


def test_a_question_is_held_until_something_ends_or_was_given_up(api: Api, session: str) -> None:
    sampler = api.sampler(session)
    with api.engine.working:
        submitted = sample(api, sampler, 0, sampling_params={"max_tokens": 1}).json()["request_id"]
        asked = threading.Thread(target=lambda: found.update(ends(api, sampler, 0)))
        found: dict[str, Any] = {}
        asked.start()
        while not api.waiters.held:
            time.sleep(0.01)
        api.post("/cancel_future", request_id=submitted)
        asked.join()
    (end,) = found["completions"]
    assert (end["request_id"], end["state"]) == (submitted, "failed")
    assert api.database.read(queue.find, submitted) is not None


def test_the_sdk_hears_of_all_its_samples_at_once_also_as_a_clone(tmp_path: Path) -> None:
    with running_api(tmp_path, batched_polling=True) as api:
        asked: list[str] = []
        with tinker.ServiceClient(base_url=api.base_url, api_key="tml-any") as service:
            sampler = service.create_sampling_client(base_model="tiny").result()
            clones = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
            for client in (sampler, *clones):
                futures = [client.sample(types.ModelInput.from_ints([1, 2, 3]), 1, PARAMS) for _ in range(3)]
                assert all(future.result(60).sequences[0].tokens == [7] for future in futures)
            asked = [header.request_id for header, _ in api.engine.jobs if header.kind == "sample"]
        numbers = {int(request_id.rpartition(":")[2]) // 10**9 for request_id in asked}
        assert numbers == {0, 1, 2}, "each client numbers its own samples"
