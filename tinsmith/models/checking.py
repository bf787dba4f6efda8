"""Whether the model in a folder can be served, found out without loading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinsmith.errors import ConfigError
from tinsmith.models.families import find_targets
from tinsmith.models.loading import text_part


@dataclass(frozen=True, slots=True)
class Checked:
    """What the configuration of a model that can be served says. `max_context` in tokens."""

    architecture: str
    max_context: int


def check_folder(folder: Path, *, trust_remote_code: bool) -> Checked:
    """Raises ConfigError, with the reason, for a folder that holds no causal language model of a kind that is served.

    Code that comes with the model runs only if `trust_remote_code` is true.
    """
    if not any(folder.glob("tokenizer*")):
        raise ConfigError(f"{folder} has no tokenizer (tokenizer.json, or tokenizer.model)")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a strange configuration, or code that came with it, makes of it
        raise ConfigError(f"{folder} cannot be served: {_reason(error, trust_remote_code)}") from error
    module = text_part(module)
    find_targets(module)
    return Checked(type(module).__name__, module.config.get_text_config().max_position_embeddings)


def _reason(error: Exception, trust_remote_code: bool) -> str:
    text = str(error)
    if not trust_remote_code and "trust_remote_code" in text:
        return (
            "it needs code of its own, which is not run. Read that code, and if you trust it, add the model with "
            "--trust-remote-code"
        )
    return text.strip().partition("\n")[0] or type(error).__name__
