"""Weights leave by the tools that people have, unmodified, compute elsewhere what they did here, and come back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyrage
import pytest
import tinker
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tinker import types
from tinker_cookbook import weights
from tinker_cookbook.exceptions import WeightsDownloadError
from transformers import AutoModelForCausalLM

from tests.contract.datums import score, supervised, tokens
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]

ADAM = types.AdamParams(learning_rate=2e-3, eps=1e-8)
SEQUENCES = [tokens(12, seed) for seed in range(3)]
DATUMS = [supervised(sequence) for sequence in SEQUENCES]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


def trained(service: tinker.ServiceClient, steps: int = 3, **options: bool) -> tinker.TrainingClient:
    client = service.create_lora_training_client("tiny", rank=8, seed=3, **options).result()
    for _ in range(steps):
        client.forward_backward(DATUMS, "cross_entropy")
        client.optim_step(ADAM)
    return client


def scored_elsewhere(module: torch.nn.Module) -> np.ndarray:
    """What `score` gives, by a Hugging Face module."""
    rows = []
    for sequence in SEQUENCES:
        with torch.no_grad():
            logprobs = module(input_ids=torch.tensor([sequence[:-1]])).logits[0].float().log_softmax(-1)
        rows.append(logprobs.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].numpy())
    return np.concatenate(rows)


def adapted(folder: Path) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


def run(server: LocalServer, *command: str) -> str:
    environment = dict(os.environ) | {"TINKER_BASE_URL": server.base_url}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def tinsmith(server: LocalServer, *arguments: object) -> str:
    return run(server, sys.executable, "-c", "from tinsmith.cli import main; main()", *map(str, arguments))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_cookbook_downloads_a_checkpoint_encrypted_and_peft_computes_the_same(
    server: LocalServer, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    client = trained(service)
    path = client.save_state("for-the-cookbook").result().path
    weights.download(tinker_path=path, output_dir=str(tmp_path / "out"), base_url=server.base_url)
    assert files(tmp_path / "out") == ADAPTER
    np.testing.assert_allclose(scored_elsewhere(adapted(tmp_path / "out")), score(client, DATUMS), atol=1e-4)
    rest = tinker.RestClient(base_url=server.base_url)
    left = [each.tinker_path for each in rest.list_user_checkpoints(limit=500).result().checkpoints]
    assert path in left
    assert not [each for each in left if each.endswith("/external_weights/download")]


def test_the_cookbooks_merging_takes_what_it_downloaded(
    server: LocalServer, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    client = trained(service, train_unembed=False)
    path = client.save_weights_external("plain").result().path
    adapter = weights.download(tinker_path=path, output_dir=str(tmp_path / "out"), base_url=server.base_url)
    weights.build_hf_model(
        base_model=str(tiny_folder()), adapter_path=adapter, output_path=str(tmp_path / "merged"), dtype="float32"
    )
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(scored_elsewhere(module), score(client, DATUMS), atol=0.05)  # it keeps bfloat16


def test_an_encrypted_export_stays_encrypted_on_its_way(
    server: LocalServer, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    identity = pyrage.x25519.Identity.generate()
    client = trained(service)
    sealed = client.save_weights_external("sealed", age_encryption_recipients=[str(identity.to_public())])
    weights.download(tinker_path=sealed.result().path, output_dir=str(tmp_path), base_url=server.base_url)
    assert files(tmp_path) == [f"{name}.age" for name in ADAPTER]
    for name in ADAPTER:
        pyrage.decrypt_file(str(tmp_path / f"{name}.age"), str(tmp_path / name), [identity])
    assert json.loads((tmp_path / ADAPTER[0]).read_text())["base_model_name_or_path"] == "tiny"
    np.testing.assert_allclose(scored_elsewhere(adapted(tmp_path)), score(client, DATUMS), atol=1e-4)
    with pytest.raises(tinker.TinkerError, match=r"recipients\[0\]"):
        client.save_weights_external("other", age_encryption_recipients=["age1nobody"]).result()


def test_a_download_of_what_is_not_there_says_so(server: LocalServer, tmp_path: Path) -> None:
    with pytest.raises(WeightsDownloadError, match="there is no checkpoint"):
        weights.download(tinker_path="tinker://x:train:0/weights/a", output_dir=str(tmp_path), base_url=server.base_url)


def test_the_command_line_of_the_sdk_downloads(
    server: LocalServer, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    client = trained(service)
    for path in (client.save_state("state").result().path, client.save_weights_external("export").result().path):
        run(server, sys.executable, "-m", "tinker.cli", "checkpoint", "download", path, "--output", str(tmp_path))
        found = tmp_path / path.removeprefix("tinker://").replace("/", "_")
        assert files(found) == ADAPTER
        np.testing.assert_allclose(scored_elsewhere(adapted(found)), score(client, DATUMS), atol=1e-4)


def test_what_is_exported_on_the_server_is_imported_trained_on_and_sampled(
    server: LocalServer, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    client = trained(service)
    path = client.save_state("to-export").result().path
    expected = score(client, DATUMS)
    tinsmith(
        server, "export", path, tmp_path / "merged", "--merged", "--dtype", "float32", "--data-dir", server.data_dir
    )
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(scored_elsewhere(module), expected, atol=1e-4)
    tinsmith(server, "export", path, tmp_path / "adapter", "--data-dir", server.data_dir)
    imported = tinsmith(server, "import", tmp_path / "adapter", "--base", "tiny").strip()
    assert imported.startswith("tinker://upload-") and imported.endswith("/external_weights/upload")
    heir = service.create_training_client_from_state(imported).result()
    np.testing.assert_allclose(score(heir, DATUMS), expected, atol=1e-6)
    heir.forward_backward(DATUMS, "cross_entropy")
    heir.optim_step(ADAM).result()
    assert np.abs(score(heir, DATUMS) - expected).max() > 0.01
    again = heir.save_state("again").result().path
    assert service.create_training_client_from_state_with_optimizer(again).result()
    sampler = service.create_sampling_client(model_path=imported).result()
    prompt = types.ModelInput.from_ints(SEQUENCES[0])
    logprobs = sampler.compute_logprobs(prompt).result()
    np.testing.assert_allclose(logprobs[1:], expected[: len(SEQUENCES[0]) - 1], atol=1e-5)


def test_an_adapter_that_peft_made_is_imported(
    server: LocalServer, service: tinker.ServiceClient, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    module = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(tmp_path / "peft")
    imported = tinsmith(server, "import", tmp_path / "peft").strip()
    heir = service.create_training_client_from_state(imported).result()
    np.testing.assert_allclose(score(heir, DATUMS), scored_elsewhere(module), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"r": 16}, "has shape"),
        ({"base_model_name_or_path": "other/model"}, None),
    ],
)
def test_an_import_that_fails_says_why(
    server: LocalServer,
    service: tinker.ServiceClient,
    tmp_path: Path,
    changes: dict[str, object],
    said: str | None,
) -> None:
    path = trained(service, steps=1).save_weights_external("spoilt").result().path
    weights.download(tinker_path=path, output_dir=str(tmp_path), base_url=server.base_url)
    config = json.loads((tmp_path / ADAPTER[0]).read_text())
    (tmp_path / ADAPTER[0]).write_text(json.dumps(config | changes))
    if said is None:  # the server has only one name to offer
        assert tinsmith(server, "import", tmp_path).startswith("tinker://upload-")
        return
    with pytest.raises(AssertionError, match=said):
        tinsmith(server, "import", tmp_path)
