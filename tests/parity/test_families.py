"""Families beyond plain attention: Gemma 3, multi-head latent attention, gated delta nets; against Hugging Face, PEFT.

What holds for every family (logprobs and gradients of one pass, sampled logprobs) is tested with the others.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from tests.parity import reference
from tests.parity.conftest import DELTA, GEMMA, SIZES, randomize
from tests.parity.reference import SPECS, Datum, as_call, random_datum, warm
from tests.parity.sampling_lab import full, lora, new_sampler, prompt, run, sample, sequences
from tinsmith.errors import ConfigError, UserError
from tinsmith.models.delta_nets import run_by_sequence
from tinsmith.models.loading import BaseModel, load_base
from tinsmith.models.lora import CurrentPass
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer

# PEFT's own, about transformers and about tied embeddings
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

RECURRENT = ["qwen3-next", "qwen3.5", "qwen3-next-moe", "qwen3.5-moe"]
NEW = ["gemma3", "deepseek-mla", *RECURRENT]
EACH = pytest.mark.parametrize("family", NEW)
EACH_RECURRENT = pytest.mark.parametrize("family", RECURRENT)
# Where a gradient is nearly zero, Adam makes a step of its sign, which is noise: a larger epsilon keeps that small.
PARAMS = AdamParams(learning_rate=0.003, eps=1e-5, weight_decay=0.1, grad_clip_norm=1.0)
FULL = ModelSpec(rank=0, seed=0)
NewTrainer = Callable[..., TorchTrainer]
Folders = Callable[[str], Path]
Bases = Callable[[str], BaseModel]


def add(trainer: TorchTrainer, model_id: str, spec: ModelSpec) -> None:
    trainer.add(model_id, spec)
    if spec.is_lora:
        warm(trainer._models[model_id].weights, seed=spec.seed)


def data_of(seed: int, lengths: tuple[int, ...] = (9, 1, 17)) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [random_datum(rng, length) for length in lengths]


def gradient(trainer: TorchTrainer, model_id: str) -> torch.Tensor:
    return trainer._models[model_id].weights.require_grad().clone()


@EACH
def test_gradients_differ_from_pefts_by_rounding_alone(family: str, new_trainer: NewTrainer, folders: Folders) -> None:
    trainer = new_trainer(family)
    add(trainer, "m", SPECS["all"])
    adapter = trainer._models["m"].weights
    trainer.forward_backward([ModelCall("m", as_call(data_of(2)))])
    module = reference.peft_module(folders(family), adapter)
    reference.cross_entropy(module, data_of(2)).backward()
    gradients = adapter.layout.named_views(adapter.grad)
    for name, parameter in reference.lora_parameters(module).items():
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, name


@pytest.mark.parametrize("family", ["gemma3", "deepseek-mla", "qwen3-next", "qwen3.5-moe"])
def test_twenty_clipped_and_decayed_steps_end_where_peft_and_torch_end(
    family: str, new_trainer: NewTrainer, folders: Folders
) -> None:
    trainer = new_trainer(family)
    trainer.add("m", ModelSpec(rank=3, seed=1))
    add(trainer, "neighbour", SPECS["attention"])
    adapter = trainer._models["m"].weights
    module = reference.peft_module(folders(family), adapter)
    steps = [data_of(seed, (7, 4)) for seed in range(20)]
    norms = []
    for data in steps:
        trainer.forward_backward([ModelCall("neighbour", as_call(data[1:])), ModelCall("m", as_call(data))])
        norms.append(trainer.optim_step("m", PARAMS)["grad_norm"])

    parameters = reference.lora_parameters(module)
    assert norms == pytest.approx(reference.train(module, parameters, steps, PARAMS), rel=1e-4)
    assert min(norms) > PARAMS.grad_clip_norm
    weights = adapter.layout.named_views(adapter.weights)
    assert set(weights) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(weights[name], parameter.data, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


@EACH
def test_a_full_parameter_model_trains_as_in_torch(family: str, new_trainer: NewTrainer, folders: Folders) -> None:
    trainer = new_trainer(family, gradient_checkpointing=True)
    trainer.add("m", FULL)
    before = {name: tensor.clone() for name, tensor in trainer._model.module.named_parameters()}
    steps = [data_of(seed) for seed in range(3)]
    for data in steps:
        trainer.forward_backward([ModelCall("m", as_call(data))])
        trainer.optim_step("m", PARAMS)

    module = reference.full_module(folders(family))
    parameters = dict(module.named_parameters())
    reference.train(module, parameters, steps, PARAMS)
    model = trainer._models["m"].weights
    weights = model.layout.named_views(model.weights)
    assert set(weights) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(weights[name], parameter.data, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: n + m)
    for name, tensor in trainer._model.module.named_parameters():
        assert torch.equal(tensor, before[name]), f"the shared base changed at {name}"


@EACH
def test_a_tenant_gets_the_same_alone_and_among_strangers_whatever_is_recomputed(
    family: str, new_trainer: NewTrainer
) -> None:
    results = []
    for strangers, checkpointing in ((0, False), (2, False), (2, True)):
        trainer = new_trainer(family, micro_batch_tokens=200, gradient_checkpointing=checkpointing)
        add(trainer, "m", SPECS["all"])
        calls = [ModelCall("m", as_call(data_of(3)))]
        for number in range(strangers):
            add(trainer, f"stranger {number}", ModelSpec(rank=4 + number, seed=number))
            calls.insert(number, ModelCall(f"stranger {number}", as_call(data_of(4 + number, (5, 30)))))
        outputs = trainer.forward_backward(calls)
        results.append((outputs[-1 if strangers < 2 else 2].logprobs_M, gradient(trainer, "m")))
    expected_logprobs, expected = results[0]
    for logprobs, grad in results[1:]:
        # The sigmoid of a shared expert's gate, one number per row, is rounded differently at the end of a batch.
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-6 if "moe" in family else 0, rtol=0)
        assert (grad - expected).norm() <= (1e-6 if "moe" in family else 0) * expected.norm()
    assert expected.any()


@EACH_RECURRENT
def test_weights_that_are_broken_stay_one_tenants_problem(family: str, new_trainer: NewTrainer) -> None:
    trainer, clean = new_trainer(family), new_trainer(family)
    for each in (trainer, clean):
        add(each, "broken", ModelSpec(rank=2, seed=0))
        add(each, "sound", SPECS["all"])
    trainer._models["broken"].weights.weights.fill_(float("nan"))
    call = as_call(data_of(4))
    broken, _ = trainer.forward_backward([ModelCall("broken", call), ModelCall("sound", call)])
    clean.forward_backward([ModelCall("sound", call)])
    assert isinstance(broken, UserError)
    expected = gradient(clean, "sound")
    assert (gradient(trainer, "sound") - expected).norm() <= (1e-6 if "moe" in family else 0) * expected.norm()
    assert not gradient(trainer, "broken").any()


@pytest.mark.parametrize("family", ["gemma3", "qwen3.5", "qwen3-next-moe", "qwen3.5-moe"])
def test_peft_loads_a_saved_adapter(family: str, new_trainer: NewTrainer, folders: Folders, tmp_path: Path) -> None:
    trainer = new_trainer(family)
    add(trainer, "m", ModelSpec(rank=4, seed=1, train_unembed=False))
    trainer.save("m", tmp_path, optimizer=False)
    [datum] = data_of(1, (11,))
    [ours] = trainer.forward_backward([ModelCall("m", as_call([datum], forward_only=True))])
    module = PeftModel.from_pretrained(reference.full_module(folders(family)), tmp_path).eval()
    np.testing.assert_allclose(ours.logprobs_M, reference.logprobs(module, datum).detach().numpy(), atol=1e-5)
    add(trainer, "again", ModelSpec(rank=4, seed=1, train_unembed=False))
    trainer.load("again", tmp_path, optimizer=False)
    [loaded] = trainer.forward_backward([ModelCall("again", as_call([datum], forward_only=True))])
    np.testing.assert_array_equal(loaded.logprobs_M, ours.logprobs_M)


@EACH
def test_transformers_loads_a_saved_full_model(family: str, new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer(family)
    trainer.add("m", FULL)
    [datum] = data_of(1, (11,))
    trainer.forward_backward([ModelCall("m", as_call([datum]))])
    trainer.optim_step("m", PARAMS)
    trainer.save("m", tmp_path, optimizer=False)
    [ours] = trainer.forward_backward([ModelCall("m", as_call([datum], forward_only=True))])
    module = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    np.testing.assert_allclose(ours.logprobs_M, reference.logprobs(module, datum).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5-moe"])
def test_samples_are_the_same_alone_after_preemption_and_among_strangers(family: str, bases: Bases) -> None:
    model = bases(family)
    weights = {"lora": lora(model, SPECS["all"]), "full": full(model)}
    call = sample("m", prompt(21), "lora", num_samples=4, max_tokens=20, seed=5)
    company = [
        sample(f"{name} {length}", prompt(length), name, num_samples=2, max_tokens=14, seed=length)
        for name, length in (("base", 1), ("lora", 2), ("full", 5), ("lora", 33))
    ]
    outputs = []
    for calls, options in (
        ([call], {}),
        ([*company, call], {"prefill_tokens": 20}),
        ([*company, call], {"kv_tokens": 64}),
    ):
        sampler = new_sampler(model, **options)
        for name, own in weights.items():
            sampler.publish(name, own)
        results = run(sampler, *calls)
        outputs.append(results if len(calls) == 1 else results[-1])
    for other in outputs[1:]:
        assert sequences(other) == sequences(outputs[0])
        np.testing.assert_allclose(other.logprobs_S, outputs[0].logprobs_S, atol=2e-5, rtol=0)
    assert len({tuple(tokens) for tokens in sequences(outputs[0])}) == 4


def test_a_recurrent_model_runs_every_prompt_from_its_beginning(bases: Bases) -> None:
    sampler = new_sampler(bases("qwen3.5"))
    first, again = (run(sampler, sample(name, prompt(50), max_tokens=20)) for name in ("first", "again"))
    assert again.cache_hit_tokens == 0
    assert again.tokens_S.tolist() == first.tokens_S.tolist()


def test_a_cancelled_or_broken_request_leaves_no_state_behind(bases: Bases) -> None:
    model = bases("qwen3-next")
    sampler = new_sampler(model)
    broken = lora(model, SPECS["all"])
    broken.adapter.weights.fill_(float("nan"))
    sampler.publish("broken", broken)
    sampler.submit(sample("a", prompt(12), num_samples=3))
    for _ in range(3):
        sampler.step()
    sampler.check()
    sampler.cancel("a")
    sampler.check()
    assert isinstance(run(sampler, sample("b", prompt(12), "broken", num_samples=3)), UserError)


def test_a_delta_net_that_keeps_its_state_in_another_way_is_refused(bases: Bases) -> None:
    class Forgetful(Qwen3NextGatedDeltaNet):
        def forward(self, hidden_states: torch.Tensor, cache_params: object = None) -> torch.Tensor:
            return super().forward(hidden_states)

    layer = Forgetful(bases("qwen3-next").config, 0)
    with pytest.raises(ConfigError, match="keeps its state"):
        run_by_sequence(layer, CurrentPass())


def conditional() -> dict[str, PreTrainedModel]:
    """Models that see pictures, whose text part is served."""
    qwen = Qwen3_5Config(
        text_config=SIZES | DELTA,
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    gemma = Gemma3Config(
        text_config=SIZES | GEMMA,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    return {"qwen3.5": Qwen3_5ForConditionalGeneration(qwen), "gemma3": Gemma3ForConditionalGeneration(gemma)}


@pytest.mark.parametrize("family", ["qwen3.5", "gemma3"])
def test_the_text_part_of_a_model_with_pictures_is_served(family: str, tmp_path: Path) -> None:
    module = conditional()[family].eval()
    randomize(module, seed=1)
    module.save_pretrained(tmp_path)
    model = load_base(tmp_path, dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda _: None)
    trainer = TorchTrainer(model, micro_batch_tokens=64, max_adapters=1, max_rank=8)
    trainer.add("m", SPECS["all"])
    data = data_of(5)
    [ours] = trainer.forward_backward([ModelCall("m", as_call(data, forward_only=True))])
    expected = torch.cat([reference.logprobs(module, datum) for datum in data])
    np.testing.assert_allclose(ours.logprobs_M, expected.detach().numpy(), atol=1e-5)
