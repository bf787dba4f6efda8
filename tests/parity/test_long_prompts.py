"""A prompt of thirty thousand tokens runs in chunks, and nobody who decodes misses a step for it."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.parity.conftest import saved_and_loaded
from tests.parity.sampling_lab import new_sampler, prompt, run, sample, sequences
from tests.tiny_families import SIZES
from tinsmith import sizing
from tinsmith.backend import load_backend
from tinsmith.config import Settings
from tinsmith.models.loading import BaseModel
from tinsmith.served import Served

LONG, CHUNK, NEIGHBOURS = 30_000, 2048, 6
NARROW = {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32_768,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A model of long context, and little else."""
    torch.manual_seed(0)
    return saved_and_loaded(Qwen3ForCausalLM(Qwen3Config(**(SIZES | NARROW))), tmp_path_factory.mktemp("long"))


def test_others_get_a_token_in_every_step_while_a_very_long_prompt_runs(model: BaseModel) -> None:
    calls = [sample(f"{number}", prompt(5), tenant=f"{number}", seed=number) for number in range(NEIGHBOURS)]
    alone = run(new_sampler(model), *calls)
    sampler = new_sampler(model, kv_tokens=32_768, block_size=64, prefill_tokens=CHUNK)
    long = sample("long", prompt(LONG), tenant="long", max_tokens=3)
    sampler.submit(long)
    for call in calls[:3]:
        sampler.submit(call)
    finished: dict[str, list[list[int]]] = {}
    ends_at: dict[str, int] = {}
    chunks = []
    for step in range(60):
        if step == 4:  # and some who come later
            for call in calls[3:]:
                sampler.submit(call)
        before = sampler._seats.running[0].computed if 0 in sampler._seats.running else 0
        for end in sampler.step():
            finished[end.request_id], ends_at[end.request_id] = sequences(end.output), step
        sampler.check()
        if 0 in sampler._seats.running:
            chunks.append(sampler._seats.running[0].computed - before)
    assert [ends_at[call.request_id] for call in calls] == [11, 11, 11, 15, 15, 15]
    assert [finished[call.request_id] for call in calls] == [sequences(output) for output in alone]
    assert max(chunks[5:16]) < CHUNK // 4, "a chunk far behind the beginning costs more, so it is shorter"
    assert max(chunks) <= CHUNK == chunks[17], "nobody waits any more"
    assert "long" in finished


@pytest.mark.parametrize(("share", "expected"), [(1.0, 512), (0.0, 256)])
def test_a_server_with_little_memory_runs_prompts_in_smaller_chunks(
    share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = sizing.layer_tokens
    monkeypatch.setattr(sizing, "layer_tokens", lambda sizes, free: room(sizes, int(share * free)))
    _, sampler = load_backend(Settings(device="cpu"), Served("tiny", "tiny"), lambda _: None)
    sampler.submit(sample("long", prompt(600), max_tokens=1))
    sampler.step()
    assert sampler.usage().prefilled == expected
