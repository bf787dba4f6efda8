"""How much memory a server may use, and what it buys: cache tokens, and tokens in one training micro-batch.

Estimates from sizes, made before anything is allocated; knows no tensors of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tinsmith.errors import ConfigError

KV_SHARE = 0.35  # of free memory
STATE_SHARE = 0.1
TRAIN_SHARE = 0.25
SNAPSHOT_SHARE = 0.15
MODEL_SHARE = 0.15
CPU_KV_TOKENS = 65536  # a CPU cannot use more at its speed
CPU_TRAIN_TOKENS = 1024  # larger micro-batches gain nothing on a CPU, and a neighbour's token waits for one
SMALL_MODEL = 50_000_000
"""Parameters below which one CPU thread is faster: waking a second one for each of a thousand short operations costs
more than it saves (docs/log.md has the numbers)."""
DEVICE_TRAIN_TOKENS = 65536
FEW_SEQUENCES = 256  # may always be sampled at once
SEQUENCE_TOKENS = 256  # of the cache, for each further one
CAPTURED_STEPS = 96  # of so many kinds, about
CAPTURED_STEP_BYTES = 8 * 2**20
"""What the driver is taken to keep of a captured decoding step: hundreds of launches. An estimate, not measured."""
LEAST_UNCAPTURED = 3 / 4  # of free memory; captured steps that find no room are not prepared
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ENGINE_ROOM = 384 * 2**20
"""Bytes beside the weights that an engine needs at least: its libraries, some cache, activations and adapters."""
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
    vocabulary: int

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
    """What a server may do at once: sequences sampled, tokens cached, tokens trained, bytes of weights to sample
    from, and of models that train.

    A training pass of more than `kept_tokens` must not keep all activations, and no pass of prompts may be of more than
    `layer_tokens`.
    """

    running: int
    kv_tokens: int
    layer_tokens: int
    train_tokens: int
    kept_tokens: int
    snapshot_bytes: int
    model_bytes: int


def running_sequences(state_bytes: int, free_bytes: int, most: int) -> int:
    """How many sequences, at most `most`, may be sampled at once; at least one.

    Each has a recurrent state of so many bytes, which lies in memory twice while the batch changes.
    """
    return most if not state_bytes else max(1, min(most, int(free_bytes * STATE_SHARE) // (2 * state_bytes)))


def useful_sequences(kv_tokens: int) -> int:
    """How many sequences a cache of so many tokens keeps busy: more would only take each other's blocks."""
    return max(FEW_SEQUENCES, kv_tokens // SEQUENCE_TOKENS)


def kv_cache_tokens(sizes: ModelSizes, free_bytes: int, max_running: int, *, on_cpu: bool) -> int:
    """Tokens that fit into the cache's share of memory, at most what `max_running` full contexts need.

    At least one full context, since a smaller cache could not serve every valid request.
    """
    fitting = int(free_bytes * KV_SHARE) // sizes.kv_bytes
    useful = min(max_running * sizes.max_context, CPU_KV_TOKENS) if on_cpu else max_running * sizes.max_context
    return max(sizes.max_context, min(fitting, useful))


def step_bytes(sizes: ModelSizes, free_bytes: int, max_running: int, kv_tokens: int = 0) -> int:
    """What captured decoding steps of at most `max_running` sequences take: the largest's fp32 logits, and the driver.

    As many sequences as are useful with a cache of `kv_tokens`; 0: with its share of memory.
    """
    rows = min(max_running, useful_sequences(kv_tokens or int(free_bytes * KV_SHARE) // sizes.kv_bytes))
    wanted = rows * sizes.vocabulary * 4 + CAPTURED_STEPS * CAPTURED_STEP_BYTES
    return min(wanted, free_bytes - int(free_bytes * LEAST_UNCAPTURED))


def model_bytes(adapters: Sequence[int], full: Sequence[int], item_bytes: int) -> int:
    """What models that train take: adapters and full-parameter models of so many parameters each.

    Weights, gradient and both moments in fp32, and what passes read where that is another copy; and while calls run, a
    copy of the gradients that they add to: all adapters', or one full-parameter model's.
    """
    own = (sum(adapters) + sum(full)) * (16 + (0 if item_bytes == 4 else item_bytes))
    return own + 4 * max(sum(adapters), *full, 0)


def check_cache(sizes: ModelSizes, tokens: int, free_bytes: int, taken_bytes: int = 0) -> None:
    """Raises ConfigError if a cache of so many tokens was asked for, and memory cannot hold it.

    Captured decoding steps have taken `taken_bytes` off what is free already.
    """
    if tokens * sizes.kv_bytes > free_bytes:
        taken = f" beside {_gigabytes(taken_bytes)} GB for captured decoding steps" if taken_bytes else ""
        raise ConfigError(
            f"kv_cache_tokens is {tokens}: {tokens} × {sizes.kv_bytes} bytes = {_gigabytes(tokens * sizes.kv_bytes)} "
            f"GB, but {_gigabytes(free_bytes)} GB are free{taken}; at most {free_bytes // sizes.kv_bytes} tokens fit, "
            "and 0 chooses"
        )


def train_tokens(sizes: ModelSizes, free_bytes: int, *, on_cpu: bool, checkpointing: bool = False) -> int:
    """Tokens of one micro-batch that fit into training's share of memory; at least 256."""
    most = CPU_TRAIN_TOKENS if on_cpu else DEVICE_TRAIN_TOKENS
    return max(256, min(trainable_tokens(sizes, free_bytes, checkpointing=checkpointing), most))


def trainable_tokens(sizes: ModelSizes, free_bytes: int, *, checkpointing: bool) -> int:
    """Tokens of one pass whose activations fit into training's share of memory."""
    token_bytes = sizes.checkpointed_bytes if checkpointing else sizes.activation_bytes
    return int(free_bytes * TRAIN_SHARE) // token_bytes


def layer_tokens(sizes: ModelSizes, free_bytes: int) -> int:
    """Tokens of which the inside of one layer fits into training's share of memory, which samples use in turn."""
    return max(256, int(free_bytes * TRAIN_SHARE) * sizes.layers // sizes.activation_bytes)


def context_tokens(sizes: ModelSizes, free_bytes: int, *, checkpointing: bool) -> int:
    """The longest sequence that can be both sampled and trained in its share of memory; at least 256.

    But never longer than what the model was made for.
    """
    cached = int(free_bytes * KV_SHARE) // sizes.kv_bytes
    fitting = min(cached, trainable_tokens(sizes, free_bytes, checkpointing=checkpointing))
    return min(sizes.max_context, max(256, fitting))


def divide(total_bytes: int, weights: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """How many of `total_bytes` each model's engine may use, from the bytes of the models' weights.

    A model with a share gets that fraction; of what they leave, every other model gets its weights and an equal part
    of the rest. Raises ConfigError, with the arithmetic, if some model cannot have its weights and ENGINE_ROOM.
    """
    given = {name: int(total_bytes * shares[name]) for name in weights if name in shares}
    others = {name: size for name, size in weights.items() if name not in shares}
    rest = total_bytes - sum(given.values()) - sum(others.values())
    parts = given | {name: size + rest // len(others) for name, size in others.items()}
    if any(parts[name] < size + ENGINE_ROOM for name, size in weights.items()):
        needs = " + ".join(f"{name} {_gigabytes(size)} + {_gigabytes(ENGINE_ROOM)}" for name, size in weights.items())
        granted = ", ".join(f"{name} {_gigabytes(size)}" for name, size in given.items())
        granted = f", of which by memory_shares {granted}" if granted else ""
        raise ConfigError(
            f"memory is short: weights and the least working room are {needs} = "
            f"{_gigabytes(sum(weights.values()) + len(weights) * ENGINE_ROOM)} GB; there are "
            f"{_gigabytes(total_bytes)} GB{granted}. Serve fewer or smaller models, in bfloat16 (--dtype), or give "
            "more memory (--memory-fraction, --memory-share)"
        )
    return {name: parts[name] for name in weights}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}"


def total_host_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of this machine, or that its container may use."""
    limits = (_read_number(cgroup / limit_file) for limit_file, _ in _CGROUP_FILES)
    return min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)])


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
