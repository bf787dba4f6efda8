"""What clients of OpenAI and Anthropic are promised beyond good answers: what is refused, what a stream never does."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from tests.contract.api_fixtures import CAPABILITIES, FOREVER, Api, running_api, saying
from tinsmith.api.chat.vocabulary import Vocabulary
from tinsmith.demo import tiny_folder
from tinsmith.store import queue, records
from tinsmith.store.tables import jobs, sessions
from tinsmith.wire.jobs import Outcome
from tinsmith.wire.packing import SampleCall
from tinsmith.wire.progress import Progress

WORDS = Vocabulary(tiny_folder())
TEXT = "Two and two are four. 🙂"
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
PLAIN = httpx.Client(timeout=FOREVER, verify=False, trust_env=False)  # certificates would take longer than all requests
CHAT, TEXTS, MESSAGES = "/oai/api/v1/chat/completions", "/oai/api/v1/completions", "/anthropic/api/v1/messages"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    capable = replace(CAPABILITIES, vocab_size=1280)
    with running_api(tmp_path_factory.mktemp("chat"), capable, api_keys=("tml-test", "tml-other")) as api:
        api.engine.says = [*WORDS.encode(TEXT), *WORDS.encode("<|im_end|>")]
        yield api


def ask(api: Api, path: str, body: dict[str, Any], key: str = "tml-test") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return PLAIN.post(api.base_url + path, json=body, headers=headers)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and message, in either dialect."""
    return answer.status_code, answer.json()["error"]["message"]


# Whole answers


def test_a_chat_says_what_was_sampled_without_the_mark_of_its_end(api: Api) -> None:
    body = ask(api, CHAT, ASK).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    prompt = len(WORDS.encode(WORDS.template.render(ASK["messages"])))
    counted = body["usage"]
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (prompt, len(api.engine.says or ()))
    assert counted["prompt_tokens_details"] == {"cached_tokens": 5}


def test_the_engine_is_asked_for_exactly_what_the_client_asked_for(api: Api) -> None:
    params = {"n": 3, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 11, "stop": ["x", "\n"]}
    ask(api, CHAT, ASK | params | {"logprobs": True, "top_logprobs": 2})
    call = SampleCall.from_bytes(api.engine.jobs[-1][1])
    assert (call.num_samples, call.max_tokens, call.temperature, call.top_p, call.seed) == (3, 7, 0.5, 0.9, 11)
    assert (call.stop_strings, call.stop_at_eos, call.topk_sample_logprobs, call.stream) == (
        ("x", "\n"),
        True,
        2,
        False,
    )
    assert call.prompt_P.tolist() == WORDS.encode(WORDS.template.render(ASK["messages"]))
    ask(api, TEXTS, {"model": "tiny", "prompt": "Hello"})
    call = SampleCall.from_bytes(api.engine.jobs[-1][1])
    assert (call.prompt_P.tolist(), call.max_tokens) == (WORDS.encode("Hello", specials=True), 16)
    told = {"system": "Be kind.", "max_tokens": 9, "top_k": 4, "stop_sequences": ["!"]}
    ask(api, MESSAGES, ASK | told)
    call = SampleCall.from_bytes(api.engine.jobs[-1][1])
    assert (call.max_tokens, call.top_k, call.stop_strings) == (9, 4, ("!",))
    system = {"role": "system", "content": "Be kind."}
    assert call.prompt_P.tolist() == WORDS.encode(WORDS.template.render([system, *ASK["messages"]]))


def test_an_answer_that_has_begun_goes_on(api: Api) -> None:
    begun = [*ASK["messages"], {"role": "assistant", "content": "It is"}]
    ask(api, MESSAGES, ASK | {"messages": begun, "max_tokens": 5})
    prompt = WORDS.decode(SampleCall.from_bytes(api.engine.jobs[-1][1]).prompt_P.tolist(), specials=True)
    assert prompt.endswith("<|im_start|>assistant\nIt is")


def test_several_prompts_of_texts_or_tokens_are_answered_in_order(api: Api) -> None:
    tokens = [WORDS.encode("A"), WORDS.encode("B and C")]
    for prompt in (["A", "B and C"], tokens):
        body = ask(api, TEXTS, {"model": "tiny", "prompt": prompt, "n": 2, "max_tokens": 2}).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert body["usage"]["prompt_tokens"] == sum(map(len, tokens))
    one = ask(api, TEXTS, {"model": "tiny", "prompt": tokens[1]}).json()
    assert one["usage"]["prompt_tokens"] == len(tokens[1])
    assert refusal(ask(api, TEXTS, {"model": "tiny", "prompt": [1, "A"]}))[0] == 400


