"""How much memory a server may use, and what it buys: cache tokens, and tokens in one training micro-batch.

Estimates from sizes, made before anything is allocated; knows no tensors of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

KV_SHARE = 0.35  # of free memory
STATE_SHARE = 0.1
TRAIN_SHARE = 0.25
SNAPSHOT_SHARE = 0.15
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
    layers: int
    hidden: int
    max_context: int
    item_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values."""
        return self.kv_numbers * self.item_bytes

    @property
    def checkpointed_bytes(self) -> int:
        """Of one token in training, if only the layers' inputs are kept, and one layer's inside at a time."""
        return self.layers * self.hidden * self.item_bytes + self.activation_bytes // self.layers


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a server may do at once: sequences sampled, tokens cached, tokens trained, bytes of weights to sample from.

    A training pass of more than `kept_tokens` must not keep all activations.
    """

    running: int
    kv_tokens: int
    train_tokens: int
    kept_tokens: int
    snapshot_bytes: int


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


def train_tokens(sizes: ModelSizes, free_bytes: int, *, on_cpu: bool, checkpointing: bool = False) -> int:
    """Tokens of one micro-batch that fit into training's share of memory; at least 256."""
    most = CPU_TRAIN_TOKENS if on_cpu else DEVICE_TRAIN_TOKENS
    return max(256, min(trainable_tokens(sizes, free_bytes, checkpointing=checkpointing), most))


def trainable_tokens(sizes: ModelSizes, free_bytes: int, *, checkpointing: bool) -> int:
    """Tokens of one pass whose activations fit into training's share of memory."""
    token_bytes = sizes.checkpointed_bytes if checkpointing else sizes.activation_bytes
    return int(free_bytes * TRAIN_SHARE) // token_bytes


def context_tokens(sizes: ModelSizes, free_bytes: int, *, checkpointing: bool) -> int:
    """The longest sequence that can be both sampled and trained in its share of memory; at least 256."""
    cached = int(free_bytes * KV_SHARE) // sizes.kv_bytes
    return max(256, min(sizes.max_context, cached, trainable_tokens(sizes, free_bytes, checkpointing=checkpointing)))


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
