"""With `--deterministic` on a GPU, a token has the same bits in training, prompts and decoding, in any company.

On a CUDA device in bfloat16, with graphs. Where there is none but Triton can be imported, TRITON_INTERPRET=1 runs the
same kernels step by step on the CPU in fp32. Bits that differ there would be the code's own doing; what a device does
with its matrix instructions only shows on one.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("neither a CUDA device nor Triton's interpreter", allow_module_level=True)

from tests.parity.conftest import load  # noqa: E402
from tests.parity.reference import SPECS, Datum, as_call, random_datum  # noqa: E402
from tests.parity.sampling_lab import lora, new_sampler, prompt, run, sample, sequences  # noqa: E402
from tests.parity.training_lab import FULL, add, data_of, gradient, outputs  # noqa: E402
from tinsmith.errors import ConfigError, UserError  # noqa: E402
from tinsmith.models.exact import keeps_bits, layers_of, make_exact  # noqa: E402
from tinsmith.models.loading import BaseModel  # noqa: E402
from tinsmith.models.plain_layers import Probe  # noqa: E402
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec  # noqa: E402
from tinsmith.sampling.sampler import TorchSampler  # noqa: E402
from tinsmith.training.trainer import TorchTrainer  # noqa: E402
from tinsmith.wire.packing import SampleOutput, TrainOutput  # noqa: E402

pytestmark = pytest.mark.gpu
ON_GPU = not INTERPRETED
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
FAMILIES = ("qwen3-tied", "qwen2-biases", "llama", "mistral-window") if ON_GPU else ("qwen3-tied", "mistral-window")
LENGTHS, MOST_TOKENS = ((1, 40, 150), 9) if ON_GPU else ((20,), 2)  # the interpreter is slow


@pytest.fixture(autouse=True)
def workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` sets: cuBLAS is deterministic with a workspace of a fixed size."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> BaseModel:
    return exact(load(folders(request.param), DTYPE, "cuda" if ON_GPU else "cpu"))


def exact(base: BaseModel) -> BaseModel:
    if ON_GPU:
        make_exact(base, lambda _: None)
    else:
        with torch.no_grad():
            base.exact = layers_of(base, Probe(base))
    return base


def exact_sampler(base: BaseModel, **options: Any) -> TorchSampler:
    return new_sampler(base, deterministic=ON_GPU, max_rank=32, **options)


def exact_trainer(base: BaseModel, **options: Any) -> TorchTrainer:
    limits = {"micro_batch_tokens": 512, "max_adapters": 4, "max_rank": 32}
    trainer = TorchTrainer(base, **(limits | options), deterministic=True)
    for name, spec in {"a": SPECS["all"], "odd": ModelSpec(3, 4, train_mlp=False, train_unembed=False)}.items():
        add(trainer, name, spec)
    return trainer


def trained(base: BaseModel) -> TorchTrainer:
    """With adapters that are one step from where they began."""
    trainer = exact_trainer(base)
    for name in ("a", "odd"):
        outputs(trainer, ModelCall(name, as_call(data_of(3))))
        trainer.optim_step(name, AdamParams(learning_rate=1e-3))
    return trainer


def logprobs_in_training(trainer: TorchTrainer, name: str, whole: list[int], *, forward_only: bool) -> np.ndarray:
    """Of all tokens but the first, in one call with other datums, beside a stranger's."""
    weights = {"weights": np.ones(len(whole) - 1, np.float32)}
    data = [*data_of(5, (30, 2)), Datum(whole[:-1], np.array(whole[1:], np.int32), weights)]
    calls = [ModelCall(name, as_call(data, forward_only=forward_only)), ModelCall("a", as_call(data_of(9, (5, 40))))]
    (result, _) = outputs(trainer, *calls)
    for each in ("a", "odd"):
        trainer.discard_gradient(each)
    return result.logprobs_M[-len(whole) + 1 :]


def requests(name: str) -> list[Any]:
    """Of an adapter, or of the base model: plain ones, a cut one, a greedy one."""
    options: dict[str, Any] = {"max_tokens": MOST_TOKENS, "prompt_logprobs": True}
    plain = [sample(f"{name} {n}", prompt(n), name, seed=n, num_samples=2, **options) for n in LENGTHS]
    cut = sample(f"{name} cut", prompt(5), name, top_k=5, top_p=0.9, max_tokens=MOST_TOKENS)
    warm = sample(f"{name} warm", prompt(6), name, temperature=0.7, max_tokens=MOST_TOKENS, topk_sample_logprobs=2)
    if INTERPRETED:
        return [*plain, warm]
    return [*plain, cut, warm, sample(f"{name} greedy", prompt(7), name, temperature=0.0, max_tokens=MOST_TOKENS)]


