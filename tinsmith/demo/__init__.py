"""The embedded model: a language model of 2 M parameters that travels inside the package, and how it was made.

Importing this package imports nothing heavy; `tiny_folder` only names where the model lies.
"""

from pathlib import Path


def tiny_folder() -> Path:
    """The folder of the embedded model, in Hugging Face form (config, tokenizer, bf16 safetensors)."""
    return Path(__file__).parent / "tiny"
