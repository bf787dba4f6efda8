"""Several base models in one server: clients pick by name, and neither model is disturbed by the other."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests.contract.api_fixtures import CAPABILITIES, running_api
from tests.contract.datums import score, supervised, tokens
from tests.contract.raw import RawClient
from tinsmith.cli import app
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer
from tinsmith.store import records

pytestmark = [pytest.mark.xdist_group("several"), pytest.mark.timeout(300)]

CONTEXTS = {"tiny": 512, "llama": 128}
VOCABULARIES = {"tiny": 1280, "llama": 1400}
ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
EXAM = [supervised(tokens(24, seed=99))]
SMALL = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
PROMPT = types.ModelInput.from_ints(tokens(6, seed=1))


def make_llama(folder: Path) -> Path:
    """A model of another family, with a vocabulary of its own size, and random weights."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    config = LlamaConfig(
        vocab_size=VOCABULARIES["llama"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXTS["llama"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory, client_environment: None) -> Iterator[LocalServer]:
    """A server of the embedded model and a llama, both of which were added to it before."""
    folder = tmp_path_factory.mktemp("two")
    data, llama = folder / "data", make_llama(folder / "llama")
    for added in ([str(llama)], ["tiny", "--max-context", str(CONTEXTS["tiny"])]):
        result = CliRunner().invoke(app, ["models", "add", *added, "--data-dir", str(data)])
        assert result.exit_code == 0, result.output
    arguments = ["llama", "--threads", "1", "--alias", "*=llama", "--memory-share", "llama=0.25"]
    with LocalServer(data, folder / "log.txt", arguments) as server:
        yield server


@pytest.fixture(scope="module")
def client(two_models: LocalServer) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=two_models.base_url) as client:
        yield client


def start(client: tinker.ServiceClient, base_model: str) -> tinker.TrainingClient:
    return client.create_lora_training_client(base_model, rank=8, seed=5).result()


def train(client: tinker.TrainingClient, steps: range) -> list[tinker.APIFuture[Any]]:
    """Some steps of a supervised loop, without waiting for any."""
    futures: list[tinker.APIFuture[Any]] = []
    for number in steps:
        datums = [supervised(tokens(12 + number, seed=10 * number + place)) for place in range(2)]
        futures += [client.forward_backward(datums, "cross_entropy"), client.optim_step(ADAM)]
    return futures


def test_the_capabilities_list_every_model_with_its_own_context(two_models: LocalServer) -> None:
    rest = tinker.RestClient(base_url=two_models.base_url, api_key="tml-local")
    supported = rest.get_server_capabilities().result().supported_models
    assert CONTEXTS.items() <= {model.model_name: model.max_context_length for model in supported}.items()


def test_each_name_leads_to_its_own_model(client: tinker.ServiceClient) -> None:
    scores = {}
    for name, architecture in (
        ("tiny", "Qwen3ForCausalLM"),
        ("llama", "LlamaForCausalLM"),
        ("any", "LlamaForCausalLM"),
    ):
        model = start(client, name)
        assert model.get_info().model_data.arch == architecture
        assert model.get_info().model_data.model_name == name
        scores[name] = score(model, EXAM)
        sampler = client.create_sampling_client(base_model=name).result()
        sampled = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=4, temperature=0)).result().sequences[0]
        mine = sampler.compute_logprobs(types.ModelInput.from_ints([*PROMPT.to_ints(), *sampled.tokens])).result()
        assert np.allclose(np.array(mine[-len(sampled.tokens) :], float), np.array(sampled.logprobs), atol=1e-4)
    assert np.allclose(scores["llama"], scores["any"])
    assert not np.allclose(scores["tiny"], scores["llama"])


def test_requests_are_bounded_by_the_model_that_they_are_for(client: tinker.ServiceClient) -> None:
    long = [supervised(tokens(CONTEXTS["llama"] + 2, seed=3))]
    large = types.ModelInput.from_ints([1, VOCABULARIES["llama"] - 1])
    start(client, "tiny").forward(long, "cross_entropy").result()
    with pytest.raises(tinker.TinkerError, match="128"):
        start(client, "llama").forward(long, "cross_entropy").result()
    client.create_sampling_client(base_model="llama").result().compute_logprobs(large).result()
    with pytest.raises(tinker.TinkerError, match=str(VOCABULARIES["llama"] - 1)):
        client.create_sampling_client(base_model="tiny").result().compute_logprobs(large).result()