def test_parts_of_a_message_are_lines_and_a_developer_is_the_system(api: Api) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    told = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    ask(api, CHAT, ASK | {"messages": told})
    prompt = WORDS.decode(SampleCall.from_bytes(api.engine.jobs[-1][1]).prompt_P.tolist(), specials=True)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>")


# Refusals


@pytest.mark.parametrize(
    ("path", "wrong", "named"),
    [
        (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty is 0.5"),
        (CHAT, {"logit_bias": {"5": 3}}, "logit_bias"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"temprature": 0.5}, "temprature"),
        (CHAT, {"min_p": 0.1}, "min_p"),
        (CHAT, {"n": 0}, "$.n"),
        (CHAT, {"n": 129}, "$.n"),
        (CHAT, {"temperature": -1}, "$.temperature"),
        (CHAT, {"top_logprobs": 3}, "logprobs is not true"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens differ"),
        (CHAT, {"messages": []}, "$.messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "no place for"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "belong to the server"),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 400}]}, "1 to 255 are allowed"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]}, "100"),
        (TEXTS, {"prompt": "a", "messages": None}, "messages"),
        (MESSAGES, {"max_tokens": 5, "thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        (MESSAGES, {"max_tokens": 5, "seed": 5}, "seed"),
        (MESSAGES, {}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(api: Api, path: str, wrong: dict[str, Any], named: str) -> None:
    before = len(api.engine.jobs)
    status, message = refusal(ask(api, path, ASK | wrong))
    assert status == 400
    assert named in message
    assert len(api.engine.jobs) == before


def test_what_changes_nothing_is_taken(api: Api) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "user": "anna",
        "store": False,
        "metadata": {},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tool_choice": "none",
    }
    assert ask(api, CHAT, ASK | neutral).status_code == 200
    cached = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    body = {"system": cached, "max_tokens": 3, "thinking": {"type": "disabled"}, "metadata": {"user_id": "a"}}
    assert ask(api, MESSAGES, ASK | body).status_code == 200


def test_errors_have_the_form_of_their_dialect(api: Api) -> None:
    body = ASK | {"max_tokens": 3}
    wrong = ask(api, CHAT, body, "tml-wrong")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    wrong = ask(api, MESSAGES, body, "tml-wrong")
    assert wrong.status_code == 401
    assert (wrong.json()["type"], wrong.json()["error"]["type"]) == ("error", "authentication_error")
    for path, missing in ((CHAT, "code"), (MESSAGES, "type"), ("/v1", "code")):
        nowhere = PLAIN.get(f"{api.base_url}{path}/no/such/place")
        assert nowhere.status_code == 404
        assert missing in nowhere.json()["error"]
    for path in (CHAT, MESSAGES):
        assert refusal(PLAIN.get(api.base_url + path))[0] == 405


def test_a_key_is_taken_from_either_header(api: Api) -> None:
    for headers in ({"Authorization": "Bearer tml-test"}, {"x-api-key": "tml-test"}):
        answer = PLAIN.get(f"{api.base_url}/v1/models", headers=headers)
        assert answer.status_code == 200


# Which weights


@pytest.fixture(scope="module")
def checkpoint(api: Api) -> str:
    model = api.model(api.session())
    for seq, kind in enumerate(("weights_for_sampler", "weights_external"), 1):
        api.result(api.post(f"/save_{kind}", model_id=model, seq_id=seq, path="mine"))
    return f"tinker://{model}/sampler_weights/mine"


def snapshot(api: Api) -> str:
    """What the last sample was drawn from."""
    sampler = api.database.read(records.find_sampler, api.engine.jobs[-1][0].subject)
    assert sampler is not None
    return sampler.snapshot


def test_a_model_is_the_base_or_a_checkpoint_and_never_another(api: Api, checkpoint: str) -> None:
    for name, expected in (("tiny", "base"), (checkpoint, checkpoint), (f"tiny;{checkpoint}", checkpoint)):
        answer = ask(api, CHAT, ASK | {"model": name})
        assert answer.json()["model"] == name
        assert snapshot(api) == expected
    before = len(api.engine.jobs)
    path = checkpoint.removesuffix("mine")
    for name, status in (
        ("gpt-4", 404),
        (f"{path}other", 404),
        (f"tiny;{path}other", 404),
        (f"gpt-4;{checkpoint}", 404),
        ("tiny;", 400),
        ("tiny;nonsense", 400),
        ("tinker://nonsense", 400),
    ):
        for route in (CHAT, MESSAGES, "/v1/messages/count_tokens"):
            body = ASK | {"model": name} | ({} if route != MESSAGES else {"max_tokens": 3})
            assert refusal(ask(api, route, body))[0] == status, name
    assert len(api.engine.jobs) == before


def test_an_expired_checkpoint_and_anothers_are_not_found(api: Api, checkpoint: str) -> None:
    assert refusal(ask(api, CHAT, ASK | {"model": checkpoint}, "tml-other"))[0] == 404
    api.database.write(records.update_checkpoint, checkpoint, expires_at=time.time() - 1)
    try:
        assert refusal(ask(api, CHAT, ASK | {"model": checkpoint}))[0] == 404
    finally:
        api.database.write(records.update_checkpoint, checkpoint, expires_at=None)
    assert ask(api, CHAT, ASK | {"model": checkpoint}).status_code == 200


def test_the_list_of_models_holds_the_served_names_and_ones_own_checkpoints(api: Api, checkpoint: str) -> None:
    def names(key: str) -> list[str]:
        headers = {"Authorization": f"Bearer {key}"}
        body = PLAIN.get(f"{api.base_url}/oai/api/v1/models", headers=headers).json()
        return [model["id"] for model in body["data"]]

    assert names("tml-test") == ["tiny", checkpoint]
    assert names("tml-other") == ["tiny"]


# Streams


class Listener:
    """A client that reads a stream in a thread of its own."""

    def __init__(self, api: Api, path: str, body: dict[str, Any]) -> None:
        self.events: list[Any] = []
        self.ended = threading.Event()
        self._gone = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(api.base_url + path, body), daemon=True)
        self._thread.start()

    def hang_up(self) -> None:
        """With the next line that comes."""
        self._gone.set()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        headers = {"x-api-key": "tml-test"}
        with (
            httpx.Client(timeout=FOREVER, verify=False, trust_env=False) as client,
            client.stream("POST", url, json=body | {"stream": True}, headers=headers) as answer,
        ):
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if self._gone.is_set():
                    return
                if line.startswith("data: ") and line != "data: [DONE]":
                    self.events.append(json.loads(line[6:]))
        self.ended.set()

    def text(self) -> str:
        deltas = [event["choices"][0].get("delta", {}) for event in self.events if event.get("choices")]
        return "".join(delta.get("content", "") for delta in deltas)


def eventually(holds: Callable[[], bool]) -> bool:
    for _ in range(1200):
        if holds():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def nothing_under_way(api: Api) -> None:
    """The engine may not have got round yet to what the test before left."""
    assert eventually(lambda: not unfinished(api))


def waiting_job(api: Api) -> tuple[int, str]:
    """Number and request id of the only sample that the engine has not taken."""

    def find(conn: sa.Connection) -> list[tuple[int, str]]:
        statement = sa.select(jobs.c.number, jobs.c.subject, jobs.c.seq).where(jobs.c.state == "queued")
        return [(number, f"{subject}:{seq}") for number, subject, seq in conn.execute(statement)]

    assert eventually(lambda: len(api.database.read(find)) == 1)
    return api.database.read(find)[0]


def tell(api: Api, request_id: str, start: int, tokens: list[int]) -> None:
    news = Progress(request_id, 0, start, tokens, [-0.5] * len(tokens), [], [])
    api.doorbell.ring("tokens", news.to_messages())


def test_a_stream_says_everything_once_whatever_the_doorbell_loses_or_repeats(api: Api) -> None:
    tokens = api.engine.says or []
    with api.engine.working:
        listener = Listener(api, CHAT, ASK)
        _, request_id = waiting_job(api)
        tell(api, request_id, 0, tokens[:2])
        tell(api, request_id, 0, tokens[:3])  # as an engine would that has begun again
        assert eventually(lambda: listener.text() == WORDS.decode(tokens[:3]))
        tell(api, request_id, 1, tokens[1:2])
        tell(api, request_id, 5, tokens[5:6])  # what is before it has got lost
        tell(api, request_id, 2, tokens[2:4])
        assert eventually(lambda: listener.text() == WORDS.decode(tokens[:4]))
        assert not listener.ended.is_set()
    assert listener.ended.wait(FOREVER)
    assert listener.text() == TEXT
    assert listener.events[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_reader_that_may_have_missed_the_end_looks_for_itself(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.api.chat.generation._FIRST_LOOK_SECONDS", 1e6)
    with api.engine.working:
        listener = Listener(api, CHAT, ASK)
        number, _ = waiting_job(api)
        api.doorbell.ring("tokens")  # what a listener hears that was away
        ended = Outcome(number, saying(SampleCall(np.array([1], np.int32), 1), api.engine.says or []).to_bytes())
        assert api.database.write(queue.complete, [ended])
        api.doorbell.ring("tokens")
        assert listener.ended.wait(FOREVER)
    assert listener.text() == TEXT


@pytest.mark.parametrize("when", ["in news", "in the result"])
def test_a_stream_that_cannot_go_on_as_it_began_ends_with_an_error(api: Api, when: str) -> None:
    tokens = api.engine.says or []
    with api.engine.working:
        listener = Listener(api, CHAT, ASK)
        _, request_id = waiting_job(api)
        tell(api, request_id, 0, [*tokens[:2], 40])
        assert eventually(lambda: bool(listener.text()))
        if when == "in news":
            tell(api, request_id, 0, tokens[:4])
            assert listener.ended.wait(FOREVER)
    assert listener.ended.wait(FOREVER)
    assert "differs from what was sent" in listener.events[-1]["error"]["message"]


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "invalid_request_error"), (MESSAGES, "invalid_request_error")])
def test_an_engine_that_fails_ends_the_stream_with_its_error(api: Api, path: str, kind: str) -> None:
    with api.engine.working:
        listener = Listener(api, path, ASK | {"max_tokens": 5})
        number, _ = waiting_job(api)
        failed = Outcome(number, error="no such luck", category="user")
        api.doorbell.ring("done", api.database.write(queue.complete, [failed]))
        assert listener.ended.wait(FOREVER)
    assert listener.events[-1]["error"] | {"param": None, "code": None} == {
        "message": "no such luck", "type": kind, "param": None, "code": None
    }  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_its_samples(api: Api, stream: bool) -> None:
    with api.engine.working:
        if stream:
            listener = Listener(api, CHAT, ASK)
            number, request_id = waiting_job(api)
            tell(api, request_id, 0, (api.engine.says or [])[:2])
            assert eventually(lambda: len(listener.events) > 1)
            listener.hang_up()
            tell(api, request_id, 2, (api.engine.says or [])[2:4])
        else:
            headers = {"x-api-key": "tml-test"}
            with pytest.raises(httpx.ReadTimeout):
                PLAIN.post(api.base_url + CHAT, json=ASK, headers=headers, timeout=httpx.Timeout(FOREVER, read=2.0))
            number = 0
        assert eventually(lambda: not unfinished(api))
    assert number not in [header.number for header, _ in api.engine.jobs]


def unfinished(api: Api) -> list[int]:
    def find(conn: sa.Connection) -> list[int]:
        return list(conn.scalars(sa.select(jobs.c.number).where(jobs.c.state.in_(["queued", "running"]))))

    return api.database.read(find)


def test_all_chats_of_an_owner_share_a_session_and_a_finished_one_is_replaced(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chats(conn: sa.Connection) -> list[str]:
        mine = sa.select(sessions.c.id).where(sessions.c.display_name == "OpenAI and Anthropic clients")
        return list(conn.scalars(mine.order_by(sessions.c.created_at)))

    ask(api, CHAT, ASK)
    before = api.database.read(chats)
    monkeypatch.setattr("tinsmith.api.chat.sessions._KEEP_SECONDS", 0.0)
    ask(api, CHAT, ASK)
    assert api.database.read(chats) == before
    for session in before:
        api.post(f"/sessions/{session}/finish", reason={"type": "success"})
    assert ask(api, CHAT, ASK).status_code == 200
    assert len(api.database.read(chats)) == len(before) + 1


def test_no_reader_is_left_behind(api: Api) -> None:
    assert eventually(lambda: api.chat.streams.held == 0)
    assert eventually(lambda: api.waiters.held == 0)
