"""The same seed, prompt and weights give the same tokens: in any batch, after a restart, on either database."""

from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.contract.datums import supervised, tokens
from tests.throwaway_postgres import ThrowawayPostgres
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("restart"), pytest.mark.timeout(300)]

PROMPT = types.ModelInput.from_ints(tokens(12, seed=42))
Texts = list[list[int]]


def draw(sampler: tinker.SamplingClient, seed: int | None = 11) -> Texts:
    params = types.SamplingParams(max_tokens=20, seed=seed, stop=[], temperature=1.2, top_k=200, top_p=0.95)
    return [sequence.tokens for sequence in sampler.sample(PROMPT, 4, params).result().sequences]


def teach(service: tinker.ServiceClient) -> str:
    """The path of a trained sampler, always of the same weights."""
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    for _ in range(2):
        client.forward_backward([supervised(PROMPT.to_ints() + tokens(12, seed=7))], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-8)).result()
    path = client.save_weights_for_sampler("taught").result().path
    assert path is not None
    return path


def answers(service: tinker.ServiceClient, path: str) -> list[Texts]:
    """Of the base and of the trained sampler, both at once, while others sample."""
    samplers = [
        service.create_sampling_client(base_model="tiny").result(),
        service.create_sampling_client(model_path=path).result(),
    ]
    crowd = [
        samplers[number % 2].sample(PROMPT, 2, types.SamplingParams(max_tokens=9 + number, seed=number, stop=[]))
        for number in range(6)
    ]
    drawn = [draw(sampler) for sampler in samplers]
    for future in crowd:
        future.result()
    return drawn


def test_a_seeds_tokens_outlive_the_server_and_are_the_same_on_either_database(
    server: LocalServer, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    with tinker.ServiceClient(base_url=server.base_url) as service:
        path = teach(service)
        expected = answers(service, path)
        base = service.create_sampling_client(base_model="tiny").result()
        assert draw(base) == expected[0] != expected[1]
        assert len({tuple(text) for text in expected[0]}) == 4
        assert draw(base, seed=12) != expected[0]
        assert draw(base, seed=None) != draw(base, seed=None)
    with postgres.database() as url:
        other = LocalServer(tmp_path / "data", tmp_path / "log.txt", ["--database-url", url, "--threads", "1"])
        with other:
            with tinker.ServiceClient(base_url=other.base_url) as service:
                path = teach(service)
                assert answers(service, path) == expected
            assert other.stop() == 0
            other.start()
            with tinker.ServiceClient(base_url=other.base_url) as service:
                assert answers(service, path) == expected