def test_a_checkpoint_leads_back_to_its_model_and_to_no_other(
    two_models: LocalServer, client: tinker.ServiceClient
) -> None:
    llama = start(client, "llama")
    for future in train(llama, range(2)):
        future.result()
    state = llama.save_state("mine").result().path
    weights = llama.save_weights_for_sampler("mine").result().path
    assert np.allclose(score(client.create_training_client_from_state(state).result(), EXAM), score(llama, EXAM))
    client.create_sampling_client(model_path=weights).result().compute_logprobs(PROMPT).result()
    with RawClient(two_models.base_url) as raw:
        model = raw.create_model(raw.create_session())
        body = {"model_id": model, "seq_id": raw.take_seq(model), "path": state, "optimizer": False}
        refused = raw.post("/load_weights", body)
        assert refused.status_code == 400
        assert "belongs to base model 'llama', and the model that it was to be loaded into to 'tiny'" in refused.text
        named = {"session_id": raw.create_session(), "base_model": "tiny"}
        for path, asked in (
            ("/create_sampling_session", {"sampling_session_seq_id": 0, "model_path": weights}),
            ("/load_weights", {"model_seq_id": 0, "path": state, "optimizer": False}),
        ):
            refused = raw.post(path, named | asked)
            assert refused.status_code == 400
            assert "belongs to base model 'llama', not to 'tiny'" in refused.text


def test_one_engine_killed_while_the_other_trains_disturbs_nobody(
    two_models: LocalServer, client: tinker.ServiceClient
) -> None:
    expected = {}
    for name in CONTEXTS:
        quiet = start(client, name)
        train(quiet, range(8))
        expected[name] = score(quiet, EXAM)
    models = {name: start(client, name) for name in CONTEXTS}
    for model in models.values():
        train(model, range(4))[1].result()
    engines = two_models.engines()
    others = train(models["llama"], range(4, 8))
    os.kill(engines["tiny"].pid, signal.SIGKILL)
    engines["tiny"].wait(60)
    mine = train(models["tiny"], range(4, 8))
    for future in others + mine:
        future.result()
    for name, model in models.items():
        np.testing.assert_allclose(score(model, EXAM), expected[name], atol=1e-5)
    assert two_models.engines()["llama"].pid == engines["llama"].pid
    assert two_models.engines()["tiny"].pid != engines["tiny"].pid


def test_what_belongs_to_a_model_that_is_not_served_any_more_is_refused_at_once(tmp_path: Path) -> None:
    with running_api(tmp_path, models=("nobody/model",), aliases={"tiny": "nobody/model"}) as api:
        session = api.session()
        model, sampler = api.model(session), api.sampler(session)
    with running_api(tmp_path) as api:
        for path, asked in (
            ("/optim_step", {"model_id": model, "seq_id": 1, "adam_params": {}}),
            (
                "/asample",
                {"sampling_session_id": sampler, "seq_id": 0, "prompt": SMALL, "sampling_params": {}},
            ),
            ("/get_info", {"model_id": model}),
        ):
            refused = api.post(path, **asked)
            assert refused.status_code == 400, (path, refused.text)
            assert "belongs to base model 'nobody/model'" in refused.text and "it serves 'tiny'" in refused.text
        assert api.database.read(records.find_model, model) is not None


def test_nothing_is_queued_for_an_engine_that_stands_still(tmp_path: Path) -> None:
    with running_api(tmp_path) as api:
        lost = records.EngineRecord("nobody/model", "e", 1, "failed", "no memory is left", None, time.time())
        api.database.write(records.put_engine, lost)
    with running_api(tmp_path, models=("tiny", "nobody/model")) as api:
        session = api.session()
        create = {"session_id": session, "model_seq_id": 0, "lora_config": {"rank": 8}}
        refused = api.post("/create_model", base_model="nobody/model", **create)
        assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")
        assert "no memory is left; other models are served" in refused.text
        assert [one["model_name"] for one in api.http.get("/get_server_capabilities").json()["supported_models"]] == [
            "tiny"
        ]
        assert api.post("/create_model", base_model="tiny", **create).status_code == 200


def test_who_waits_for_an_engine_that_stands_still_hears_why(tmp_path: Path) -> None:
    options: dict[str, Any] = {"models": ("tiny", "nobody/model"), "poll_seconds": 0.1}
    ready = CAPABILITIES.to_dict()
    with running_api(tmp_path) as api:
        other = records.EngineRecord("nobody/model", "e", 1, "ready", "", ready, time.time())
        api.database.write(records.put_engine, other)
    with running_api(tmp_path, **options) as api:
        body = {"session_id": api.session(), "model_seq_id": 0, "lora_config": {"rank": 8}}
        waiting = api.post("/create_model", base_model="nobody/model", **body).json()["request_id"]
        lost = replace(other, state="failed", progress="no memory is left", beat_at=time.time())
        api.database.write(records.put_engine, lost)
        api.doorbell.ring("engine")
        while (answer := api.post("/retrieve_future", request_id=waiting).json())["queue_state"] == "active":
            pass
        assert answer["queue_state"] == "paused_capacity"
        assert "no memory is left" in answer["queue_state_reason"]
