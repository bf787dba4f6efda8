"""Requests and results as flat arrays: the form in which they wait in the queue and reach the device.

A record is packed as a small JSON header followed by raw little-endian arrays, each aligned to 64 bytes; unpacking
copies nothing. Shapes in names: `_T` tokens of all datums, `_M` target entries of all datums (equal to `_T` unless a
datum has K targets per position), `_N` datums, `_P` prompt tokens, `_S` sampled tokens of all sequences.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_ALIGNMENT = 64


def pack(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """One byte string of `meta` (JSON-able) and `arrays` (any shape, little-endian)."""
    table: list[tuple[str, str, tuple[int, ...], int]] = []
    chunks: list[bytes | memoryview] = []
    position = 0
    for name, array in arrays.items():
        contiguous = np.ascontiguousarray(array)
        padding = -position % _ALIGNMENT
        chunks.append(b"\0" * padding)
        chunks.append(contiguous.data.cast("B") if contiguous.size else b"")
        position += padding
        table.append((name, contiguous.dtype.str, contiguous.shape, position))
        position += contiguous.nbytes
    header = json.dumps({"meta": meta, "arrays": table}, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % _ALIGNMENT)
    return b"".join([len(header).to_bytes(8, "little"), header, *chunks])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The inverse of `pack`. The arrays are read-only views into `data`."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    arrays = {}
    for name, dtype, shape, position in header["arrays"]:
        count = int(np.prod(shape))
        flat = np.frombuffer(data, dtype, count, start + position) if count else np.empty(0, dtype)
        arrays[name] = flat.reshape(shape)
    return header["meta"], arrays


@dataclass(frozen=True, slots=True)
class TrainCall:
    """The datums of one forward or forward_backward request.

    Row i of a datum predicts `targets` row i from tokens 0..i. A datum whose targets have shape (N,) has width 0;
    shape (N, K) has width K, its entries row-major. Every array in `inputs` (weights, logprobs, advantages, …) has
    the layout of `targets_M`.
    """

    loss: str
    config: dict[str, float]
    forward_only: bool
    tokens_T: Int32
    token_offsets: Int64  # [N + 1]
    targets_M: Int32
    target_offsets: Int64  # [N + 1]
    widths_N: Int32
    inputs: dict[str, Float32]
    custom: "CustomLoss | None" = None  # what the loss `custom` computes

    @property
    def num_datums(self) -> int:
        return len(self.widths_N)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    def to_bytes(self) -> bytes:
        meta: dict[str, Any] = {"loss": self.loss, "config": self.config, "forward_only": self.forward_only}
        arrays: dict[str, NDArray[Any]] = {
            "tokens": self.tokens_T,
            "token_offsets": self.token_offsets,
            "targets": self.targets_M,
            "target_offsets": self.target_offsets,
            "widths": self.widths_N,
        }
        arrays |= {f"input.{name}": array for name, array in self.inputs.items()}
        if self.custom is not None:
            meta["program"] = self.custom.program
            arrays |= {f"custom.{name}": array for name, array in self.custom.values.items()}
            arrays |= {f"shape.{name}": array for name, array in self.custom.shapes.items()}
        return pack(meta, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "TrainCall":
        meta, arrays = unpack(data)
        inputs = {name.removeprefix("input."): a for name, a in arrays.items() if name.startswith("input.")}
        return cls(
            meta["loss"],
            meta["config"],
            meta["forward_only"],
            arrays["tokens"],
            arrays["token_offsets"],
            arrays["targets"],
            arrays["target_offsets"],
            arrays["widths"],
            inputs,
            CustomLoss.unpacked(meta["program"], arrays) if "program" in meta else None,
        )


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """A checked graph (see `custom_loss`), and what it reads of the datums beside their logprobs.

    The values of an input are those of all datums, one after the other; row n of its shapes [N, rank] is datum n's.
    """

    program: dict[str, Any]
    values: dict[str, Float32 | Int64]
    shapes: dict[str, Int64]

    @classmethod
    def unpacked(cls, program: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "CustomLoss":
        """From the arrays of a packed call."""
        values = {name[7:]: array for name, array in arrays.items() if name.startswith("custom.")}
        return cls(program, values, {name: arrays[f"shape.{name}"] for name in values})


@dataclass(frozen=True, slots=True)
class TrainOutput:
    """Log-probabilities of the targets, laid out as in the call, and metrics named `name:reduction`."""

    logprobs_M: Float32
    target_offsets: Int64  # [N + 1]
    widths_N: Int32
    metrics: dict[str, float]

    def to_bytes(self) -> bytes:
        arrays: dict[str, NDArray[Any]] = {
            "logprobs": self.logprobs_M,
            "target_offsets": self.target_offsets,
            "widths": self.widths_N,
        }
        return pack({"metrics": self.metrics}, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "TrainOutput":
        meta, arrays = unpack(data)
        return cls(arrays["logprobs"], arrays["target_offsets"], arrays["widths"], meta["metrics"])


@dataclass(frozen=True, slots=True)
class SampleCall:
    """One sampling request: `num_samples` independent continuations of one prompt, and what to say of the prompt.

    `max_tokens` None means up to the context limit. `stop_at_eos` is what an absent `stop` means. `seed` is always
    set (the API draws one when the user gives none), so that a retry after a crash repeats the same tokens.
    """

    prompt_P: Int32
    seed: int
    num_samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_at_eos: bool = True
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    target_prompt_tokens: Int64 | None = None  # [P] or [P, K]; -1 where nothing is asked
    stream: bool = False  # whether the caller wants to hear of tokens before all samples have ended

    _SCALARS = (
        "seed",
        "num_samples",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "stop_at_eos",
        "stop_tokens",
        "stop_strings",
        "prompt_logprobs",
        "prompt_logprobs_last_n",
        "topk_prompt_logprobs",
        "topk_sample_logprobs",
        "prompt_alt_tokens_k",
        "stream",
    )

    def to_bytes(self) -> bytes:
        arrays: dict[str, NDArray[Any]] = {"prompt": self.prompt_P}
        if self.target_prompt_tokens is not None:
            arrays["target_prompt_tokens"] = self.target_prompt_tokens
        return pack({name: getattr(self, name) for name in self._SCALARS}, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "SampleCall":
        meta, arrays = unpack(data)
        meta["stop_tokens"], meta["stop_strings"] = tuple(meta["stop_tokens"]), tuple(meta["stop_strings"])
        return cls(arrays["prompt"], target_prompt_tokens=arrays.get("target_prompt_tokens"), **meta)


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """The sampled sequences of one request, one after the other, and what was asked of the prompt.

    `stopped` is 1 where a sequence ended at a stop token, stop string or the end-of-sequence token, 0 where it ended
    at its length limit. Absent values are NaN in `prompt_logprobs_P`; an empty top-k cell has id 0 and logprob -99999.
    """

    tokens_S: Int32
    logprobs_S: Float32
    offsets: Int64  # [num_samples + 1]
    stopped: NDArray[np.int8]  # [num_samples]
    cache_hit_tokens: int = 0
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Only what was asked for: prompt_logprobs [P]; topk_prompt_ids, topk_prompt_logprobs [P, k];
    topk_sample_ids, topk_sample_logprobs [S, k]; target_prompt_logprobs (shape asked for);
    alt_tokens int64 and alt_logprobs, shaped as the SDK's PromptAltTokens says."""
    prompt_tokens: int = 0

    def to_bytes(self) -> bytes:
        arrays: dict[str, NDArray[Any]] = {
            "tokens": self.tokens_S,
            "logprobs": self.logprobs_S,
            "offsets": self.offsets,
            "stopped": self.stopped,
        }
        arrays |= {f"extra.{name}": array for name, array in self.extras.items()}
        return pack({"cache_hit_tokens": self.cache_hit_tokens, "prompt_tokens": self.prompt_tokens}, arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "SampleOutput":
        meta, arrays = unpack(data)
        extras = {name.removeprefix("extra."): a for name, a in arrays.items() if name.startswith("extra.")}
        return cls(
            arrays["tokens"],
            arrays["logprobs"],
            arrays["offsets"],
            arrays["stopped"],
            meta["cache_hit_tokens"],
            extras,
            meta.get("prompt_tokens", 0),  # results of an older version do not say
        )
