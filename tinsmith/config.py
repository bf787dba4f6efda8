"""The settings of one server: read once (file, then environment, then command line), frozen, printed at start.

The only reader of the environment.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a server is told. Sizes in bytes, tokens or seconds, as each name or comment says."""

    model: str = "tiny"  # "tiny", a Hugging Face folder, or a hub name
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    data_dir: Path = Path("tinsmith-data")
    database_url: str = ""  # empty: SQLite in data_dir
    aliases: dict[str, str] = field(default_factory=dict)  # other names for the served model; "*" is any name
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    max_lora_adapters: int = 64  # on the device at once; idle ones beyond it are paged out
    max_lora_rank: int = 128
    dtype: str = "auto"  # auto, float32, bfloat16
    device: str = "auto"  # auto, cpu, cuda
    max_context: int = 0  # tokens; 0: what the model's configuration says
    max_body_bytes: int = 256 * 2**20  # of a request, also after decompression
    kv_cache_tokens: int = 0  # 0: from free memory
    train_tokens: int = 0  # tokens in one micro-batch; 0: from free memory
    future_hours: float = 24.0  # how long a finished result can be read
    poll_seconds: float = 30.0  # how long retrieve_future holds a request