def test_sampled_and_prompt_logprobs_have_the_bits_of_training_in_any_company(model: BaseModel) -> None:
    trainer = trained(model)
    crowded = exact_sampler(model, prefill_tokens=20, kv_tokens=640)
    alone = exact_sampler(model)
    for name in ("a", "odd"):
        crowded.publish(name, trainer.snapshot(name))
        alone.publish(name, trainer.snapshot(name))
    crowded.publish("stranger", lora(model, SPECS["attention"], seed=8))
    calls = [call for name in ("a", "odd", "base")[: 3 if ON_GPU else 1] for call in requests(name)]
    lengths = (3, 33, 60) if ON_GPU else (3,)
    strangers = [sample(f"stranger {n}", prompt(n), "stranger", seed=n, max_tokens=2 * MOST_TOKENS) for n in lengths]
    for call, output in zip(calls, run(crowded, *calls, *strangers), strict=False):
        again = run(alone, call)
        assert sequences(again) == sequences(output), call.request_id
        assert np.array_equal(again.logprobs_S, output.logprobs_S), call.request_id
        if call.snapshot_id != "base" and call.call.prompt_logprobs:
            check_against_training(trainer, call, output)


def check_against_training(trainer: TorchTrainer, call: Any, output: SampleOutput) -> None:
    length = len(call.call.prompt_P)
    for index, tokens in enumerate(sequences(output)):
        whole = [*call.call.prompt_P.tolist(), *tokens]
        row = logprobs_in_training(trainer, call.snapshot_id, whole, forward_only=index == 0)
        sampled = output.logprobs_S[output.offsets[index] : output.offsets[index + 1]]
        assert np.array_equal(row[length - 1 :], sampled), call.request_id
        assert np.array_equal(row[: length - 1], output.extras["prompt_logprobs"][1:]), call.request_id


def test_gradients_and_weights_do_not_move_with_the_company(model: BaseModel) -> None:
    rng = np.random.default_rng(0)
    lengths, most = ((1, 48, 90), 200) if ON_GPU else ((1, 12), 20)
    call = ModelCall("a", as_call([random_datum(rng, length) for length in lengths]))
    results = []
    for company in (False, True, True)[: 3 if ON_GPU else 2]:
        trainer = exact_trainer(model, gradient_checkpointing=company)
        crowd = [ModelCall("odd", as_call([random_datum(rng, int(rng.integers(1, most)))]))] if company else []
        *_, output = trainer.forward_backward([*crowd, call])
        assert isinstance(output, TrainOutput), output
        taken = gradient(trainer, "a")
        trainer.optim_step("a", AdamParams(learning_rate=1e-3))
        results.append((output.logprobs_M, taken, trainer.snapshot("a").adapter.weights))
    logprobs, taken, weights = results[0]
    assert taken.any()
    for others in results[1:]:
        assert np.array_equal(others[0], logprobs)
        assert torch.equal(others[1], taken)
        assert torch.equal(others[2], weights)


def test_exact_layers_compute_what_the_module_does(folders: Callable[[str], Path]) -> None:
    """Their gradients, too: in bfloat16 as near float32's as those of the layers that they replace, times 1.5."""
    device = "cuda" if ON_GPU else "cpu"
    bases = [load(folders("qwen3-tied"), dtype, device) for dtype in (torch.float32, DTYPE, DTYPE)]
    taken = []
    for base in (*bases[:2], exact(bases[2])):
        trainer = TorchTrainer(base, micro_batch_tokens=512, max_adapters=4, max_rank=32)
        add(trainer, "a", SPECS["all"])
        outputs(trainer, ModelCall("a", as_call(data_of(2, (9, 70, 33)))))
        taken.append(gradient(trainer, "a").double().cpu())
    true, plain, ours = taken
    allowed = max(1.5 * (plain - true).norm(), (0.01 if ON_GPU else 1e-4) * true.norm())
    assert (ours - true).norm() <= allowed


@pytest.mark.skipif(INTERPRETED, reason="needs bfloat16 on a device")
def test_what_cannot_be_exact_is_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        make_exact(load(folders("llama"), torch.float32, "cuda"), lambda _: None)
    other = load(folders("gemma3"), torch.bfloat16, "cuda")
    with pytest.raises(ConfigError, match="Gemma3"):
        make_exact(other, lambda _: None)
    with pytest.raises(ConfigError, match="exact layers"):
        new_sampler(other, deterministic=True)


def test_full_parameter_models_are_not_sampled(folders: Callable[[str], Path]) -> None:
    base = exact(load(folders("llama"), DTYPE, "cuda" if ON_GPU else "cpu"))
    trainer = TorchTrainer(base, micro_batch_tokens=64, max_adapters=4, max_rank=32, deterministic=True)
    add(trainer, "full", FULL)
    sampler = exact_sampler(base)
    with pytest.raises(UserError, match="full-parameter"):
        sampler.publish("full", trainer.snapshot("full"))


@pytest.mark.skipif(INTERPRETED, reason="as slow as it is large")
def test_rows_of_large_products_keep_their_bits() -> None:
    for shape in ((4096, 1024), (1024, 3072), (6144, 2560), (2560, 9728)):
        assert keeps_bits(torch.randn(*shape, device="cuda").bfloat16())
