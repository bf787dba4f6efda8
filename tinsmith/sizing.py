"""How much memory a server may use, and what it buys: cache tokens, and tokens in one training micro-batch.

Estimates from sizes, made before anything is allocated; knows no tensors of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

KV_SHARE = 0.35  # of free memory
STATE_SHARE = 0.1
TRAIN_SHARE = 0.25
CPU_KV_TOKENS = 65536  # a CPU cannot use more at its speed
CPU_TRAIN_TOKENS = 1024  # larger micro-batches gain nothing on a CPU, and a neighbour's token waits for one
SMALL_MODEL = 50_000_000
"""Parameters below which one CPU thread is faster: waking a second one for each of a thousand short operations costs
more than it saves (docs/log.md has the numbers)."""
DEVICE_TRAIN_TOKENS = 65536
CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What decides about memory: counts, and bytes per number in the model's dtype."""

    kv_numbers: int  # of one token, in all layers
    activation_bytes: int  # of one token, in a training forward pass that keeps everything for backward
    max_context: int
    item_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values."""
        return self.kv_numbers * self.item_bytes


def running_sequences(state_bytes: int, free_bytes: int, most: int) -> int:
    """How many sequences, at most `most`, may be sampled at once; at least one.

    Each has a recurrent state of so many bytes, which lies in memory twice while the batch changes.
    """
    return most if not state_bytes else max(1, min(most, int(free_bytes * STATE_SHARE) // (2 * state_bytes)))


def kv_cache_tokens(sizes: ModelSizes, free_bytes: int, max_running: int, *, on_cpu: bool) -> int:
    """Tokens that fit into the cache's share of memory, at most what `max_running` full contexts need.

    At least one full context, since a smaller cache could not serve every valid request.
    """
    fitting = int(free_bytes * KV_SHARE) // sizes.kv_bytes
    useful = min(max_running * sizes.max_context, CPU_KV_TOKENS) if on_cpu else max_running * sizes.max_context
    return max(sizes.max_context, min(fitting, useful))


def train_tokens(sizes: ModelSizes, free_bytes: int, *, on_cpu: bool) -> int:
    """Tokens of one micro-batch that fit into training's share of memory; at least 256."""
    fitting = int(free_bytes * TRAIN_SHARE) // sizes.activation_bytes
    return max(256, min(fitting, CPU_TRAIN_TOKENS if on_cpu else DEVICE_TRAIN_TOKENS))


def free_host_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can be used without swapping, also inside a container (control groups of either version)."""
    available = psutil.virtual_memory().available
    for limit_file, used_file in _CGROUP_FILES:
        limit, used = _read_number(cgroup / limit_file), _read_number(cgroup / used_file)
        if limit is not None and used is not None:
            reclaimable = _inactive_file_bytes((cgroup / limit_file).with_name("memory.stat"))
            return max(0, min(available, limit - used + reclaimable))
    return available


def _read_number(path: Path) -> int | None:
    """None where the file is missing, or says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file_bytes(path: Path) -> int:
    """Of page cache that counts as used but is given up on demand."""
    try:
        rows = dict(line.split(" ", 1) for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(rows.get("total_inactive_file", rows.get("inactive_file", "0")))
